// Pixels of the active patches: taken from the rolled and flipped image and given back, and the update of the images.
// kernels/patch_embed/reference.py and kernels/image_step/reference.py define what is computed.
#include <cmath>

#include "parallel.h"
#include "vector.h"

namespace {

struct Patches {
  const int64_t* index;  // [batch, n] cells of the still image
  int64_t batch, n, channels, height, width, patch;
  int64_t dy, dx, flip;

  int64_t rows() const { return height / patch; }
  int64_t columns() const { return width / patch; }
  double pixels() const { return double(channels) * patch * patch; }
};

inline int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

inline int64_t moved_cell(const Patches& p, int64_t cell) {
  const int64_t down = floor_div(2 * p.dy + p.patch, 2 * p.patch), right = floor_div(2 * p.dx + p.patch, 2 * p.patch);
  const int64_t row = modulo(cell / p.columns() + down, p.rows()), column = modulo(cell % p.columns() + right, p.columns());
  return row * p.columns() + (p.flip ? p.columns() - 1 - column : column);
}

// body(image row, position in the patches' rows): for every row of pixels of one patch; `at(x)` runs over its pixels in the image.
template <class Body>
inline void patch_rows(const Patches& p, int64_t token, int64_t cell, Body body) {
  const int64_t b = token / p.n, top = cell / p.columns() * p.patch, left = cell % p.columns() * p.patch;
  const int64_t x = modulo((p.flip ? p.width - 1 - left : left) - p.dx, p.width);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t i = 0; i < p.patch; ++i) {
      const int64_t y = modulo(top + i - p.dy, p.height);
      body(((b * p.channels + c) * p.height + y) * p.width, x, ((token * p.channels + c) * p.patch + i) * p.patch);
    }
}

// Calls body(offset, x) for the pixels of one row of a patch: x runs up or, flipped, down, and around.
template <class Body>
inline void pixels_of_row(const Patches& p, int64_t x, Body body) {
  for (int64_t j = 0; j < p.patch; ++j) {
    body(j, x);
    if (p.flip) x = x == 0 ? p.width - 1 : x - 1;
    else x = x == p.width - 1 ? 0 : x + 1;
  }
}

constexpr int64_t PATCH = 256;  // longest patch side

// A line of a patch's pixels and one more on either side; where the image ends, the pixel's own value.
struct Line {
  float at[2 + PATCH + V] = {};  // whole vectors can be read from every pixel
};

inline void fill(Line& line, const float* row, int64_t x, int64_t size, int64_t width, const float* own) {
  memcpy(line.at + 1, row + x, size * sizeof(float));
  line.at[0] = x > 0 ? row[x - 1] : own[x];
  line.at[size + 1] = x + size < width ? row[x + size] : own[x + size - 1];
}

// taken: [batch * n, channels * patch * patch]; cells: [batch * n], where the patches move.
template <class T>
void take_pixels(const Patches& p, const float* images, T* taken, int64_t* cells) {
  share(p.batch * p.n, 4 * p.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      cells[token] = moved_cell(p, p.index[token]);
      patch_rows(p, token, cells[token], [&](int64_t row, int64_t first, int64_t at) {
        if (!p.flip && first + p.patch <= p.width)
          each(p.patch, [&](int64_t j, int some) { put(taken + at + j, get(images + row + first + j, some), some); });
        else pixels_of_row(p, first, [&](int64_t j, int64_t x) { from_float(taken + at + j, images[row + x]); });
      });
    }
  });
}

// The adjoint: images [batch, channels, height, width] get the pixels, zero elsewhere. No pixel is named twice.
template <class T>
void give_pixels(const Patches& p, const T* pixels, float* images) {
  const int64_t size = p.channels * p.height * p.width;
  share(p.batch, 4. * size, [&](int64_t begin, int64_t end) {
    memset(images + begin * size, 0, (end - begin) * size * sizeof(float));
    for (int64_t token = begin * p.n; token < end * p.n; ++token)
      patch_rows(p, token, moved_cell(p, p.index[token]), [&](int64_t row, int64_t first, int64_t at) {
        if (!p.flip && first + p.patch <= p.width)
          each(p.patch, [&](int64_t j, int some) { put(images + row + first + j, get(pixels + at + j, some), some); });
        else pixels_of_row(p, first, [&](int64_t j, int64_t x) { images[row + x] = to_float(pixels[at + j]); });
      });
  });
}

// x [m, d] = or += position [cells, d] rows named by cells [m]; the rows of image b begin at row b * (prefix + n) + prefix.
template <class T>
void add_position(T* tokens, const T* position, const int64_t* cells, const T* prefix, int64_t batch, int64_t n, int64_t count, int64_t d) {
  share(batch, 4. * n * d, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* to = tokens + b * (count + n) * d;
      if (count) memcpy(to, prefix, count * d * sizeof(T));
      to += count * d;
      if (position)
        for (int64_t i = 0; i < n; ++i) {
          const T* from = position + cells[b * n + i] * d;
          each(d, [&](int64_t j, int some) { put(to + i * d + j, get(to + i * d + j, some) + get(from + j, some), some); });
        }
    }
  });
}

}  // namespace

#define EXPORT(dtype, T)                                                                                                                       \
  extern "C" void smi_take_pixels_##dtype(const Patches* p, const float* images, T* taken, int64_t* cells) {                                   \
    take_pixels(*p, images, taken, cells);                                                                                                     \
  }                                                                                                                                            \
  extern "C" void smi_give_pixels_##dtype(const Patches* p, const T* pixels, float* images) { give_pixels(*p, pixels, images); }               \
  extern "C" void smi_add_position_##dtype(T* tokens, const T* position, const int64_t* cells, const T* prefix, int64_t batch, int64_t n,      \
                                           int64_t count, int64_t d) {                                                                         \
    add_position(tokens, position, cells, prefix, batch, n, count, d);                                                                         \
  }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)

extern "C" {

// norms: [4]; partial: [planes, 4]. Sums within a plane in double, planes in order: the same for any number of threads.
void smi_tv_norms(const float* images, int64_t planes, int64_t height, int64_t width, double* partial, float* norms) {
  share(planes, 12. * height * width, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      double total[4] = {};
      for (int64_t y = 0; y < height; ++y) {
        const float *row = images + (plane * height + y) * width, *below = y + 1 < height ? row + width : nullptr;
        vec sums[4] = {};
        float rest[4] = {};
        int64_t x = 0;
        for (; x + V < width; x += V) {
          const vec here = load(row + x), right = load(row + x + 1), across = here - right;
          sums[0] += across * across;
          if (below) {
            const vec down = load(below + x), corner = load(below + x + 1);
            const vec one = here - down, two = here - corner, three = down - right;
            sums[1] += one * one;
            sums[2] += two * two;
            sums[3] += three * three;
          }
        }
        for (; x < width; ++x) {
          const auto square = [](float d) { return d * d; };
          const bool more = x + 1 < width;
          if (more) rest[0] += square(row[x] - row[x + 1]);
          if (below) rest[1] += square(row[x] - below[x]);
          if (below && more) rest[2] += square(row[x] - below[x + 1]), rest[3] += square(below[x] - row[x + 1]);
        }
        for (int k = 0; k < 4; ++k) total[k] += sum(sums[k]) + rest[k];
      }
      memcpy(partial + plane * 4, total, sizeof total);
    }
  });
  for (int k = 0; k < 4; ++k) {
    double total = 0;
    for (int64_t plane = 0; plane < planes; ++plane) total += partial[plane * 4 + k];
    norms[k] = float(std::sqrt(total));
  }
}

struct Step {
  float* images;
  const float* grad;
  float *avg, *avg_sq;                  // each [batch, channels, height, width]
  float* out;                           // null: images are updated in place
  float* pull;                          // scratch for the total variation's gradient, [batch * n, channels * patch * patch]
  const float *low, *high, *norms;      // [channels]; [4] or null
  float tv_weight, beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta, which would lose digits here
  float rate, correction;               // lr / (1 - beta1^step), 1 / (1 - beta2^step)
};

// The total variation's gradient of all patches comes first, because a pixel's neighbours must be read before they move.
void smi_image_step(const Patches* given, const Step* step) {
  const Patches& p = *given;
  const Step& s = *step;
  float inverse[4] = {};
  if (s.norms)
    for (int k = 0; k < 4; ++k) inverse[k] = s.norms[k] > 0 ? s.tv_weight / s.norms[k] : 0;
  const auto rows = [&](int64_t token, auto body) {
    const int64_t b = token / p.n, cell = p.index[token], top = cell / p.columns() * p.patch, left = cell % p.columns() * p.patch;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < p.patch; ++i)
        body(c, top + i, left, ((b * p.channels + c) * p.height + top + i) * p.width, ((token * p.channels + c) * p.patch + i) * p.patch);
  };
  if (s.norms)
    share(p.batch * p.n, 24 * p.pixels(), [&](int64_t begin, int64_t end) {
      Line up, middle, down;
      for (int64_t token = begin; token < end; ++token)
        rows(token, [&](int64_t, int64_t y, int64_t x, int64_t row, int64_t at) {
          const float* own = s.images + row;
          const bool above = y > 0, below = y + 1 < p.height;
          fill(middle, own, x, p.patch, p.width, own);
          fill(up, above ? own - p.width : own, x, p.patch, p.width, own);
          fill(down, below ? own + p.width : own, x, p.patch, p.width, own);
          const float a1 = above ? inverse[1] : 0, a2 = above ? inverse[2] : 0, a3 = above ? inverse[3] : 0;
          const float b1 = below ? inverse[1] : 0, b2 = below ? inverse[2] : 0, b3 = below ? inverse[3] : 0;
          float* pull = s.pull + at;
          each(p.patch, [&](int64_t j, int some) {
            const vec here = load(middle.at + j + 1);
            vec sum = inverse[0] * (2 * here - load(middle.at + j) - load(middle.at + j + 2));
            sum += a1 * (here - load(up.at + j + 1)) + a2 * (here - load(up.at + j)) + a3 * (here - load(up.at + j + 2));
            sum += b1 * (here - load(down.at + j + 1)) + b3 * (here - load(down.at + j)) + b2 * (here - load(down.at + j + 2));
            put(pull + j, sum, some);
          });
        });
    });
  float* target = s.out ? s.out : s.images;
  share(p.batch * p.n, 24 * p.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      rows(token, [&](int64_t c, int64_t, int64_t x, int64_t row, int64_t from) {
        const float low = s.low[c], high = s.high[c];
        each(p.patch, [&](int64_t j, int some) {
          const int64_t at = row + x + j;
          vec g = get(s.grad + at, some);
          if (s.norms) g += get(s.pull + from + j, some);
          const vec avg = s.beta1 * get(s.avg + at, some) + s.rest1 * g, sq = s.beta2 * get(s.avg_sq + at, some) + s.rest2 * g * g;
          put(s.avg + at, avg, some);
          put(s.avg_sq + at, sq, some);
          const vec moved = get(s.images + at, some) - s.rate * avg / (sqrt(sq * s.correction) + s.eps);
          put(target + at, moved < low ? broadcast(low) : moved > high ? broadcast(high) : moved, some);
        });
      });
  });
}
}

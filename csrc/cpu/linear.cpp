// GEMMs with a frozen matrix, packed once, and their epilogues in a Vision Transformer, applied while the result is still in the cache.
//
//   Y[M, N] = epilogue(X[M, K] B[K, N])
//
// B is packed into panels of NR columns, cut along K into blocks of at most DEPTH rows that stay in the first-level cache while all rows of X pass by:
// element (k, n) of block `s` lies at s * depth * padded N + (n / NR) * depth * NR + k * NR + n % NR.
#include "activation.h"
#include "parallel.h"
#include "product.h"

namespace {

constexpr int DEPTH = 256;    // 16 KB of a panel with AVX2, half of the first-level cache
constexpr int PANELS = 4;     // of B that a task multiplies

enum class Epilogue : int32_t {
  none,        // y = z, where z = x B + bias
  residual,    // y = residual + gamma * z; gamma may be null
  activation,  // y = f(z), and `slope` gets f'(z) unless it is null
  derivative,  // y = f'(z)
  times,       // y = z * slope
};

struct Params {
  const float *x, *packed, *bias;  // x: [M, ldx]; bias: [N] or null
  const float *residual, *gamma;   // [M, N]; [N]
  float* slope;                    // [M, N]
  float* y;                        // [M, N], overlaps nothing
  int64_t m, k, n, ldx;
  Epilogue epilogue;
  Activation activation;
};

inline int64_t blocks(int64_t k) { return (k + DEPTH - 1) / DEPTH; }
inline int64_t depth(int64_t k) { return (k + blocks(k) - 1) / blocks(k); }
inline int64_t panels(int64_t n) { return (n + NR - 1) / NR; }

// The epilogue, for `count` rows of `width` columns, at most NR, from `column` on. sums: row stride NR. WHOLE: width is NR.
template <Epilogue E, Activation A, bool WHOLE>
inline void finish(const Params& p, int64_t row, int count, int64_t column, int width, const float* sums) {
  const auto read = [width](const float* from, int j) {
    if constexpr (WHOLE) return load(from + j);
    float part[V] = {};
    if (j < width) memcpy(part, from + j, (width - j < V ? width - j : V) * sizeof(float));
    return load(part);
  };
  const auto write = [width](float* to, int j, vec x) {
    if constexpr (WHOLE) return store(to + j, x);
    if (j < width) memcpy(to + j, &x, (width - j < V ? width - j : V) * sizeof(float));
  };
  vec bias[2] = {}, gamma[2] = {};
  for (int j = 0; j < 2; ++j) {
    if (p.bias) bias[j] = read(p.bias + column, j * V);
    gamma[j] = p.gamma ? read(p.gamma + column, j * V) : broadcast(1);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t at = (row + i) * p.n + column;
    for (int j = 0; j < 2; ++j) {
      vec y = load(sums + i * NR + j * V) + bias[j];
      if constexpr (E == Epilogue::residual) y = y * gamma[j] + read(p.residual + at, j * V);
      if constexpr (E == Epilogue::activation) {
        const Activated found = activate<A>(y);
        if (p.slope) write(p.slope + at, j * V, found.slope);
        y = found.value;
      }
      if constexpr (E == Epilogue::derivative) y = activate<A>(y).slope;
      if constexpr (E == Epilogue::times) y *= read(p.slope + at, j * V);
      write(p.y + at, j * V, y);
    }
  }
}

template <Epilogue E, Activation A>
void linear(const Params& p, int64_t start, int64_t end) {  // rows from start up to end
  const int64_t m = end - start;
  if (m <= 0) return;
  const int64_t groups = (panels(p.n) + PANELS - 1) / PANELS, chunks = (m + ROWS - 1) / ROWS;
  const int64_t height = (m + chunks - 1) / chunks, tall = (height + MR - 1) / MR * MR;  // rows of a task, whole tiles
  const int64_t deep = depth(p.k), wide = panels(p.n) * NR;
  share(groups * chunks, 2. * tall * PANELS * NR * p.k, [&](int64_t task, int64_t after) {
    float* sums = scratch(PANELS * tall * NR);  // [panel][row][NR]
    for (; task < after; ++task) {
      const int64_t first = task / chunks * PANELS, last = first + PANELS < panels(p.n) ? first + PANELS : panels(p.n);
      const int64_t top = start + task % chunks * tall, bottom = top + tall < end ? top + tall : end;
      for (int64_t k = 0; k < p.k; k += deep) {
        const int steps = int(k + deep < p.k ? deep : p.k - k);
        for (int64_t panel = first; panel < last; ++panel) {
          const float* b = p.packed + k * wide + panel * steps * NR;
          float* c = sums + (panel - first) * tall * NR;
          for (int64_t i = top; i < bottom; i += MR, c += MR * NR) {
            const int count = bottom - i < MR ? int(bottom - i) : MR;
            const Left a = {p.x + i * p.ldx + k, p.ldx, 1};
            k == 0 ? rows<false>(count, NR, steps, a, b, NR, c, NR) : rows<true>(count, NR, steps, a, b, NR, c, NR);
            if (k + deep >= p.k) {
              const int64_t column = panel * NR, left = p.n - column;
              left < NR ? finish<E, A, false>(p, i, count, column, int(left), c) : finish<E, A, true>(p, i, count, column, NR, c);
            }
          }
        }
      }
    }
  });
}

template <Epilogue E>
void with_activation(const Params& p, int64_t start, int64_t end) {
  switch (p.activation) {
    case Activation::gelu: return linear<E, Activation::gelu>(p, start, end);
    case Activation::gelu_tanh: return linear<E, Activation::gelu_tanh>(p, start, end);
    case Activation::quick_gelu: return linear<E, Activation::quick_gelu>(p, start, end);
  }
}

void linear(const Params& p, int64_t start, int64_t end) {
  switch (p.epilogue) {
    case Epilogue::none: return linear<Epilogue::none, Activation::gelu>(p, start, end);
    case Epilogue::residual: return linear<Epilogue::residual, Activation::gelu>(p, start, end);
    case Epilogue::activation: return with_activation<Epilogue::activation>(p, start, end);
    case Epilogue::derivative: return with_activation<Epilogue::derivative>(p, start, end);
    case Epilogue::times: return linear<Epilogue::times, Activation::gelu>(p, start, end);
  }
}

}  // namespace

extern "C" {

int64_t smi_packed_floats(int64_t k, int64_t n) { return k * panels(n) * NR; }

// B's element (k, n) is from[k * row + n * column] * scale[k]; scale may be null.
void smi_pack(const float* from, int64_t row, int64_t column, const float* scale, int64_t k, int64_t n, float* packed) {
  const int64_t deep = depth(k), wide = panels(n) * NR;
  share(panels(n), 8. * k * NR, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t i = 0; i < k; ++i) {
        const int64_t first = i / deep * deep, steps = first + deep < k ? deep : k - first;
        float* to = packed + first * wide + panel * steps * NR + (i - first) * NR;
        for (int j = 0; j < NR; ++j) {
          const int64_t at = panel * NR + j;
          to[j] = at < n ? from[i * row + at * column] * (scale ? scale[i] : 1) : 0;
        }
      }
  });
}

void smi_linear(const Params* p, Part part) { linear(*p, part.first(p->m), part.last(p->m)); }
}

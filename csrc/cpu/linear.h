// GEMMs with a frozen matrix, packed once, and their epilogues, applied while the result is still in the cache.
//
//   Y[M, N] = epilogue(X[M, K] B[K, N])
//
// B is packed into panels of NR columns, cut along K into blocks of at most DEPTH rows that stay in the first-level cache while all rows of X pass by:
// element (k, n) of the block that begins at row `first` lies at first * padded N + (n / NR) * depth * NR + (k - first) * NR + n % NR. Of bfloat16s two
// neighbours in k are one element, a pair, in place of one number.
#pragma once

#include "epilogue.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"

constexpr int DEPTH = 256;  // rows of B: 16 KB of a panel with AVX2, and in pairs with AVX-512, half of the first-level cache
constexpr int PANELS = 4;   // of B that a task multiplies

inline int64_t panels(int64_t n) { return (n + NR - 1) / NR; }

// Memory to be asked for, some cache lines in the shadow of each tile of the GEMM.
struct Ahead {
  const char* at;
  int64_t lines;

  void ask(int64_t count) {
    for (; count > 0 && lines > 0; --count, --lines, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// What the kernels below have in common: multiply(x, ldx, count, above, b, steps, add, sums, ahead) makes `count` rows of sums, at most HEIGHT, of
// `steps` columns of X and rows of B; `above`: rows of X before the first that may be read. It returns the row of `sums` at which they begin.
struct Floats {
  using Number = float;
  using Packed = float;
  static constexpr int PER = 1, ALIGN = 1, HEIGHT = MR;  // numbers of an element; what depth is a multiple of; rows of a tile
  static constexpr int64_t SPACE = 0;                    // floats of its own

  explicit Floats(float*) {}

  int multiply(const float* x, int64_t ldx, int count, int64_t, const float* b, int steps, bool add, float* sums, Ahead) const {
    const Left a = {x, ptrdiff_t(ldx), 1};
    add ? rows<true>(count, NR, steps, a, b, NR, sums, NR) : rows<false>(count, NR, steps, a, b, NR, sums, NR);
    return 0;
  }
};

#if defined(SMI_BFLOAT16_PRODUCTS)
// By the instruction that multiplies pairs and adds both products to a float.
struct Pairs {
  using Number = bfloat16;
  using Packed = Pair;
  static constexpr int PER = 2, ALIGN = 32, HEIGHT = MR;
  static constexpr int64_t SPACE = 0;

  explicit Pairs(float*) {}

  int multiply(const bfloat16* x, int64_t ldx, int count, int64_t, const Pair* b, int steps, bool add, float* sums, Ahead) const {
    const Factor<Pair> a = {reinterpret_cast<const Pair*>(x), ptrdiff_t(ldx / 2), 1};
    add ? rows<true>(count, NR, steps / 2, a, b, NR, sums, NR) : rows<false>(count, NR, steps / 2, a, b, NR, sums, NR);
    return 0;
  }
};
#endif

#if defined(SMI_TILES)
// By the tile unit, 32 rows times 32 columns at a time, or 16 times 32. It takes depths that are multiples of 32. Where fewer rows are left it begins
// earlier, among rows that are done, and their second sums are not used: each row's sums are those of whole tiles, wherever it lies.
class Tiles {
 public:
  using Number = bfloat16;
  using Packed = Pair;
  static constexpr int PER = 2, ALIGN = tiles::DEPTH, HEIGHT = 2 * tiles::SIDE;
  static constexpr int64_t SPACE = HEIGHT * DEPTH / 2;

  explicit Tiles(float* space) : copy(reinterpret_cast<bfloat16*>(space)) { tiles::configure(); }
  ~Tiles() { tiles::release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  int multiply(const bfloat16* x, int64_t ldx, int count, int64_t above, const Pair* b, int steps, bool add, float* sums, Ahead ahead) const {
    const int height = count > tiles::SIDE ? HEIGHT : tiles::SIDE, missing = height - count;
    if (missing <= above) {
      run(height, x - missing * ldx, ldx, b, steps, add, sums, ahead);
      return missing;
    }
    for (int i = 0; i < height; ++i) {
      if (i < count) memcpy(copy + i * steps, x + i * ldx, steps * sizeof *x);
      else memset(copy + i * steps, 0, steps * sizeof *x);
    }
    run(height, copy, steps, b, steps, add, sums, ahead);
    return 0;
  }

 private:
  static void run(int height, const bfloat16* x, int64_t ldx, const Pair* b, int steps, bool add, float* sums, Ahead ahead) {
    if (height == HEIGHT) add ? block<2, true>(x, ldx, b, steps, sums, ahead) : block<2, false>(x, ldx, b, steps, sums, ahead);
    else add ? block<1, true>(x, ldx, b, steps, sums, ahead) : block<1, false>(x, ldx, b, steps, sums, ahead);
  }

  // R times 16 rows: sums in tiles 0 to 3, X in 4 and 5, B in 6 and 7.
  template <int R, bool ADD>
  static void block(const bfloat16* x, int64_t ldx, const Pair* b, int steps, float* sums, Ahead ahead) {
    using namespace tiles;
    constexpr ptrdiff_t ROW = NR * sizeof(float);  // of sums and of B, bytes
    float* below = sums + SIDE * NR;
    if constexpr (ADD) load<0>(sums, ROW), load<1>(sums + SIDE, ROW);
    else zero<0>(), zero<1>();
    if constexpr (R == 2) {
      if constexpr (ADD) load<2>(below, ROW), load<3>(below + SIDE, ROW);
      else zero<2>(), zero<3>();
    }
    const ptrdiff_t stride = ldx * sizeof(bfloat16);
    const int64_t each = (ahead.lines * tiles::DEPTH + steps - 1) / steps;  // lines asked for at every step
    for (int k = 0; k < steps; k += tiles::DEPTH, x += tiles::DEPTH, b += SIDE * NR) {
      load<6>(b, ROW), load<4>(x, stride);
      tiles::multiply_add<0, 4, 6>();
      load<7>(b + SIDE, ROW);
      tiles::multiply_add<1, 4, 7>();
      if constexpr (R == 2) {
        load<5>(x + SIDE * ldx, stride);
        tiles::multiply_add<2, 5, 6>();
        tiles::multiply_add<3, 5, 7>();
      }
      ahead.ask(each);
    }
    store<0>(sums, ROW), store<1>(sums + SIDE, ROW);
    if constexpr (R == 2) store<2>(below, ROW), store<3>(below + SIDE, ROW);
  }

  bfloat16* copy;
};
#endif

// Of B's rows how many a block has, all but the last.
template <class Kernel>
int64_t depth(int64_t k) {
  const int64_t blocks = (k + DEPTH - 1) / DEPTH, even = (k + blocks - 1) / blocks;
  return (even + Kernel::ALIGN - 1) / Kernel::ALIGN * Kernel::ALIGN;
}

template <class Kernel>
void linear(const LinearParams<typename Kernel::Number>& p, Part part) {
  const int64_t start = part.first(p.m), end = part.last(p.m), m = end - start;
  if (m <= 0) return;
  constexpr int64_t HEIGHT = Kernel::HEIGHT, PER = Kernel::PER;
  const int64_t groups = (panels(p.n) + PANELS - 1) / PANELS, chunks = (m + ROWS - 1) / ROWS;
  const int64_t tall = ((m + chunks - 1) / chunks + HEIGHT - 1) / HEIGHT * HEIGHT;  // rows of a task, whole tiles
  const int64_t deep = depth<Kernel>(p.k), wide = panels(p.n) * NR;
  const auto finish = finish_of(p);
  share(groups * chunks, 2. * tall * PANELS * NR * p.k, [&](int64_t task, int64_t after) {
    Room memory{scratch(PANELS * tall * NR + Kernel::SPACE)};
    float* sums = memory.take<float>(PANELS * tall * NR);  // [panel][row][NR]
    const Kernel kernel(memory.take<float>(Kernel::SPACE));
    for (; task < after; ++task) {
      const int64_t first = task / chunks * PANELS, last = first + PANELS < panels(p.n) ? first + PANELS : panels(p.n);
      const int64_t top = start + task % chunks * tall, bottom = top + tall < end ? top + tall : end;
      for (int64_t k = 0; k < p.k; k += deep) {
        const int steps = int(k + deep < p.k ? deep : p.k - k);
        for (int64_t panel = first; panel < last; ++panel) {
          const auto* b = static_cast<const typename Kernel::Packed*>(p.packed) + (k * wide + panel * steps * NR) / PER;
          const int64_t column = panel * NR;
          const int width = int(p.n - column < NR ? p.n - column : NR);
          float* c = sums + (panel - first) * tall * NR;
          const bool ends = k + deep >= p.k;
          // What is multiplied next, mostly the next panel, is asked for meanwhile, shared out among the tiles of this one.
          const int64_t size = steps * NR / PER, blocks = (bottom - top + HEIGHT - 1) / HEIGHT;
          const int64_t lines = (size * int64_t(sizeof *b) / 64 + blocks - 1) / blocks;
          const char* next = reinterpret_cast<const char*>(panel + 1 < last || ends ? b + size : b + deep * wide / PER - (PANELS - 1) * size);
          for (int64_t i = top; i < bottom; i += HEIGHT, c += HEIGHT * NR, next += lines * 64) {
            const int count = bottom - i < HEIGHT ? int(bottom - i) : int(HEIGHT);
            if (ends) expect(p, i, count, column);
            const int at = kernel.multiply(p.x + i * p.ldx + k, p.ldx, count, i - top, b, steps, k > 0, c, {next, lines});
            if (ends) finish(p, i, count, column, width, c + at * NR);
          }
        }
      }
    }
  });
}

// B's element (k, n) is from[k * row + n * column] * scale[k]; scale may be null. Number i of element e of B lies at packed[e * PER + i].
template <class Kernel>
void pack(const typename Kernel::Number* from, int64_t row, int64_t column, const float* scale, int64_t k, int64_t n, void* packed) {
  using Number = typename Kernel::Number;
  constexpr int64_t PER = Kernel::PER;
  const int64_t deep = depth<Kernel>(k), wide = panels(n) * NR;
  share(panels(n), 8. * k * NR, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t i = 0; i < k; ++i) {
        const int64_t first = i / deep * deep, steps = first + deep < k ? deep : k - first, inner = i - first;
        Number* to = static_cast<Number*>(packed) + first * wide + panel * steps * NR + inner / PER * NR * PER + inner % PER;
        for (int64_t j = 0; j < NR; ++j) {
          const int64_t at = panel * NR + j;
          from_float(to + j * PER, at < n ? to_float(from[i * row + at * column]) * (scale ? scale[i] : 1) : 0);
        }
      }
  });
}

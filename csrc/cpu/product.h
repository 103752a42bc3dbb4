// Small matrix products from a tile of MR x NR accumulators that stays in registers: A[M, K] B[K, N], handed to whoever wants the sums.
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int ROWS = 16 * MR;  // rows of the left factor that a task passes over: with 256 columns, 98 KB (AVX2) of the second-level cache

// A left factor: element (i, k) at at[i * row + k * column], so that a transposed one costs nothing.
struct Left {
  const float* at;
  ptrdiff_t row, column;
};

// R rows, R <= MR, times NR columns. b: [depth, ldb], its first NR columns are read. Inlined, because a call costs as much as ten of its steps.
template <int R, bool ADD>
[[gnu::always_inline]] inline void tile(Left a, const float* b, ptrdiff_t ldb, int depth, float* c, ptrdiff_t ldc) {
  vec sums[R][2];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = vec{};
  for (int k = 0; k < depth; ++k, a.at += a.column, b += ldb) {
    const vec left = load(b), right = load(b + V);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const vec x = broadcast(a.at[i * a.row]);
      sums[i][0] += x * left;
      sums[i][1] += x * right;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    float* to = c + i * ldc;
    store(to, ADD ? load(to) + sums[i][0] : sums[i][0]);  // a sum of short sums rounds less than one long sum
    store(to + V, ADD ? load(to + V) + sums[i][1] : sums[i][1]);
  }
}

// R rows times `columns` columns, a multiple of NR.
template <int R, bool ADD>
[[gnu::always_inline]] inline void strip(int columns, int depth, Left a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  for (int j = 0; j < columns; j += NR) tile<R, ADD>(a, b + j, ldb, depth, c + j, ldc);
}

// The same for a number of rows known when it runs, at most MR.
template <bool ADD, int R = MR>
[[gnu::noinline]] void rows(int count, int columns, int depth, Left a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  if (count == R) return strip<R, ADD>(columns, depth, a, b, ldb, c, ldc);
  if constexpr (R > 1) rows<ADD, R - 1>(count, columns, depth, a, b, ldb, c, ldc);
}

template <bool ADD>
[[gnu::noinline]] void product(int count, int columns, int depth, Left a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  for (; count >= MR; count -= MR, a.at += MR * a.row, c += MR * ldc) strip<MR, ADD>(columns, depth, a, b, ldb, c, ldc);
  if (count) rows<ADD>(count, columns, depth, a, b, ldb, c, ldc);
}

// Rows of the product one by one, as row(i, sums): from `space` for MR rows, which never leave the first-level cache.
template <class Row>
[[gnu::noinline]] void product_by_rows(int count, int columns, int depth, Left a, const float* b, ptrdiff_t ldb, float* space, Row row) {
  int first = 0;
  for (; first + MR <= count; first += MR, a.at += MR * a.row) {
    strip<MR, false>(columns, depth, a, b, ldb, space, columns);
    for (int i = 0; i < MR; ++i) row(first + i, space + i * columns);
  }
  if (first < count) rows<false>(count - first, columns, depth, a, b, ldb, space, columns);
  for (int i = 0; first + i < count; ++i) row(first + i, space + i * columns);
}

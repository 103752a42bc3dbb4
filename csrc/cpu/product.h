// Small matrix products from a tile of MR x NR accumulators that stays in registers: A[M, K] B[K, N], handed to whoever wants the sums.
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int ROWS = 16 * MR;  // rows of the left factor that a task passes over: with 256 columns, 98 KB (AVX2) of the second-level cache

// A left factor: element (i, k) at at[i * row + k * column], so that a transposed one costs nothing. T: float, or a pair of integers, whose sums S are
// integers too.
template <class T>
struct Factor {
  const T* at;
  ptrdiff_t row, column;
};
using Left = Factor<float>;

// R rows, R <= MR, times NR columns. b: [depth, ldb], its first NR columns are read. Inlined, because a call costs as much as ten of its steps.
template <int R, bool ADD, class T, class S>
[[gnu::always_inline]] inline void tile(Factor<T> a, const T* b, ptrdiff_t ldb, int depth, S* c, ptrdiff_t ldc) {
  using Vector = decltype(load(b));
  Vector sums[R][2];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = Vector{};
  for (int k = 0; k < depth; ++k, a.at += a.column, b += ldb) {
    const auto left = load(b), right = load(b + V);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const auto x = broadcast(a.at[i * a.row]);
      sums[i][0] = multiply_add(x, left, sums[i][0]);
      sums[i][1] = multiply_add(x, right, sums[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    S* to = c + i * ldc;
    if constexpr (ADD) sums[i][0] += load(to), sums[i][1] += load(to + V);  // a sum of short sums rounds less than one long sum
    store(to, sums[i][0]);
    store(to + V, sums[i][1]);
  }
}

// R rows times `columns` columns, a multiple of NR.
template <int R, bool ADD, class T, class S>
[[gnu::always_inline]] inline void strip(int columns, int depth, Factor<T> a, const T* b, ptrdiff_t ldb, S* c, ptrdiff_t ldc) {
  for (int j = 0; j < columns; j += NR) tile<R, ADD>(a, b + j, ldb, depth, c + j, ldc);
}

// The same for a number of rows known when it runs, at most MR.
template <bool ADD, int R = MR, class T, class S>
[[gnu::noinline]] void rows(int count, int columns, int depth, Factor<T> a, const T* b, ptrdiff_t ldb, S* c, ptrdiff_t ldc) {
  if (count == R) return strip<R, ADD>(columns, depth, a, b, ldb, c, ldc);
  if constexpr (R > 1) rows<ADD, R - 1>(count, columns, depth, a, b, ldb, c, ldc);
}

template <bool ADD, class T, class S>
[[gnu::noinline]] void product(int count, int columns, int depth, Factor<T> a, const T* b, ptrdiff_t ldb, S* c, ptrdiff_t ldc) {
  for (; count >= MR; count -= MR, a.at += MR * a.row, c += MR * ldc) strip<MR, ADD>(columns, depth, a, b, ldb, c, ldc);
  if (count) rows<ADD>(count, columns, depth, a, b, ldb, c, ldc);
}

// Rows of the product one by one, as row(i, sums): from `space` for MR rows, which never leave the first-level cache.
template <class T, class S, class Row>
[[gnu::noinline]] void product_by_rows(int count, int columns, int depth, Factor<T> a, const T* b, ptrdiff_t ldb, S* space, Row row) {
  int first = 0;
  for (; first + MR <= count; first += MR, a.at += MR * a.row) {
    strip<MR, false>(columns, depth, a, b, ldb, space, columns);
    for (int i = 0; i < MR; ++i) row(first + i, space + i * columns);
  }
  if (first < count) rows<false>(count - first, columns, depth, a, b, ldb, space, columns);
  for (int i = 0; first + i < count; ++i) row(first + i, space + i * columns);
}

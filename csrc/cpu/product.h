// The micro-kernel of all GEMMs, A[M, K] B[K, N]: a tile of MR x NR accumulators that stays in registers; small GEMMs made of it, whose sums are handed on.
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int ROWS = 16 * MR;  // rows of the left factor that a task passes over: with 256 columns, 98 KB (AVX2) of the second-level cache

// A left factor: element (i, k) at at[i * row + k * column], so that a transposed one costs nothing. T: float, or a pair of
// 16-bit numbers, whose sums S are 32-bit integers or floats.
template <class T>
struct Factor {
  const T* at;
  ptrdiff_t row, column;
};
using Left = Factor<float>;

// R rows, R <= MR, times N vectors of columns, N <= 2. b: [depth, ldb], as many of its first columns are read. Inlined, because a call costs as much as
// ten of its steps.
template <int R, int N, bool ADD, class T, class S>
[[gnu::always_inline]] inline void tile(Factor<T> a, const T* b, ptrdiff_t ldb, int depth, S* c, ptrdiff_t ldc) {
  using Sums = decltype(load(c));
  Sums sums[R][N];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = Sums{};
  for (int k = 0; k < depth; ++k, a.at += a.column, b += ldb) {
    decltype(load(b)) right[N];
    for (int j = 0; j < N; ++j) right[j] = load(b + j * V);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const auto left = broadcast(a.at[i * a.row]);
      for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < N; ++j) {
      S* to = c + i * ldc + j * V;
      if constexpr (ADD) sums[i][j] += load(to);  // a sum of short sums rounds less than one long sum
      store(to, sums[i][j]);
    }
}

// R rows times `columns` columns, a multiple of V.
template <int R, bool ADD, class T, class S>
[[gnu::always_inline]] inline void strip(int columns, int depth, Factor<T> a, const T* b, ptrdiff_t ldb, S* c, ptrdiff_t ldc) {
  int j = 0;
  for (; j + NR <= columns; j += NR) tile<R, 2, ADD>(a, b + j, ldb, depth, c + j, ldc);
  if (j < columns) tile<R, 1, ADD>(a, b + j, ldb, depth, c + j, ldc);
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

// Rows of the result one by one, as row(i, sums): from `space` for MR rows, which never leave the first-level cache.
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

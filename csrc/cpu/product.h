// Small matrix products from a tile of MR x NR accumulators that stays in registers: C[M, N] (+)= A[M, K] B[K, N].
#pragma once

#include <cstddef>

#include "vector.h"

constexpr int ROWS = 16 * MR;  // rows of the left factor that a task passes over: with 256 columns, 98 KB (AVX2) of the second-level cache

// A left factor: element (i, k) at at[i * row + k * column], so that a transposed one costs nothing.
struct Left {
  const float* at;
  ptrdiff_t row, column;
};

// R rows, R <= MR, times NR columns. b: [depth, ldb], its first NR columns are read.
template <int R, bool ADD>
inline void tile(Left a, const float* b, ptrdiff_t ldb, int depth, float* c, ptrdiff_t ldc) {
  vec sums[R][2];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    sums[i][0] = sums[i][1] = vec{};
  }
  for (int k = 0; k < depth; ++k) {
    vec left = load(b + k * ldb), right = load(b + k * ldb + V);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      vec x = broadcast(a.at[i * a.row + k * a.column]);
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

// The same for a number of rows known when it runs.
template <bool ADD, int R = MR>
inline void rows(int count, Left a, const float* b, ptrdiff_t ldb, int depth, float* c, ptrdiff_t ldc) {
  if (count == R) return tile<R, ADD>(a, b, ldb, depth, c, ldc);
  if constexpr (R > 1) rows<ADD, R - 1>(count, a, b, ldb, depth, c, ldc);
}

// columns: a multiple of NR.
template <bool ADD>
inline void product(int count, int columns, int depth, Left a, const float* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  for (int j = 0; j < columns; j += NR)
    for (int i = 0; i < count; i += MR)
      rows<ADD>(count - i < MR ? count - i : MR, {a.at + i * a.row, a.row, a.column}, b + j, ldb, depth, c + i * ldc + j, ldc);
}

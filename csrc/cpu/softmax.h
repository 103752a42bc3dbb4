// The softmax of attention and its gradient, over scores [keys, queries].
#pragma once

#include <cmath>

#include "vector.h"

constexpr float LOG2E = 1.44269504f;

// `softmax` for N vectors of columns from j on: one of two has something to do while the other waits.
template <int N, class T>
inline void softmax_of(float* scores, int count, int columns, int block, float* inverse, T* shares, float* lse, float scale, int j) {
  float* at = scores + j;
  vec top[N], total[N] = {}, x[N];
  for (int i = 0; i < N; ++i) top[i] = load(at + i * V) * scale;
  for (int t = 1; t < count; ++t)
    for (int i = 0; i < N; ++i) {
      x[i] = load(at + t * columns + i * V) * scale;
      top[i] = x[i] > top[i] ? x[i] : top[i];
    }
  for (int t = 0; t < count; ++t) {
    float* to = at + t * columns;
    for (int i = 0; i < N; ++i) {
      x[i] = exp2((load(to + i * V) * scale - top[i]) * LOG2E);  // NaN stays NaN, and makes the sum NaN
      total[i] += x[i];
      store(to + i * V, x[i]);
    }
    if (!shares) continue;
    if constexpr (N == 2) store(shares + t * columns + j, x[0], x[1]);
    else store(shares + t * columns + j, x[0]);
  }
  for (int i = 0; i < N; ++i) {
    store(inverse + j + i * V, 1 / total[i]);
    for (int k = 0; lse && k < V && j + i * V + k < block; ++k) lse[j + i * V + k] = top[i][k] + std::log(total[i][k]);
  }
}

// Scores [count, columns], times scale, to unnormalised softmax weights down each column, and the inverse of their sum. Queries are columns, so that sums and maxima
// are of whole vectors, without a reduction within one. Where wanted: the weights in T as `shares`, lse of `block` columns.
template <class T>
inline void softmax(float* scores, int count, int columns, int block, float* inverse, T* shares, float* lse, float scale = 1) {
  int j = 0;
  for (; j + NR <= columns; j += NR) softmax_of<2>(scores, count, columns, block, inverse, shares, lse, scale, j);
  if (j < columns) softmax_of<1>(scores, count, columns, block, inverse, shares, lse, scale, j);
}

// Scores [count, columns], times scale, to weights, by lse of the columns.
inline void shares_again(float* scores, int count, int columns, const float* lse, float scale = 1) {
  for (int j = 0; j < columns; j += V) {
    const vec shift = load(lse + j);
    for (float* at = scores + j; at < scores + count * columns; at += columns) store(at, exp2((load(at) * scale - shift) * LOG2E));
  }
}

// Weights and dP, both [count, columns], to P, to `scores`, and scale * dS. Weights are divided by their own sum, so that rounded ones, and those of
// scores that are not forward's to the last bit, are a softmax again.
template <class T>
inline void softmax_backward(const T* shares, float* scores, float* pulls, int count, int columns, float scale) {
  for (int j = 0; j < columns; j += V) {
    float *row = scores + j, *pull = pulls + j;
    vec total = {}, mean = {};
    for (int t = 0; t < count; ++t) {
      const vec x = load(shares + t * columns + j);
      total += x;
      mean += x * load(pull + t * columns);
    }
    const vec inverse = 1 / total;
    mean *= inverse;
    for (int t = 0; t < count; ++t) {
      const vec x = load(shares + t * columns + j) * inverse;
      store(row + t * columns, x);
      store(pull + t * columns, x * (load(pull + t * columns) - mean) * scale);
    }
  }
}

// The softmax of attention and its gradient, over scores [keys, queries].
#pragma once

#include <cmath>

#include "vector.h"

constexpr float LOG2E = 1.44269504f;

// Scores [count, columns] to shares of the softmax down each column, before their division by their sum, whose inverse is given too. Queries are
// columns, so that sums and largest values are of vectors, and no number of a vector is another's. Where wanted: shares in T, lse of `block` columns.
template <class T>
inline void softmax(float* scores, int count, int columns, int block, float* inverse, T* shares, float* lse) {
  for (int j = 0; j < columns; j += NR) {
    float* at = scores + j;
    vec top = load(at), next = load(at + V);
    for (int t = 1; t < count; ++t) {
      const vec x = load(at + t * columns), y = load(at + t * columns + V);
      top = x > top ? x : top;
      next = y > next ? y : next;
    }
    vec total = {}, total_next = {};
    for (int t = 0; t < count; ++t) {
      float* to = at + t * columns;
      const vec x = exp2((load(to) - top) * LOG2E), y = exp2((load(to + V) - next) * LOG2E);  // NaN stays NaN, and makes the sum NaN
      total += x, total_next += y;
      store(to, x, y);
      if (shares) store(shares + t * columns + j, x, y);
    }
    store(inverse + j, 1 / total, 1 / total_next);
    for (int i = 0; lse && i < V && j + i < block; ++i) lse[j + i] = top[i] + std::log(total[i]);
    for (int i = 0; lse && i < V && j + V + i < block; ++i) lse[j + V + i] = next[i] + std::log(total_next[i]);
  }
}

// Scores and dP, both [count, columns], to P and scale * dS, by lse of the columns.
inline void softmax_backward(float* scores, float* pulls, int count, int columns, const float* lse, float scale) {
  for (int j = 0; j < columns; j += V) {
    float *row = scores + j, *pull = pulls + j;
    const vec shift = load(lse + j);
    vec mean = {};
    for (int t = 0; t < count; ++t) {
      const vec x = exp2((load(row + t * columns) - shift) * LOG2E);
      store(row + t * columns, x);
      mean += x * load(pull + t * columns);
    }
    for (int t = 0; t < count; ++t) store(pull + t * columns, load(row + t * columns) * (load(pull + t * columns) - mean) * scale);
  }
}

// The same from the shares that `softmax` kept; P to `scores`. They are divided by their own sum, so that rounded ones are a softmax again.
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

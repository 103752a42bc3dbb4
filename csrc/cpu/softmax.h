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

// Scores [count, columns] to shares again, by lse of the columns.
inline void shares_again(float* scores, int count, int columns, const float* lse) {
  for (int j = 0; j < columns; j += V) {
    const vec shift = load(lse + j);
    for (float* at = scores + j; at < scores + count * columns; at += columns) store(at, exp2((load(at) - shift) * LOG2E));
  }
}

// Shares and dP, both [count, columns], to P, to `scores`, and scale * dS. Shares are divided by their own sum, so that rounded ones, and those of
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

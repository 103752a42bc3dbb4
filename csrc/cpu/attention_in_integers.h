// A head in bfloat16 whose queries are one block, with GEMMs in integers (integers.h) where a processor is faster at them. Scores, softmax and its
// gradient are floats. What integers would not represent well is refused, and left to the float GEMMs of attention.cpp.
#pragma once

#include <cmath>

#include "integers.h"
#include "softmax.h"

#if defined(SMI_INTEGERS)

constexpr int FEWEST = 20;      // tokens from which it pays
constexpr float SHARPEST = 32;  // |q| |k| scale up to which scores err by ERROR times this; at the very worst, 64 wide, by 2^-7
constexpr float CLOSE = 1e-3f;  // error of a result relative to it, half of what rounding P and dS to bfloat16 leads to

class HeadInIntegers {
 public:
  explicit HeadInIntegers(const Head<bfloat16>& head) : head(head) {}

  static bool may_take(const Head<bfloat16>& head) { return head.count >= FEWEST && head.count <= BLOCK && head.width == head.p.width; }

  bool forward() {
    float inverse[BLOCK], squares = 0;
    if (!find_scores(head.input(2))) return false;
    softmax(scores, count, columns, count, inverse, p.shares ? head.shares() : nullptr, p.lse ? head.lse() : nullptr);
    const Norms v = pairs_of_rows(head.input(2), count, width, b, column_step);
    pairs_of_rows(rows(scores), count, columns, a, row_step);
    for (int i = 0; i < count; ++i) row_step[i] *= inverse[i], squares += row_step[i] * row_step[i];
    head.expect(head.input(0), p.stride[3]), head.expect(head.input(1), p.stride[3]);
    return give_product({a, 1, columns}, LEVELS * std::sqrt(squares), v, head.output());
  }

  bool backward() {
    const Norms grad = transposed_pairs(head.gradient(), count, width, b, columns, column_step);
    const Norms v = transposed_pairs(head.input(2), count, width, a, columns, row_step);
    if (!in_range(grad.all) || !in_range(v.all)) return false;
    multiply(1, head.input(0), pulls);
    if (p.shares) {
      softmax_backward(head.shares(), scores, pulls, count, columns, p.scale);
    } else {
      if (!find_scores(head.input(1))) return false;
      float lse[BLOCK];
      for (int i = 0; i < columns; ++i) lse[i] = head.lse()[i < count ? i : count - 1];  // as columns past `count` hold the last query again
      shares_again(scores, count, columns, lse);
      softmax_backward(scores, scores, pulls, count, columns, p.scale);
    }
    const Factor<Pair> by_key = {a, columns / 2, 1}, by_query = {a, 1, columns};
    head.expect(head.input(1));
    const Norms grads = pairs_of_rows(head.gradient(), count, width, b, column_step);
    const float weights = pairs_of_neighbours(scores, count, columns, a, row_step).all;
    if (!give_product(by_key, weights, grads, head.found(2))) return false;
    head.expect(head.gradient(), p.width);
    const Norms q = pairs_of_rows(head.input(0), count, width, b, column_step);
    const float dscores = pairs_of_neighbours(pulls, count, columns, a, row_step).all;  // of P (dP - mean): dP may be far larger than their difference
    if (!(ERROR * grad.longest * v.longest * weights * std::abs(p.scale) <= 2 * CLOSE * dscores)) return false;
    if (!give_product(by_key, dscores, q, head.found(1))) return false;
    head.expect(head.input(2), p.stride[3]);
    const Norms k = pairs_of_rows(head.input(1), count, width, b, column_step);
    pairs_of_rows(rows(pulls), count, columns, a, row_step);
    return give_product(by_query, dscores, k, head.found(0));
  }

 private:
  // Whether a factor of this norm can be trusted: zeros, or large enough for lines below LEAST not to matter. Not NaN.
  static bool in_range(float norm) { return norm == 0 || (norm >= 1e-13f && norm <= 1e10f); }

  // scale K Q^T to scores, [count, columns].
  bool find_scores(Rows<const bfloat16> next) {
    const Norms q = transposed_pairs(head.input(0), count, width, b, columns, column_step);
    const Norms k = transposed_pairs(head.input(1), count, width, a, columns, row_step);
    if (!in_range(q.all) || !in_range(k.all) || !(q.longest * k.longest * std::abs(p.scale) <= SHARPEST)) return false;
    multiply(p.scale, next, scores);
    return true;
  }

  // scale a^T b to `to`, [count, columns]; rows `next` are asked for before.
  void multiply(float scale, Rows<const bfloat16> next, float* to) {
    head.expect(next);
    product_by_rows(count, columns, width / 2, Factor<Pair>{a, 1, columns}, b, columns, space,
                    [&](int j, const int32_t* sums) { give(sums, row_step[j] * scale, column_step, to + j * columns, columns); });
  }

  // The GEMM with b to rows of a tensor. Whether it is large enough beside its factors' norms for the error of their rounding.
  bool give_product(Factor<Pair> factor, float norm, Norms right, Rows<bfloat16> to) {
    if (!in_range(norm) || !in_range(right.all)) return false;
    vec squares = {};
    head.expect(to);
    product_by_rows(count, width, (count + 1) / 2, factor, b, width, space,
                    [&](int i, const int32_t* sums) { squares += give(sums, row_step[i], column_step, to[i], width); });
    return ERROR * norm * right.all <= CLOSE * std::sqrt(sum(squares));
  }

  Rows<const float> rows(const float* matrix) const { return {matrix, columns, nullptr}; }

  const Head<bfloat16>& head;
  const AttentionParams& p = head.p;
  const int count = head.count, width = head.width, columns = padded(count), widest = width > BLOCK ? width : BLOCK;
  Room memory{scratch((4 * columns + width + widest) / 2 * columns + (MR + 2) * widest)};
  float *scores = memory.take<float>(columns * columns), *pulls = memory.take<float>(columns * columns);
  // Factors of one GEMM after the other, in the first-level cache.
  Pair *a = memory.take<Pair>(columns / 2 * widest), *b = memory.take<Pair>(columns / 2 * width);
  int32_t* space = memory.take<int32_t>(MR * widest);
  float *row_step = memory.take<float>(widest), *column_step = memory.take<float>(widest);
};

inline bool forward_in_pairs(const Head<bfloat16>& head) { return HeadInIntegers::may_take(head) && HeadInIntegers(head).forward(); }
inline bool backward_in_pairs(const Head<bfloat16>& head) { return HeadInIntegers::may_take(head) && HeadInIntegers(head).backward(); }
#endif

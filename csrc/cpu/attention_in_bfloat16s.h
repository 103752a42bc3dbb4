// A head in bfloat16 whose queries are one block, on a processor that multiplies pairs of bfloat16s and adds them to floats (AVX-512 BF16). GEMM
// factors that are tensors are used as they are; P and dS are rounded to bfloat16. For dQ dS is the sum of two bfloat16s: the sum of dS over keys is
// zero, that of dS rounded is not, and keys may be far from zero. Scores, softmax and its gradient are floats.
#pragma once

#include "head.h"
#include "softmax.h"

#if defined(SMI_BFLOAT16_PRODUCTS)

class HeadInBfloat16s {
 public:
  explicit HeadInBfloat16s(const Head<bfloat16>& head) : head(head) {}

  static bool may_take(const Head<bfloat16>& head) { return head.count <= BLOCK; }

  void forward() {
    float inverse[BLOCK];
    multiply(head.input(1), head.input(0), p.scale, scores, head.input(2));
    softmax(scores, count, columns, count, inverse, p.shares ? head.shares() : nullptr, p.lse ? head.lse() : nullptr);
    pairs_of_rows(scores);
    pairs_of_rows(head.input(2));
    head.expect(head.input(0), p.stride[3]), head.expect(head.input(1), p.stride[3]);
    give_product({a, 1, columns}, half, head.output(), inverse);
  }

  void backward() {
    multiply(head.input(2), head.gradient(), 1, pulls, head.input(0));
    if (p.shares) {
      softmax_backward(head.shares(), scores, pulls, count, columns, p.scale);
    } else {
      float lse[BLOCK];
      multiply(head.input(1), head.input(0), p.scale, scores, head.input(1));
      for (int i = 0; i < columns; ++i) lse[i] = head.lse()[i < count ? i : count - 1];  // as columns past `count` hold the last query again
      shares_again(scores, count, columns, lse);
      softmax_backward(scores, scores, pulls, count, columns, p.scale);
    }
    const Factor<Pair> by_key = {a, columns / 2, 1};
    head.expect(head.input(1));
    pairs_of_neighbours(scores);
    pairs_of_rows(head.gradient());
    give_product(by_key, half, head.found(2));
    head.expect(head.gradient(), p.width);
    pairs_of_neighbours(pulls);
    pairs_of_rows(head.input(0));
    give_product(by_key, half, head.found(1));
    head.expect(head.input(2), p.stride[3]);
    numbers_in_two_parts(pulls);
    numbers_twice(head.input(1));
    give_product({a, 1, columns}, count, head.found(0));
  }

 private:
  // scale left right^T to `to`, [count, columns]; columns past `count` hold the last one again. Rows `next` are asked for before.
  void multiply(Rows<const bfloat16> left, Rows<const bfloat16> right, float scale, float* to, Rows<const bfloat16> next) {
    for (int t = 0; t < columns; t += 8) {
      const bfloat16* row[8];
      for (int i = 0; i < 8; ++i) row[i] = right[t + i < count ? t + i : count - 1];
      for (int d = 0; d < width / 2; d += 8) {
        __m256 block[8];
        for (int i = 0; i < 8; ++i) block[i] = __m256(_mm256_maskz_loadu_epi16(__mmask16(first(p.width - 2 * d)), row[i] + 2 * d));
        transpose_8x8(block);
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(reinterpret_cast<float*>(b + (d + i) * columns + t), block[i]);
      }
    }
    for (int t = 0; t < count; ++t)
      for (int d = 0; d < width; d += NR) store(a + (t * width + d) / 2, some(left[t] + d, d));
    head.expect(next);
    product_by_rows(count, columns, width / 2, Factor<Pair>{a, width / 2, 1}, b, columns, space, [&](int t, const float* sums) {
      for (int i = 0; i < columns; i += V) store(to + t * columns + i, load(sums + i) * scale);
    });
  }

  // The GEMM with b, of `pairs` pairs, to rows of a tensor, times `factors` where there are any.
  void give_product(Factor<Pair> factor, int depth, Rows<bfloat16> to, const float* factors = nullptr) {
    head.expect(to);
    product_by_rows(count, width, depth, factor, b, width, space,
                    [&](int t, const float* sums) { head.give(sums, factors ? factors[t] : 1, to[t]); });
  }

  // Rows of a tensor as pairs of one above the other, [half, width], to b.
  void pairs_of_rows(Rows<const bfloat16> from) {
    for (int t = 0; t < count; t += 2)
      for (int d = 0; d < width; d += NR) {
        const ivec one = some(from[t] + d, d), other = t + 1 < count ? some(from[t + 1] + d, d) : ivec{};
        store(b + t / 2 * width + d, upright<0>(one, other));
        store(b + t / 2 * width + d + V, upright<1>(one, other));
      }
  }

  // Rows of a tensor with every number twice, [count, width], to b.
  void numbers_twice(Rows<const bfloat16> from) {
    for (int t = 0; t < count; ++t)
      for (int d = 0; d < width; d += V) {
        const uvec once = __builtin_convertvector(hvec(_mm256_maskz_loadu_epi16(__mmask16(first(p.width - d)), from[t] + d)), uvec);
        store(b + t * width + d, ivec(once | once << 16));
      }
  }

  // Rows [count, columns] of floats, every number as a pair of what is left of it in a bfloat16 and the rest, to a.
  void numbers_in_two_parts(const float* from) {
    for (int i = 0; i < count * columns; i += V) {
      const vec x = load(from + i), most = vec(uvec(x) & 0xffff0000u);
      store(a + i, upright(rounded_pairs(most, x - most)));
    }
  }

  // Rows [count, columns] of floats as pairs of one above the other, [half, columns], to a.
  void pairs_of_rows(const float* from) {
    for (int t = 0; t < count; t += 2)
      for (int i = 0; i < columns; i += V) {
        const float* at = from + t * columns + i;
        store(a + t / 2 * columns + i, upright(rounded_pairs(load(at), t + 1 < count ? load(at + columns) : vec{})));
      }
  }

  // Rows [count, columns] of floats as pairs of neighbours, [count, columns / 2], to a.
  void pairs_of_neighbours(const float* from) {
    for (int i = 0; i < count * columns; i += NR) store(a + i / 2, rounded_pairs(load(from + i), load(from + i + V)));
  }

  static int whole_vectors(int64_t x) { return int((x + V - 1) / V * V); }
  static uint32_t first(int64_t some) { return some >= 32 ? ~0u : some > 0 ? (1u << some) - 1 : 0; }

  // 2 V numbers of a row from its element d on, zeros past D. Where the second half of them is past the end of a row of a or b, the next row replaces it,
  // or there is room.
  ivec some(const bfloat16* from, int d) const { return ivec(_mm512_maskz_loadu_epi16(first(p.width - d), from)); }

  const Head<bfloat16>& head;
  const AttentionParams& p = head.p;
  const int count = head.count, half = (count + 1) / 2, width = whole_vectors(p.width), columns = whole_vectors(count);
  const int widest = width > columns ? width : columns;
  Room memory{scratch((2 * columns + width + widest) * columns + MR * widest + 2 * V)};
  float *scores = memory.take<float>(columns * columns), *pulls = memory.take<float>(columns * columns);
  // Factors of one GEMM after the other, in the first-level cache.
  Pair *a = memory.take<Pair>(columns * widest + V), *b = memory.take<Pair>(columns * width + V);
  float* space = memory.take<float>(MR * widest);
};

inline bool forward_in_pairs(const Head<bfloat16>& head) {
  if (!HeadInBfloat16s::may_take(head)) return false;
  HeadInBfloat16s(head).forward();
  return true;
}

inline bool backward_in_pairs(const Head<bfloat16>& head) {
  if (!HeadInBfloat16s::may_take(head)) return false;
  HeadInBfloat16s(head).backward();
  return true;
}
#endif

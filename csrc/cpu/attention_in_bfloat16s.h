// A head in bfloat16 on a processor that multiplies pairs of bfloat16s and adds them to floats (AVX-512 BF16, AMX). GEMM factors that are tensors are
// used as they are; P and dS are rounded to bfloat16. For dQ dS is the sum of two bfloat16s: the sum of dS over keys is zero, that of dS rounded is not,
// and keys may be far from zero. Scores, softmax and its gradient are floats.
//
// Scores are [keys, queries], of BLOCK queries at a time. A left factor is rows of pairs of neighbours, a right one pairs of a row and the one below it;
// both are padded with zeros along their common side to whole steps of the tile unit. What must be transposed is transposed as pairs, 16 x 16 at a time.
#pragma once

#include "head.h"
#include "softmax.h"
#include "tiles.h"

#if defined(SMI_BFLOAT16_PRODUCTS)

// The GEMMs of a head: c[rows, columns] = a[rows, pairs] b[pairs, columns], or added to c. columns: a multiple of V. What is past `rows` in the last 16
// of a may be anything, and so is c then; zeros are past `pairs` in the last 16.
struct GemmByPairs {
  template <bool ADD>
  static void multiply(int rows, int columns, int pairs, const Pair* a, int lda, const Pair* b, int ldb, float* c) {
    product<ADD>(rows, columns, pairs, Factor<Pair>{a, lda, 1}, b, ldb, c, columns);
  }
};

#if defined(SMI_TILES)
class GemmByTiles {
 public:
  GemmByTiles() { tiles::configure(); }
  ~GemmByTiles() { tiles::release(); }
  GemmByTiles(const GemmByTiles&) = delete;
  GemmByTiles& operator=(const GemmByTiles&) = delete;

  template <bool ADD>
  static void multiply(int rows, int columns, int pairs, const Pair* a, int lda, const Pair* b, int ldb, float* c) {
    for (int i = 0; i < rows; i += 2 * SIDE)
      for (int j = 0; j < columns; j += 2 * SIDE) {
        const Pair* left = a + i * lda;
        float* sums = c + i * columns + j;
        const bool tall = i + SIDE < rows, wide = j + SIDE < columns;
        if (tall && wide) block<2, 2, ADD>(pairs, left, lda, b + j, ldb, sums, columns);
        else if (tall) block<2, 1, ADD>(pairs, left, lda, b + j, ldb, sums, columns);
        else if (wide) block<1, 2, ADD>(pairs, left, lda, b + j, ldb, sums, columns);
        else block<1, 1, ADD>(pairs, left, lda, b + j, ldb, sums, columns);
      }
  }

 private:
  static constexpr int SIDE = tiles::SIDE;

  // R x C tiles of sums, 0 to 3; rows of a in tiles 4 and 5, of b in 6 and 7.
  template <int R, int C, bool ADD>
  static void block(int pairs, const Pair* a, int lda, const Pair* b, int ldb, float* c, int ldc) {
    using namespace tiles;
    const ptrdiff_t left = lda * sizeof(Pair), right = ldb * sizeof(Pair), sums = ldc * sizeof(float);
    float* below = c + SIDE * ldc;
    if constexpr (ADD) tiles::load<0>(c, sums);
    else zero<0>();
    if constexpr (C == 2 && ADD) tiles::load<1>(c + SIDE, sums);
    else if constexpr (C == 2) zero<1>();
    if constexpr (R == 2 && ADD) tiles::load<2>(below, sums);
    else if constexpr (R == 2) zero<2>();
    if constexpr (R == 2 && C == 2 && ADD) tiles::load<3>(below + SIDE, sums);
    else if constexpr (R == 2 && C == 2) zero<3>();
    for (int k = 0; k < pairs; k += SIDE, a += SIDE, b += SIDE * ldb) {
      tiles::load<4>(a, left), tiles::load<6>(b, right);
      tiles::multiply_add<0, 4, 6>();
      if constexpr (C == 2) tiles::load<7>(b + SIDE, right), tiles::multiply_add<1, 4, 7>();
      if constexpr (R == 2) tiles::load<5>(a + SIDE * lda, left), tiles::multiply_add<2, 5, 6>();
      if constexpr (R == 2 && C == 2) tiles::multiply_add<3, 5, 7>();
    }
    tiles::store<0>(c, sums);
    if constexpr (C == 2) tiles::store<1>(c + SIDE, sums);
    if constexpr (R == 2) tiles::store<2>(below, sums);
    if constexpr (R == 2 && C == 2) tiles::store<3>(below + SIDE, sums);
  }
};
#endif

template <class Gemm>
class HeadInBfloat16s {
 public:
  explicit HeadInBfloat16s(const Head<bfloat16>& head) : head(head) {}

  void forward() {
    float inverse[BLOCK];
    numbers(head.input(1), keys);
    for (first = 0; first < count; first += most) {
      begin_block();
      transposed_pairs(head.input(0), b);
      if (first == 0) head.expect(head.input(2));
      gemm.template multiply<false>(count, columns, half_width, keys, half_width, b, columns, scores);
      softmax(scores, count, columns, block, inverse, p.shares ? head.shares() : nullptr, p.lse ? head.lse() + first : nullptr, p.scale);
      if (first == 0) pairs_of_rows(head.input(2), 0, count, values);
      transposed_shares();
      if (last()) head.expect(head.input(0), p.stride[3]), head.expect(head.input(1), p.stride[3]);
      gemm.template multiply<false>(block, width, (count + 1) / 2, a, half_tokens, values, width, space);
      for (int i = 0; i < block; ++i) head.give(space + i * width, inverse[i], head.output()[first + i]);
    }
  }

  void backward() {
    numbers(head.input(2), values);
    if (!p.shares) numbers(head.input(1), keys);
    for (first = 0; first < count; first += most) {
      begin_block();
      transposed_pairs(head.gradient(), b);
      if (first == 0) head.expect(head.input(0)), head.expect(head.input(1));
      gemm.template multiply<false>(count, columns, half_width, values, half_width, b, columns, pulls);
      weights_and_their_gradient();
      const int queries = (block + 1) / 2;
      numbers_of_rows(scores);
      pairs_of_rows(head.gradient(), first, block, b);
      add(queries, dv);
      numbers_of_rows(pulls);
      pairs_of_rows(head.input(0), first, block, b);
      add(queries, dk);
      if (first == 0) numbers_twice(head.input(1), twice);
      transposed_in_two_parts();
      if (last()) head.expect(head.gradient(), p.width), head.expect(head.input(2), p.stride[3]);
      gemm.template multiply<false>(block, width, count, a, tokens, twice, width, space);
      for (int i = 0; i < block; ++i) head.give(space + i * width, 1, head.found(0)[first + i]);
    }
    for (int t = 0; t < count; ++t) {
      head.give(dk + t * width, 1, head.found(1)[t]);
      head.give(dv + t * width, 1, head.found(2)[t]);
    }
  }

 private:
  void begin_block() {
    block = count - first < most ? count - first : most;
    columns = whole<V>(block);
  }
  bool last() const { return first + most >= count; }

  // P to `scores` and scale * dS to `pulls`, of dP.
  void weights_and_their_gradient() {
    if (p.shares) return softmax_backward(head.shares(), scores, pulls, count, columns, p.scale);
    float lse[BLOCK];
    transposed_pairs(head.input(0), b);
    gemm.template multiply<false>(count, columns, half_width, keys, half_width, b, columns, scores);
    for (int i = 0; i < columns; ++i) lse[i] = head.lse()[first + (i < block ? i : block - 1)];  // as columns past `block` hold its last query again
    shares_again(scores, count, columns, lse, p.scale);
    softmax_backward(scores, scores, pulls, count, columns, p.scale);
  }

  // a b, of so many pairs of queries, to the sums of all blocks.
  void add(int queries, float* sums) {
    const int row = whole<2 * V>(block) / 2;
    if (first == 0) gemm.template multiply<false>(count, width, queries, a, row, b, width, sums);
    else gemm.template multiply<true>(count, width, queries, a, row, b, width, sums);
  }

  // All rows of a tensor, [count, half_width] pairs of neighbours.
  void numbers(Rows<const bfloat16> from, Pair* to) const {
    const auto [count, width, real] = sizes();
    for (int t = 0; t < count; ++t)
      for (int d = 0; d < width; d += 2 * V) store(to + (t * width + d) / 2, some(from[t] + d, real - d));
  }

  // The block's rows of a tensor, turned: pairs [half_width, columns]; columns past `block` hold the last one again.
  void transposed_pairs(Rows<const bfloat16> from, Pair* to) const {
    const auto [count, width, real] = sizes();
    const int first = this->first, block = this->block, columns = this->columns;
    for (int t = 0; t < columns; t += V)
      for (int d = 0; d < width; d += 2 * V) {
        ivec rows[V];
        for (int i = 0; i < V; ++i) rows[i] = some(from[first + (t + i < block ? t + i : block - 1)] + d, real - d);
        transpose_16x16(rows);
        for (int i = 0; i < V; ++i) store(to + (d / 2 + i) * columns + t, rows[i]);
      }
  }

  // `rows` rows of a tensor as pairs of one above the other, [rows / 2, width].
  void pairs_of_rows(Rows<const bfloat16> from, int begin, int rows, Pair* to) const {
    const auto [count, width, real] = sizes();
    for (int t = 0; t < whole<2 * V>(rows); t += 2)
      for (int d = 0; d < width; d += NR) {
        const ivec one = t < rows ? some(from[begin + t] + d, real - d) : ivec{};
        const ivec other = t + 1 < rows ? some(from[begin + t + 1] + d, real - d) : ivec{};
        store(to + t / 2 * width + d, upright<0>(one, other));
        store(to + t / 2 * width + d + V, upright<1>(one, other));
      }
  }

  // All rows of a tensor with every number twice, [tokens, width].
  void numbers_twice(Rows<const bfloat16> from, Pair* to) const {
    const auto [count, width, real] = sizes();
    for (int t = 0; t < whole<V>(count); ++t)
      for (int d = 0; d < width; d += NR) {
        const ivec row = t < count ? some(from[t] + d, real - d) : ivec{};
        store(to + t * width + d, upright<0>(row, row));
        store(to + t * width + d + V, upright<1>(row, row));
      }
  }

  // Unnormalised weights, turned, to a: [columns, half_tokens] pairs of neighbours.
  void transposed_shares() {
    const int count = this->count, half_tokens = this->half_tokens, columns = this->columns;
    const float* scores = this->scores;
    Pair* a = this->a;
    for (int t = 0; t < half_tokens; t += V)
      for (int j = 0; j < columns; j += V) {
        ivec pairs[V];
        for (int i = 0; i < V; ++i) {
          const int row = 2 * (t + i);
          const float* at = scores + row * columns + j;
          pairs[i] = row < count ? upright(rounded_pairs(load(at), row + 1 < count ? load(at + columns) : vec{})) : ivec{};
        }
        transpose_16x16(pairs);
        for (int i = 0; i < V; ++i) store(a + (j + i) * half_tokens + t, pairs[i]);
      }
  }

  // Gradients of scores, turned, to a: [columns, tokens], each as a pair of what is left of it in a bfloat16 and the rest.
  void transposed_in_two_parts() {
    const int count = this->count, tokens = this->tokens, columns = this->columns;
    const float* pulls = this->pulls;
    Pair* a = this->a;
    for (int t = 0; t < tokens; t += V)
      for (int j = 0; j < columns; j += V) {
        ivec pairs[V] = {};
        for (int i = 0; i < V && t + i < count; ++i) {
          const vec x = load(pulls + (t + i) * columns + j), most = vec(uvec(x) & 0xffff0000u);
          pairs[i] = upright(rounded_pairs(most, x - most));
        }
        transpose_16x16(pairs);
        for (int i = 0; i < V; ++i) store(a + (j + i) * tokens + t, pairs[i]);
      }
  }

  // Rows [count, columns] of floats to a: pairs of neighbours, rows padded to whole steps.
  void numbers_of_rows(const float* from) {
    const int row = whole<2 * V>(block), count = this->count, columns = this->columns;
    Pair* a = this->a;
    for (int t = 0; t < count; ++t)
      for (int j = 0; j < row; j += 2 * V) {
        const float* at = from + t * columns + j;
        store(a + (t * row + j) / 2, rounded_pairs(load(at), j + V < columns ? load(at + V) : vec{}));
      }
  }

  template <int STEP>
  static int whole(int64_t x) {
    return int((x + STEP - 1) / STEP * STEP);
  }
  static uint32_t first_of(int64_t some) { return some >= 32 ? ~0u : some > 0 ? (1u << some) - 1 : 0; }

  // 2 V numbers, zeros past the first `rest`.
  static ivec some(const bfloat16* from, int rest) { return ivec(_mm512_maskz_loadu_epi16(first_of(rest), from)); }

  // Copies: the compiler cannot know that a Pair that is stored is not one of them.
  struct Sizes {
    int count, width, real;
  };
  Sizes sizes() const { return {count, width, int(p.width)}; }

  const Gemm gemm{};
  const Head<bfloat16>& head;
  const AttentionParams& p = head.p;
  const int count = head.count, tokens = whole<V>(count), half_tokens = whole<2 * V>(count) / 2, width = whole<NR>(p.width), half_width = width / 2;
  const int blocks = (tokens + BLOCK - 1) / BLOCK, most = blocks > 0 ? whole<V>((count + blocks - 1) / blocks) : 0;  // queries of a block, at most
  int first = 0, block = 0, columns = 0;  // of the block at hand
  const int most_pairs = whole<2 * V>(most) / 2;
  Room memory{scratch(tokens * (4 * width + half_width + 2 * most) + 4 * half_tokens * most_pairs + (most_pairs + most) * width)};
  Pair *keys = memory.take<Pair>(tokens * half_width), *values = memory.take<Pair>(tokens * width), *twice = memory.take<Pair>(tokens * width);
  float *dk = memory.take<float>(tokens * width), *dv = memory.take<float>(tokens * width);
  float *scores = memory.take<float>(tokens * most), *pulls = memory.take<float>(tokens * most);
  Pair *a = memory.take<Pair>(4 * half_tokens * most_pairs), *b = memory.take<Pair>(most_pairs * width);
  float* space = memory.take<float>(most * width);
};

template <class Body>
inline bool in_bfloat16s(const Head<bfloat16>& head, Body body) {
#if defined(SMI_TILES)
  if (tiles::allowed()) return body(HeadInBfloat16s<GemmByTiles>(head)), true;
#endif
  return body(HeadInBfloat16s<GemmByPairs>(head)), true;
}

inline bool forward_in_pairs(const Head<bfloat16>& head) {
  return in_bfloat16s(head, [](auto&& one) { one.forward(); });
}

inline bool backward_in_pairs(const Head<bfloat16>& head) {
  return in_bfloat16s(head, [](auto&& one) { one.backward(); });
}
#endif

// One head of one image, and its rows: copied as floats, transposed, prefetched, written back.
#pragma once

#include "attention.h"
#include "product.h"

constexpr int BLOCK = (ONE_BLOCK + NR - 1) / NR * NR;  // queries whose scores are held at a time, at most

inline int padded(int64_t x) { return int((x + NR - 1) / NR * NR); }

// Rows of D numbers in tensors, a fixed distance apart, or those of them that an index names.
template <class T>
struct Rows {
  T* at;
  int64_t stride;
  const int64_t* index;
  T* operator[](int64_t t) const { return at + (index ? index[t] : t) * stride; }
};

// One head of one image.
template <class T>
struct Head {
  const AttentionParams& p;
  int64_t b, h;
  int count, width;  // real tokens; D, padded to whole tiles
  const int64_t* index;

  Head(const AttentionParams& p, int64_t task)
      : p(p), b(task / p.heads), h(task % p.heads), count(int(p.lengths ? p.lengths[b] : p.n)), width(padded(p.width)),
        index(p.index ? p.index + b * p.n : nullptr) {}

  Rows<const T> input(int j) const {
    return {static_cast<const T*>(p.qkv) + b * p.stride[0] + j * p.stride[2] + h * p.stride[3], p.stride[1], index};
  }
  Rows<const T> gradient() const { return {static_cast<const T*>(p.grad) + merged(), p.heads * p.width, nullptr}; }
  Rows<T> output() const { return {static_cast<T*>(p.out) + merged(), p.heads * p.width, nullptr}; }
  Rows<T> found(int j) const { return {static_cast<T*>(p.dqkv) + ((b * p.rows * 3 + j) * p.heads + h) * p.width, 3 * p.heads * p.width, index}; }
  int64_t merged() const { return (b * p.n * p.heads + h) * p.width; }
  float* lse() const { return p.lse + (b * p.heads + h) * p.n; }

  // Unnormalised softmax weights, [count, columns], if they are saved: at most padded(count) columns.
  T* shares() const { return static_cast<T*>(p.shares) + (b * p.heads + h) * p.n * padded(p.n); }

  // Prefetches rows that will be copied soon: of this head, or of the next, `next` numbers further.
  void expect(Rows<const T> from, int64_t next = 0) const {
    if (!next || h + 1 < p.heads) ask<0>(from, next);
  }

  // Prefetches rows that will be written soon.
  void expect(Rows<T> to) const { ask<1>(to, 0); }

  template <int WRITE, class U>
  void ask(Rows<U> rows, int64_t next) const {
    for (int t = 0; t < count; ++t) {
      const char* row = reinterpret_cast<const char*>(rows[t] + next);
      for (int64_t byte = 0; byte < p.width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(row + byte, WRITE);
    }
  }

  // Rows first, first + 1, ... as floats [rows, width], zeros past D: copied to `to`.
  Left copied(Rows<const T> from, int first, int rows, float* to) const {
    const int real = int(p.width), all = width;  // copies: the compiler cannot know that `to` is not one of them
    float* at = to;
    for (int t = first; t < first + rows; ++t, at += all) {
      const T* row = from[t];
      int d = 0;
      for (; d + NR <= real; d += NR) store(at + d, load(row + d), load(row + d + V));
      for (; d + V <= real; d += V) store(at + d, load(row + d));
      for (; d < real; ++d) at[d] = to_float(row[d]);
      for (; d < all; ++d) at[d] = 0;
    }
    return {to, width, 1};
  }

  // The same, read where they lie if they can be: float32, whole tiles, rows a fixed distance apart.
  Left read(Rows<const T> from, int first, int rows, float* to) const {
    const bool there = sizeof(T) == sizeof(float) && width == p.width && !from.index;
    return there ? Left{reinterpret_cast<const float*>(from[first]), ptrdiff_t(from.stride), 1} : copied(from, first, rows, to);
  }

  // A row of sums, times factor.
  void give(const float* from, float factor, T* to) const {
    const int real = int(p.width);
    int d = 0;
    for (; d + NR <= real; d += NR) store(to + d, load(from + d) * factor, load(from + d + V) * factor);
    for (; d + V <= real; d += V) store(to + d, load(from + d) * factor);
    for (; d < real; ++d) from_float(to + d, from[d] * factor);
  }
};

#if defined(__AVX2__)
inline void transpose_8x8(__m256* r) {
  __m256 s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = s[i];
}
#endif

// factor times x [rows, width], transposed to [width, columns]; columns past `rows` hold the last row again, and nobody reads their results.
inline void transpose(Left x, int rows, int width, float factor, float* to, int columns) {
  const auto row = [&](int t) { return x.at + (t < rows ? t : rows - 1) * x.row; };
#if defined(__AVX2__)
  for (int t = 0; t < columns; t += 8)
    for (int d = 0; d < width; d += 8) {
      __m256 block[8];
      for (int i = 0; i < 8; ++i) block[i] = _mm256_mul_ps(_mm256_loadu_ps(row(t + i) + d), _mm256_set1_ps(factor));
      transpose_8x8(block);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d + i) * int64_t(columns) + t, block[i]);
    }
#else
  for (int t = 0; t < columns; ++t)
    for (int d = 0; d < width; ++d) to[d * int64_t(columns) + t] = factor * row(t)[d];
#endif
}

// The same of a head's queries or gradients; `copy` has room for them.
template <class T>
inline void transposed(const Head<T>& head, Rows<const T> from, int first, int rows, float factor, float* copy, float* to, int columns) {
  transpose(head.read(from, first, rows, copy), rows, head.width, factor, to, columns);
}

#if defined(__AVX2__)
// Two neighbours are moved as one number and parted afterwards.
inline void transposed(const Head<bfloat16>& head, Rows<const bfloat16> from, int first, int rows, float factor, float* copy, float* to,
                       int columns) {
  if (head.width != head.p.width) return transposed<bfloat16>(head, from, first, rows, factor, copy, to, columns);
  const __m256 upper = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000)));
  for (int t = 0; t < columns; t += 8) {
    const bfloat16* row[8];
    for (int i = 0; i < 8; ++i) row[i] = from[first + (t + i < rows ? t + i : rows - 1)];
    for (int d = 0; d < head.width; d += 16) {
      __m256 pairs[8];
      for (int i = 0; i < 8; ++i) pairs[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(row[i] + d));
      transpose_8x8(pairs);
      for (int i = 0; i < 8; ++i) {
        float* at = to + (d + 2 * i) * int64_t(columns) + t;
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs[i]), 16)), odd = _mm256_and_ps(pairs[i], upper);
        _mm256_storeu_ps(at, _mm256_mul_ps(even, _mm256_set1_ps(factor)));
        _mm256_storeu_ps(at + columns, _mm256_mul_ps(odd, _mm256_set1_ps(factor)));
      }
    }
  }
}
#endif

// Whether GEMMs on pairs of 16-bit numbers, which some processors have for bfloat16, did it; where they did not, nothing that was written counts.
template <class T>
bool forward_in_pairs(const Head<T>&) {
  return false;
}
template <class T>
bool backward_in_pairs(const Head<T>&) {
  return false;
}

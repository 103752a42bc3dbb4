// Attention, a head at a time: everything a head needs lies in a core's own cache, scores for BLOCK queries at a time. The mathematics are in
// kernels/attention/README.md.
#include <cmath>

#include "attention.h"
#include "product.h"

namespace {

using Params = AttentionParams;

constexpr float LOG2E = 1.44269504f;
constexpr int BLOCK = (ONE_BLOCK + NR - 1) / NR * NR;  // queries whose scores are held at a time, at most

inline int padded(int64_t x) { return int((x + NR - 1) / NR * NR); }

// Queries of a block: whole panels of columns, as many in each block, so that no short one is left over.
inline int block_of(int count) {
  const int panels = padded(count > 0 ? count : 1) / NR, most = BLOCK / NR, blocks = (panels + most - 1) / most;
  return (panels + blocks - 1) / blocks * NR;
}

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
  const Params& p;
  int64_t b, h;
  int count, width;  // real tokens; D, padded to whole tiles
  const int64_t* index;

  Head(const Params& p, int64_t task)
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

  // Shares of the softmax before their division by their sum, [count, padded(count)], if they are kept.
  T* shares() const { return static_cast<T*>(p.shares) + (b * p.heads + h) * p.n * padded(p.n); }

  // Asks for rows that will be copied soon: of this head, or of the next, `next` numbers further.
  void expect(Rows<const T> from, int64_t next = 0) const {
    if (next && h + 1 == p.heads) return;
    for (int t = 0; t < count; ++t) {
      const char* row = reinterpret_cast<const char*>(from[t] + next);
      for (int64_t byte = 0; byte < p.width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(row + byte);
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

// Where all queries are one block, one after the other of a head's matrices is taken to the same memory when it is needed: what a product reads and
// writes then fits into the first-level cache.
template <class T>
void forward_head(const Params& params, int64_t task) {
  Head<T> head(params, task);
  const int count = head.count, width = head.width, size = block_of(count);
  const bool once = count <= size;
  const size_t whole = size_t(count) * width, part = size_t(size) * width;
  float* qt = scratch(2 * whole + 2 * part + size_t(count) * size + MR * width);
  float *weights = qt + part, *space = weights + size_t(count) * size, *k = space + MR * width, *v = once ? k : k + whole, *q = once ? k : v + whole;
  float inverse[BLOCK];
  Left keys;
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transposed(head, head.input(0), first, block, params.scale, q, qt, columns);
    if (first == 0) keys = head.read(head.input(1), 0, count, k);
    if (first == 0) head.expect(head.input(2));
    product<false>(count, columns, width, keys, qt, columns, weights, columns);
    softmax(weights, count, columns, block, inverse, params.shares ? head.shares() : nullptr, params.lse ? head.lse() + first : nullptr);
    if (first == 0) head.copied(head.input(2), 0, count, v);
    if (once) head.expect(head.input(0), params.stride[3]), head.expect(head.input(1), params.stride[3]);
    product_by_rows(block, width, count, {weights, 1, columns}, v, width, space,
                    [&](int i, const float* sums) { head.give(sums, inverse[i], head.output()[first + i]); });
  }
  for (int t = count; t < params.n; ++t) {
    memset(head.output()[t], 0, params.width * sizeof(T));
    if (params.lse) head.lse()[t] = 0;
  }
}

// P is what forward kept, or is recomputed from lse; the sums of P dP need no output. Rows that are no token's are not touched.
template <class T>
void backward_head(const Params& params, int64_t task) {
  Head<T> head(params, task);
  const int count = head.count, width = head.width, size = block_of(count);
  const bool once = count <= size;
  const size_t whole = size_t(count) * width, part = size_t(size) * width, scores = size_t(count) * size;
  float* turned = scratch(4 * whole + 3 * part + 2 * scores + MR * width);
  float *weights = turned + part, *dscores = weights + scores, *space = dscores + scores, *grad = space + MR * width, *q = grad + part;
  float *v = q + part, *k = v + whole, *dk = k + whole, *dv = dk + whole, lse[BLOCK];
  Left values;
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transposed(head, head.gradient(), first, block, 1, grad, turned, columns);
    if (first == 0) values = head.read(head.input(2), 0, count, v);
    if (once) head.expect(head.input(0));
    product<false>(count, columns, width, values, turned, columns, dscores, columns);
    if (params.shares) {
      softmax_backward(head.shares(), weights, dscores, count, columns, params.scale);
    } else {
      transpose(head.copied(head.input(0), first, block, q), block, width, params.scale, turned, columns);
      if (first == 0) head.copied(head.input(1), 0, count, k);
      product<false>(count, columns, width, {k, width, 1}, turned, columns, weights, columns);
      for (int t = 0; t < columns; ++t) lse[t] = t < block ? head.lse()[first + t] : 0;
      softmax_backward(weights, dscores, count, columns, lse, params.scale);
    }
    head.copied(head.gradient(), first, block, grad);
    const Left p = {weights, columns, 1}, ds = {dscores, columns, 1}, turned_ds = {dscores, 1, columns};
    const auto give = [&](int j, int from) {
      return [&head, from, rows = head.found(j)](int i, const float* sums) { head.give(sums, 1, rows[from + i]); };
    };
    if (once) {
      if (params.shares) head.expect(head.input(1));
      product_by_rows(count, width, block, p, grad, width, space, give(2, 0));
      if (params.shares) head.copied(head.input(0), 0, count, q);
      head.expect(head.gradient(), params.width);
      product_by_rows(count, width, block, ds, q, width, space, give(1, 0));
      if (params.shares) {
        k = q;
        head.copied(head.input(1), 0, count, k);
      }
      head.expect(head.input(2), params.stride[3]);
      product_by_rows(count, width, count, turned_ds, k, width, space, give(0, 0));
      return;
    }
    product_by_rows(block, width, count, turned_ds, k, width, space, give(0, first));
    if (first == 0) {
      product<false>(count, width, block, ds, q, width, dk, width);
      product<false>(count, width, block, p, grad, width, dv, width);
    } else {
      product<true>(count, width, block, ds, q, width, dk, width);
      product<true>(count, width, block, p, grad, width, dv, width);
    }
  }
  for (int t = 0; t < count; ++t) {
    head.give(dk + t * width, 1, head.found(1)[t]);
    head.give(dv + t * width, 1, head.found(2)[t]);
  }
}

template <void (*HEAD)(const Params&, int64_t)>
void heads(const Params& p, Part part) {
  const int64_t first = part.first(p.batch * p.heads);
  share(part.last(p.batch * p.heads) - first, 8. * p.n * p.n * p.width, [&](int64_t begin, int64_t end) {
    for (int64_t task = first + begin; task < first + end; ++task) HEAD(p, task);
  });
}

}  // namespace

extern "C" int64_t smi_attention_shares(const Params* p) { return shares_of(*p); }

#define EXPORT(dtype, T)                                                                                                     \
  extern "C" void smi_attention_forward_##dtype(const Params* p, Part part) { heads<forward_head<T>>(*p, part); }            \
  extern "C" void smi_attention_backward_##dtype(const Params* p, Part part) { heads<backward_head<T>>(*p, part); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
EXPORT(float16, _Float16)

// Attention, a head at a time: everything a head needs lies in a core's own cache, scores for BLOCK queries at a time. kernels/attention/README.md has
// the mathematics.
#include <cmath>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "product.h"

namespace {

constexpr int BLOCK = (80 + NR - 1) / NR * NR;  // queries whose scores are held at a time, at most

struct Params {
  const void* qkv;      // element (b, t, j, h, d) at b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3] + d
  int64_t stride[4];    // in elements
  const int64_t* index; // [B, n] rows of qkv to attend among, or null: the first n
  const int64_t* lengths;  // [B], or null: all n are real
  void* out;            // [B, n, H * D]
  float* lse;           // [B, H, n]
  const void* grad;     // like out; backward only
  void* dqkv;           // [B, L, 3, H, D]; backward only
  int64_t batch, rows, n, heads, width;  // rows: L
  float scale;
};

inline int padded(int64_t x) { return int((x + NR - 1) / NR * NR); }

// Queries of a block: whole panels of columns, as many in each block, so that no short one is left over.
inline int block_of(int count) {
  const int panels = padded(count) / NR, most = BLOCK / NR, blocks = (panels + most - 1) / most;
  return (panels + blocks - 1) / blocks * NR;
}

// One head of one image.
template <class T>
struct Head {
  const Params& p;
  int64_t b, h;
  int count, width;  // real tokens; D, padded to whole tiles

  Head(const Params& p, int64_t task) : p(p), b(task / p.heads), h(task % p.heads) {
    count = int(p.lengths ? p.lengths[b] : p.n);
    width = padded(p.width);
  }

  int64_t row(int t) const { return p.index ? p.index[b * p.n + t] : t; }

  const T* input(int j, int t) const {
    return static_cast<const T*>(p.qkv) + b * p.stride[0] + row(t) * p.stride[1] + j * p.stride[2] + h * p.stride[3];
  }
  T* output(int t) const { return static_cast<T*>(p.out) + ((b * p.n + t) * p.heads + h) * p.width; }
  const T* gradient(int t) const { return static_cast<const T*>(p.grad) + ((b * p.n + t) * p.heads + h) * p.width; }
  T* found(int j, int t) const { return static_cast<T*>(p.dqkv) + (((b * p.rows + row(t)) * 3 + j) * p.heads + h) * p.width; }
  float* lse() const { return p.lse + (b * p.heads + h) * p.n; }

  // Whether results can be written where they belong by the products themselves: float32, whole tiles, rows a fixed distance apart.
  bool direct() const { return sizeof(T) == sizeof(float) && width == p.width && !p.index; }

  // A row of D numbers to `width` floats, zeros past D.
  void take(const T* from, float* to) const {
    const int real = int(p.width), all = width;  // copies: the compiler cannot know that `to` is not one of them
    int d = 0;
    for (; d + V <= real; d += V) store(to + d, load(from + d));
    for (; d < real; ++d) to[d] = to_float(from[d]);
    for (; d < all; ++d) to[d] = 0;
  }

  void give(const float* from, T* to) const {
    const int real = int(p.width);
    int d = 0;
    for (; d + V <= real; d += V) store(to + d, load(from + d));
    for (; d < real; ++d) from_float(to + d, from[d]);
  }

  // Rows first, first + 1, ... of queries, keys or values (j = 0, 1, 2) as floats [rows, width]: copied to `to`.
  Left copied(int j, int first, int rows, float* to) const {
    for (int t = 0; t < rows; ++t) take(input(j, first + t), to + t * width);
    return {to, width, 1};
  }

  // The same, read where they lie if they can be.
  Left read(int j, int first, int rows, float* to) const {
    return direct() ? Left{reinterpret_cast<const float*>(input(j, first)), ptrdiff_t(p.stride[1]), 1} : copied(j, first, rows, to);
  }
};

#if defined(__AVX2__)
inline void transpose_8x8(const float* from, int64_t ldf, float factor, float* to, int64_t ldt) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_mul_ps(_mm256_loadu_ps(from + i * ldf), _mm256_set1_ps(factor));
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
    _mm256_storeu_ps(to + i * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// factor times x [rows, width], transposed to [width, columns], zeros past `rows`.
inline void transpose(Left x, int rows, int width, float factor, float* to, int columns) {
  int t = 0;
#if defined(__AVX2__)
  for (; t + 8 <= rows; t += 8)
    for (int d = 0; d < width; d += 8) transpose_8x8(x.at + t * x.row + d, x.row, factor, to + d * int64_t(columns) + t, columns);
#endif
  for (; t < rows; ++t)
    for (int d = 0; d < width; ++d) to[d * int64_t(columns) + t] = factor * x.at[t * x.row + d];
  for (; t < columns; ++t)
    for (int d = 0; d < width; ++d) to[d * int64_t(columns) + t] = 0;
}

// Softmax down each column of scores [count, columns], and log of the sum of exponentials of the first `block` columns. Queries are columns, so that
// sums and largest values are of vectors, and no number of a vector is another's.
inline void softmax(float* scores, int count, int columns, int block, float* lse) {
  for (int j = 0; j < columns; j += V) {
    float* at = scores + j;
    vec top = load(at);
    for (int t = 1; t < count; ++t) {
      const vec x = load(at + t * columns);
      top = x > top ? x : top;
    }
    vec total = {};
    for (int t = 0; t < count; ++t) {
      const vec x = exp(load(at + t * columns) - top);  // NaN stays NaN, and makes the sum NaN
      total += x;
      store(at + t * columns, x);
    }
    const vec share = 1 / total;
    for (int t = 0; t < count; ++t) store(at + t * columns, load(at + t * columns) * share);
    for (int i = 0; i < V && j + i < block; ++i) lse[j + i] = top[i] + std::log(total[i]);
  }
}

// Scores and dP, both [count, columns], to P and scale * dS, by lse of the columns.
inline void softmax_backward(float* scores, float* pulls, int count, int columns, const float* lse, float scale) {
  for (int j = 0; j < columns; j += V) {
    float *row = scores + j, *pull = pulls + j;
    const vec shift = load(lse + j);
    vec mean = {};
    for (int t = 0; t < count; ++t) {
      const vec x = exp(load(row + t * columns) - shift);
      store(row + t * columns, x);
      mean += x * load(pull + t * columns);
    }
    for (int t = 0; t < count; ++t) store(pull + t * columns, load(row + t * columns) * (load(pull + t * columns) - mean) * scale);
  }
}

// C[count, width] = A B to rows of T `stride` apart: straight there, or through `between` and then by rows.
template <class T, class Row>
inline void product_to(const Head<T>& head, int count, int depth, Left a, const float* b, int64_t stride, float* between, Row row) {
  if (head.direct()) return product<false>(count, head.width, depth, a, b, head.width, reinterpret_cast<float*>(row(0)), stride);
  product<false>(count, head.width, depth, a, b, head.width, between, head.width);
  for (int i = 0; i < count; ++i) head.give(between + i * head.width, row(i));
}

template <class T>
void forward_head(const Params& params, int64_t task) {
  Head<T> head(params, task);
  const int count = head.count, width = head.width, size = block_of(count);
  const size_t whole = size_t(count) * width, part = size_t(size) * width;
  float* k = scratch(2 * whole + 3 * part + size_t(count) * size);
  float *v = k + whole, *q = v + whole, *qt = q + part, *out = qt + part, *weights = out + part;
  const Left keys = head.read(1, 0, count, k);
  head.copied(2, 0, count, v);
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transpose(head.read(0, first, block, q), block, width, params.scale, qt, columns);
    product<false>(count, columns, width, keys, qt, columns, weights, columns);
    softmax(weights, count, columns, block, head.lse() + first);
    product_to(head, block, count, {weights, 1, columns}, v, params.heads * params.width, out, [&](int i) { return head.output(first + i); });
  }
  for (int t = count; t < params.n; ++t) {
    memset(head.output(t), 0, params.width * sizeof(T));
    head.lse()[t] = 0;
  }
}

// P is recomputed from lse; the sums of P dP need no output. Rows that are no token's are not touched.
template <class T>
void backward_head(const Params& params, int64_t task) {
  Head<T> head(params, task);
  const int count = head.count, width = head.width, size = block_of(count);
  const size_t whole = size_t(count) * width, part = size_t(size) * width, scores = size_t(count) * size;
  float* k = scratch(4 * whole + 5 * part + 2 * scores);
  float *v = k + whole, *dk = v + whole, *dv = dk + whole, *q = dv + whole, *grad = q + part, *qt = grad + part, *gt = qt + part, *dq = gt + part;
  float *weights = dq + part, *dscores = weights + scores, lse[BLOCK];
  const Left keys = head.copied(1, 0, count, k), values = head.read(2, 0, count, v);
  const int64_t stride = 3 * params.heads * params.width;
  for (int first = 0; first < count; first += size) {
    const int block = count - first < size ? count - first : size, columns = padded(block);
    transpose(head.copied(0, first, block, q), block, width, params.scale, qt, columns);
    for (int t = 0; t < block; ++t) head.take(head.gradient(first + t), grad + t * width);
    transpose({grad, width, 1}, block, width, 1, gt, columns);
    product<false>(count, columns, width, keys, qt, columns, weights, columns);
    product<false>(count, columns, width, values, gt, columns, dscores, columns);
    for (int t = 0; t < columns; ++t) lse[t] = t < block ? head.lse()[first + t] : 0;
    softmax_backward(weights, dscores, count, columns, lse, params.scale);
    product_to(head, block, count, {dscores, 1, columns}, k, stride, dq, [&](int i) { return head.found(0, first + i); });
    if (block == count) {  // one block: its sums are the results
      product_to(head, count, block, {dscores, columns, 1}, q, stride, dk, [&](int t) { return head.found(1, t); });
      product_to(head, count, block, {weights, columns, 1}, grad, stride, dv, [&](int t) { return head.found(2, t); });
      return;
    }
    if (first == 0) {
      product<false>(count, width, block, {dscores, columns, 1}, q, width, dk, width);
      product<false>(count, width, block, {weights, columns, 1}, grad, width, dv, width);
    } else {
      product<true>(count, width, block, {dscores, columns, 1}, q, width, dk, width);
      product<true>(count, width, block, {weights, columns, 1}, grad, width, dv, width);
    }
  }
  for (int t = 0; t < count; ++t) {
    head.give(dk + t * width, head.found(1, t));
    head.give(dv + t * width, head.found(2, t));
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

#define EXPORT(dtype, T)                                                                                                     \
  extern "C" void smi_attention_forward_##dtype(const Params* p, Part part) { heads<forward_head<T>>(*p, part); }            \
  extern "C" void smi_attention_backward_##dtype(const Params* p, Part part) { heads<backward_head<T>>(*p, part); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
EXPORT(float16, _Float16)

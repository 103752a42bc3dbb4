// Attention, a head at a time: everything a head needs lies in a core's own cache, scores for BLOCK queries at a time. kernels/attention/README.md has
// the mathematics.
#include <cmath>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "product.h"

namespace {

constexpr int BLOCK = 8 * MR;  // queries whose scores are held at a time

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

// One head of one image.
template <class T>
struct Head {
  const Params& p;
  int64_t b, h;
  int count, width, tokens;  // real tokens; D and count, padded to whole tiles

  Head(const Params& p, int64_t task) : p(p), b(task / p.heads), h(task % p.heads) {
    count = int(p.lengths ? p.lengths[b] : p.n);
    width = padded(p.width);
    tokens = padded(count);
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

  // q, k and v, each [count, width].
  void take_inputs(float* q, float* k, float* v) const {
    for (int t = 0; t < count; ++t) {
      take(input(0, t), q + t * width);
      take(input(1, t), k + t * width);
      take(input(2, t), v + t * width);
    }
  }

  // factor times x [count, width], transposed to [width, tokens], zeros past count.
  void transpose(const float* x, float factor, float* to) const;
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

template <class T>
void Head<T>::transpose(const float* x, float factor, float* to) const {
  int t = 0;
#if defined(__AVX2__)
  for (; t + 8 <= count; t += 8)
    for (int d = 0; d < width; d += 8) transpose_8x8(x + t * width + d, width, factor, to + d * int64_t(tokens) + t, tokens);
#endif
  for (; t < count; ++t)
    for (int d = 0; d < width; ++d) to[d * int64_t(tokens) + t] = factor * x[t * width + d];
  for (; t < tokens; ++t)
    for (int d = 0; d < width; ++d) to[d * int64_t(tokens) + t] = 0;
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
  const int count = head.count, width = head.width, tokens = head.tokens;
  float* q = scratch(size_t(3) * count * width + size_t(width) * tokens + BLOCK * size_t(tokens + width));
  float *k = q + count * width, *v = k + count * width, *kt = v + count * width, *weights = kt + width * tokens, *out = weights + BLOCK * tokens;
  head.take_inputs(q, k, v);
  head.transpose(k, params.scale, kt);
  for (int first = 0; first < count; first += BLOCK) {
    const int block = count - first < BLOCK ? count - first : BLOCK;
    product<false>(block, tokens, width, {q + first * width, width, 1}, kt, tokens, weights, tokens);
    for (int i = 0; i < block; ++i) {
      float* row = weights + i * tokens;
      for (int t = count; t < tokens; ++t) row[t] = -INFINITY;
      vec top = load(row);
      for (int t = V; t < tokens; t += V) {
        vec x = load(row + t);
        top = x > top || x != x ? x : top;  // NaN stays NaN
      }
      const float most = largest(top);
      vec total = {};
      for (int t = 0; t < tokens; t += V) {
        vec x = exp(load(row + t) - most);
        total += x;
        store(row + t, x);
      }
      const float all = sum(total), share = 1 / all;
      for (int t = 0; t < tokens; t += V) store(row + t, load(row + t) * share);
      head.lse()[first + i] = most + std::log(all);
    }
    product_to(head, block, count, {weights, tokens, 1}, v, params.heads * params.width, out, [&](int i) { return head.output(first + i); });
  }
  for (int t = count; t < params.n; ++t) {
    memset(head.output(t), 0, params.width * sizeof(T));
    head.lse()[t] = 0;
  }
}

// P is recomputed from lse; rowsum(P dP) needs no output. Rows that are no token's are not touched.
template <class T>
void backward_head(const Params& params, int64_t task) {
  Head<T> head(params, task);
  const int count = head.count, width = head.width, tokens = head.tokens;
  const size_t whole = size_t(count) * width, across = size_t(width) * tokens;
  float* q = scratch(6 * whole + 2 * across + BLOCK * size_t(2 * tokens + width));
  float *k = q + whole, *v = k + whole, *grad = v + whole, *dk = grad + whole, *dv = dk + whole;
  float *kt = dv + whole, *vt = kt + across, *weights = vt + across, *dscores = weights + BLOCK * tokens, *dq = dscores + BLOCK * tokens;
  head.take_inputs(q, k, v);
  for (int t = 0; t < count; ++t) head.take(head.gradient(t), grad + t * width);
  head.transpose(k, params.scale, kt);
  head.transpose(v, 1, vt);
  const int64_t stride = 3 * params.heads * params.width;
  for (int first = 0; first < count; first += BLOCK) {
    const int block = count - first < BLOCK ? count - first : BLOCK;
    const float *queries = q + first * width, *pulls = grad + first * width;
    product<false>(block, tokens, width, {queries, width, 1}, kt, tokens, weights, tokens);
    product<false>(block, tokens, width, {pulls, width, 1}, vt, tokens, dscores, tokens);
    for (int i = 0; i < block; ++i) {
      float *row = weights + i * tokens, *pull = dscores + i * tokens;
      for (int t = count; t < tokens; ++t) row[t] = -INFINITY;
      const float shift = head.lse()[first + i];
      vec total = {};
      for (int t = 0; t < tokens; t += V) {
        vec x = exp(load(row + t) - shift);
        store(row + t, x);
        total += x * load(pull + t);
      }
      const float mean = sum(total);
      for (int t = 0; t < tokens; t += V) store(pull + t, load(row + t) * (load(pull + t) - mean) * params.scale);
    }
    product_to(head, block, count, {dscores, tokens, 1}, k, stride, dq, [&](int i) { return head.found(0, first + i); });
    if (count <= BLOCK) {  // one block: its sums are the results
      product_to(head, count, block, {dscores, 1, tokens}, queries, stride, dk, [&](int t) { return head.found(1, t); });
      product_to(head, count, block, {weights, 1, tokens}, pulls, stride, dv, [&](int t) { return head.found(2, t); });
      return;
    }
    if (first == 0) {
      product<false>(count, width, block, {dscores, 1, tokens}, queries, width, dk, width);
      product<false>(count, width, block, {weights, 1, tokens}, pulls, width, dv, width);
    } else {
      product<true>(count, width, block, {dscores, 1, tokens}, queries, width, dk, width);
      product<true>(count, width, block, {weights, 1, tokens}, pulls, width, dv, width);
    }
  }
  for (int t = 0; t < count; ++t) {
    head.give(dk + t * width, head.found(1, t));
    head.give(dv + t * width, head.found(2, t));
  }
}

template <void (*HEAD)(const Params&, int64_t)>
void all_heads(const Params& params) {
  share(params.batch * params.heads, 8. * params.n * params.n * params.width, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) HEAD(params, task);
  });
}

}  // namespace

#define EXPORT(dtype, T)                                                                                  \
  extern "C" void smi_attention_forward_##dtype(const Params* p) { all_heads<forward_head<T>>(*p); }      \
  extern "C" void smi_attention_backward_##dtype(const Params* p) { all_heads<backward_head<T>>(*p); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
EXPORT(float16, _Float16)

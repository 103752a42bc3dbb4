// Attention of a few queries among all tokens of an image, one image at a time, and the tokens that go on. kernels/cls_attention/reference.py has the
// mathematics.
#include <cmath>
#include <limits>

#include "parallel.h"
#include "vector.h"

namespace {

template <class T>
struct Params {
  const T *q, *kv;               // q: [B, P, H, D]; kv: element (b, t, j, h, d) at b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3] + d
  int64_t stride[4];
  T* out;                        // [B, P, H * D]
  float *row, *weights;          // [B, T], the mean over heads of query 0's weights; [B, H, P, T]
  const T* grad;                 // of out, or null; backward only
  const float* grad_row;         // of row, or null; backward only
  T *dq, *dkv;                   // [B, P, H, D]; [B, T, 2, H, D]; backward only
  int64_t batch, queries, tokens, heads, width;
  float scale;

  const T* input(int j, int64_t b, int64_t t, int64_t h) const { return kv + b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3]; }
  T* found(int j, int64_t b, int64_t t, int64_t h) const { return dkv + (((b * tokens + t) * 2 + j) * heads + h) * width; }
  int64_t query(int64_t b, int64_t i, int64_t h) const { return ((b * queries + i) * heads + h) * width; }  // in q, dq, out and grad
  int64_t pair(int64_t b, int64_t h, int64_t i) const { return ((b * heads + h) * queries + i) * tokens; }   // in weights
};

template <class T>
inline float dot(const T* a, const T* b, int64_t d) {
  vec total = {};
  each(d, [&](int64_t j, int some) { total += get(a + j, some) * get(b + j, some); });
  return sum(total);
}

// to = or += factor * from
template <class T>
inline void scaled(float factor, const T* from, T* to, int64_t d, bool add) {
  each(d, [&](int64_t j, int some) {
    const vec x = factor * get(from + j, some);
    put(to + j, add ? get(to + j, some) + x : x, some);
  });
}

// to = sum of weights[t] times rows t; sums of 32, then of those, which rounds less than one long sum.
template <class T>
inline void weighted_sum(const float* weights, const T* rows, int64_t stride, int64_t count, T* to, int64_t d) {
  each(d, [&](int64_t j, int some) {
    vec total = {};
    for (int64_t first = 0; first < count; first += 32) {
      vec part = {};
      for (int64_t t = first; t < count && t < first + 32; ++t) part += weights[t] * get(rows + t * stride + j, some);
      total += part;
    }
    put(to + j, total, some);
  });
}

// Scores become weights; there is room for whole vectors.
inline void softmax(float* scores, int64_t count) {
  float top = -std::numeric_limits<float>::infinity();
  double total = 0;
  for (int64_t t = 0; t < count; ++t) top = scores[t] > top ? scores[t] : top;
  for (int64_t t = 0; t < count; t += V) store(scores + t, exp(load(scores + t) - top));  // NaN stays NaN, and makes the sum NaN
  for (int64_t t = 0; t < count; ++t) total += scores[t];
  for (int64_t t = 0; t < count; ++t) scores[t] = float(scores[t] / total);
}

template <class T>
void forward_image(const Params<T>& p, int64_t b) {
  float *scores = scratch(p.tokens + V), *row = p.row + b * p.tokens;
  memset(row, 0, p.tokens * sizeof(float));
  memset(scores + p.tokens, 0, V * sizeof(float));
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i) {
      for (int64_t t = 0; t < p.tokens; ++t) scores[t] = p.scale * dot(p.q + p.query(b, i, h), p.input(0, b, t, h), p.width);
      softmax(scores, p.tokens);
      weighted_sum(scores, p.input(1, b, 0, h), p.stride[1], p.tokens, p.out + p.query(b, i, h), p.width);
      memcpy(p.weights + p.pair(b, h, i), scores, p.tokens * sizeof(float));
      if (i == 0) scaled(1.f / p.heads, scores, row, p.tokens, true);
    }
}

template <class T>
void backward_image(const Params<T>& p, int64_t b) {
  float* pulls = scratch(p.tokens);  // of the weights, then of the scores
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i) {
      const float* weights = p.weights + p.pair(b, h, i);
      const T *q = p.q + p.query(b, i, h), *grad = p.grad ? p.grad + p.query(b, i, h) : nullptr;
      double mean = 0;
      for (int64_t t = 0; t < p.tokens; ++t) {
        pulls[t] = grad ? dot(grad, p.input(1, b, t, h), p.width) : 0;
        if (p.grad_row && i == 0) pulls[t] += p.grad_row[b * p.tokens + t] / p.heads;
        mean += double(weights[t]) * pulls[t];
      }
      for (int64_t t = 0; t < p.tokens; ++t) {
        pulls[t] = weights[t] * (pulls[t] - float(mean)) * p.scale;
        scaled(pulls[t], q, p.found(0, b, t, h), p.width, i > 0);
        if (grad) scaled(weights[t], grad, p.found(1, b, t, h), p.width, i > 0);
        else memset(p.found(1, b, t, h), 0, p.width * sizeof(T));
      }
      weighted_sum(pulls, p.input(0, b, 0, h), p.stride[1], p.tokens, p.dq + p.query(b, i, h), p.width);
    }
}

template <class T, void (*IMAGE)(const Params<T>&, int64_t)>
void images(const Params<T>& p, Part part) {
  const int64_t first = part.first(p.batch);
  share(part.last(p.batch) - first, 8. * p.heads * p.queries * p.tokens * p.width, [&](int64_t begin, int64_t end) {
    for (int64_t b = first + begin; b < first + end; ++b) IMAGE(p, b);
  });
}

template <class T>
struct Tokens {
  const T* from;
  T* to;
  int64_t batch, tokens, few, width;
};

// to [B, few, d] = the first tokens of from [B, T, d].
template <class T>
void take_tokens(const Tokens<T>& p, Part part) {
  for (int64_t b = part.first(p.batch); b < part.last(p.batch); ++b)
    memcpy(p.to + b * p.few * p.width, p.from + b * p.tokens * p.width, p.few * p.width * sizeof(T));
}

// The first tokens of to [B, T, d] += from [B, few, d].
template <class T>
void add_tokens(const Tokens<T>& p, Part part) {
  for (int64_t b = part.first(p.batch); b < part.last(p.batch); ++b)
    scaled(1, p.from + b * p.few * p.width, p.to + b * p.tokens * p.width, p.few * p.width, true);
}

}  // namespace

#define EXPORT(dtype, T)                                                                                                                  \
  extern "C" void smi_cls_attention_forward_##dtype(const Params<T>* p, Part part) { images<T, forward_image<T>>(*p, part); }    \
  extern "C" void smi_cls_attention_backward_##dtype(const Params<T>* p, Part part) { images<T, backward_image<T>>(*p, part); }  \
  extern "C" void smi_take_tokens_##dtype(const Tokens<T>* p, Part part) { take_tokens(*p, part); }                              \
  extern "C" void smi_add_tokens_##dtype(const Tokens<T>* p, Part part) { add_tokens(*p, part); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)

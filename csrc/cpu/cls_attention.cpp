// Attention of a few queries among all tokens of an image, one image at a time, and the tokens that go on. kernels/cls_attention/reference.py has the
// mathematics.
#include <cmath>
#include <limits>

#include "parallel.h"
#include "vector.h"

namespace {

struct Params {
  const float *q, *kv;           // q: [B, P, H, D]; kv: element (b, t, j, h, d) at b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3] + d
  int64_t stride[4];
  float *out, *row, *weights;    // [B, P, H * D]; [B, T], the mean over heads of query 0's weights; [B, H, P, T]
  const float *grad, *grad_row;  // of out and row, or null; backward only
  float *dq, *dkv;               // [B, P, H, D]; [B, T, 2, H, D]; backward only
  int64_t batch, queries, tokens, heads, width;
  float scale;

  const float* input(int j, int64_t b, int64_t t, int64_t h) const { return kv + b * stride[0] + t * stride[1] + j * stride[2] + h * stride[3]; }
  float* found(int j, int64_t b, int64_t t, int64_t h) const { return dkv + (((b * tokens + t) * 2 + j) * heads + h) * width; }
  int64_t query(int64_t b, int64_t i, int64_t h) const { return ((b * queries + i) * heads + h) * width; }  // in q, dq, out and grad
  int64_t pair(int64_t b, int64_t h, int64_t i) const { return ((b * heads + h) * queries + i) * tokens; }   // in weights
};

inline float dot(const float* a, const float* b, int64_t d) {
  vec total = {};
  each(d, [&](int64_t j, int some) { total += get(a + j, some) * get(b + j, some); });
  return sum(total);
}

// to = or += factor * from
inline void scaled(float factor, const float* from, float* to, int64_t d, bool add) {
  each(d, [&](int64_t j, int some) {
    const vec x = factor * get(from + j, some);
    put(to + j, add ? get(to + j, some) + x : x, some);
  });
}

// to = sum of weights[t] times rows t; sums of 32, then of those, which rounds less than one long sum.
inline void weighted_sum(const float* weights, const float* rows, int64_t stride, int64_t count, float* to, int64_t d) {
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

void forward_image(const Params& p, int64_t b) {
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

void backward_image(const Params& p, int64_t b) {
  float* pulls = scratch(p.tokens);  // of the weights, then of the scores
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i) {
      const float *weights = p.weights + p.pair(b, h, i), *q = p.q + p.query(b, i, h), *grad = p.grad ? p.grad + p.query(b, i, h) : nullptr;
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
        else memset(p.found(1, b, t, h), 0, p.width * sizeof(float));
      }
      weighted_sum(pulls, p.input(0, b, 0, h), p.stride[1], p.tokens, p.dq + p.query(b, i, h), p.width);
    }
}

template <void (*IMAGE)(const Params&, int64_t)>
void images(const Params& p, Part part) {
  const int64_t first = part.first(p.batch);
  share(part.last(p.batch) - first, 8. * p.heads * p.queries * p.tokens * p.width, [&](int64_t begin, int64_t end) {
    for (int64_t b = first + begin; b < first + end; ++b) IMAGE(p, b);
  });
}

struct Tokens {
  const float* from;
  float* to;
  int64_t batch, tokens, few, width;
};

}  // namespace

extern "C" {

void smi_cls_attention_forward(const Params* p, Part part) { images<forward_image>(*p, part); }
void smi_cls_attention_backward(const Params* p, Part part) { images<backward_image>(*p, part); }

// to [B, few, d] = the first tokens of from [B, T, d].
void smi_take_tokens(const Tokens* p, Part part) {
  for (int64_t b = part.first(p->batch); b < part.last(p->batch); ++b)
    memcpy(p->to + b * p->few * p->width, p->from + b * p->tokens * p->width, p->few * p->width * sizeof(float));
}

// The first tokens of to [B, T, d] += from [B, few, d].
void smi_add_tokens(const Tokens* p, Part part) {
  for (int64_t b = part.first(p->batch); b < part.last(p->batch); ++b)
    scaled(1, p->from + b * p->few * p->width, p->to + b * p->tokens * p->width, p->few * p->width, true);
}
}

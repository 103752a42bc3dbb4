// LayerNorm with the residual addition, and its gradient to the input. Rows of [m, d]; kernels/layer_norm/README.md has the mathematics.
#include <cmath>

#include "parallel.h"
#include "vector.h"

namespace {

template <class T>
struct Params {
  const T *x, *residual;       // residual: or null
  const float *weight, *bias;  // bias: or null
  T *s, *y;                    // s = x + residual is written where there is a residual
  float *mean, *rstd;
  const T *grad, *grad_s;      // backward: of y, and of s or null
  T* found;                    // backward: gradient of s
  int64_t m, d;
  float eps;
};

template <class T>
void forward_row(const Params<T>& p, int64_t row) {
  const int64_t d = p.d;
  const T* x = p.x + row * d;
  vec total = {};
  if (p.residual) {
    T* s = p.s + row * d;
    const T* residual = p.residual + row * d;
    each(d, [&](int64_t j, int some) {
      put(s + j, get(x + j, some) + get(residual + j, some), some);
      total += get(s + j, some);
    });
    x = s;
  } else {
    each(d, [&](int64_t j, int some) { total += get(x + j, some); });
  }
  const float mean = sum(total) / d;
  vec squares = {};
  const int64_t whole = d / V * V;
  for (int64_t j = 0; j < whole; j += V) {
    vec off = load(x + j) - mean;
    squares += off * off;
  }
  float rest = 0;
  for (int64_t j = whole; j < d; ++j) rest += (to_float(x[j]) - mean) * (to_float(x[j]) - mean);
  const float rstd = 1 / std::sqrt((sum(squares) + rest) / d + p.eps);
  p.mean[row] = mean;
  p.rstd[row] = rstd;
  T* y = p.y + row * d;
  each(d, [&](int64_t j, int some) {
    vec value = (get(x + j, some) - mean) * rstd * get(p.weight + j, some);
    put(y + j, p.bias ? value + get(p.bias + j, some) : value, some);
  });
}

template <class T>
void backward_row(const Params<T>& p, int64_t row) {
  const int64_t d = p.d;
  const T *x = p.x + row * d, *grad = p.grad + row * d;
  const float mean = p.mean[row], rstd = p.rstd[row];
  vec plain = {}, along = {};
  each(d, [&](int64_t j, int some) {
    const vec g = get(grad + j, some) * get(p.weight + j, some);
    plain += g;
    along += g * (get(x + j, some) - mean);  // past the row g is zero
  });
  const float a = sum(plain) / d, b = sum(along) * rstd * rstd / d;
  T* found = p.found + row * d;
  each(d, [&](int64_t j, int some) {
    vec value = (get(grad + j, some) * get(p.weight + j, some) - a - (get(x + j, some) - mean) * b) * rstd;
    put(found + j, p.grad_s ? value + get(p.grad_s + row * d + j, some) : value, some);
  });
}

template <class T, void (*ROW)(const Params<T>&, int64_t)>
void rows(const Params<T>& p, Part part) {
  const int64_t first = part.first(p.m);
  share(part.last(p.m) - first, 16. * p.d, [&](int64_t begin, int64_t end) {
    for (int64_t row = first + begin; row < first + end; ++row) ROW(p, row);
  });
}

}  // namespace

#define EXPORT(dtype, T)                                                                                                          \
  extern "C" void smi_layer_norm_forward_##dtype(const Params<T>* p, Part part) { rows<T, forward_row<T>>(*p, part); }   \
  extern "C" void smi_layer_norm_backward_##dtype(const Params<T>* p, Part part) { rows<T, backward_row<T>>(*p, part); }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)

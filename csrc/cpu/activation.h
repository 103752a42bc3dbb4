// The activations of kernels/linear_gelu/reference.py and their derivatives.
#pragma once

#include "vector.h"

enum class Activation : int32_t { gelu, gelu_tanh, quick_gelu };

// Phi(x), the normal distribution, and its density. With z = |x| and t = 1 / (1 + 0.27 z) the tail is e^(-z^2/2) times a polynomial of t
// without a constant term, fitted to a relative error of 3e-8: so small values of GELU keep their digits, where 1 + erf loses them.
struct Normal {
  vec below, density;
};

inline Normal normal(vec x) {
  const vec z = x < 0.f ? -x : x, t = reciprocal(z * 0.27f + 1.f), e = exp2(z * z * -0.721347520f);
  vec p = broadcast(0.0289187528f);
  constexpr float rest[] = {-0.126270441f, 0.169319199f, -0.0686487264f, 0.107415831f, 0.0722344737f, 0.101760356f, 0.107550381f, 0.107720186f};
  for (float coefficient : rest) p = p * t + coefficient;
  const vec above = p * t * e;
  return {x < 0.f ? above : 1.f - above, e * 0.398942280f};
}

inline vec sigmoid(vec x) { return 1.f / (exp(-x) + 1.f); }

constexpr float TANH_1 = 1.5957691216f;   // 2 sqrt(2 / pi)
constexpr float TANH_3 = 0.0713548163f;   // times 0.044715
constexpr float QUICK = 1.702f;

struct Activated {
  vec value, slope;  // f(h), f'(h); what is not used is not computed
};

template <Activation A>
inline Activated activate(vec h) {
  if constexpr (A == Activation::gelu) {
    const Normal n = normal(h);
    return {h * n.below, n.below + h * n.density};
  }
  if constexpr (A == Activation::gelu_tanh) {
    const vec s = sigmoid(h * (TANH_3 * h * h + TANH_1));
    return {h * s, s + s * (1.f - s) * h * (3.f * TANH_3 * h * h + TANH_1)};
  }
  const vec s = sigmoid(QUICK * h);
  return {h * s, s + s * (1.f - s) * h * QUICK};
}

// The arithmetic of the epilogues, one number at a time in float32, for host and device: a test on the host compares it with float64.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SMI_INLINE __host__ __device__ __forceinline__
#else
#define SMI_INLINE inline
#endif

namespace smi {

// Volatile keeps the compiler from starting all numbers of a thread at once, whose registers then spill (compile gate).
SMI_INLINE float exponential(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
#else
    return std::exp(x);
#endif
}

SMI_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
}

struct Normal {
    float cdf, bell;  // Phi(h), absolute error below 1e-7; exp(-h^2 / 2)
};

// Abramowitz and Stegun 7.1.26 at |h| / sqrt 2, as kernels/matmul.py: one exponential for the distribution and for its density.
SMI_INLINE Normal normal(float h) {
    const float bell = exponential(-0.5f * h * h);
    const float t = reciprocal(1.f + 0.3275911f * 0.70710678f * std::fabs(h));
    const float series = 0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)));
    const float tail = 0.5f * bell * t * series;
    return {h < 0 ? tail : 1.f - tail, bell};
}

// GELU(h) = h Phi(h)
SMI_INLINE float gelu(float h) { return h * normal(h).cdf; }

// GELU'(h) = Phi(h) + h phi(h)
SMI_INLINE float gelu_slope(float h) {
    const Normal at = normal(h);
    return at.cdf + h * at.bell * 0.39894228f;
}

// What the forward saves of h, and what the gradient makes of it: these two change together.
SMI_INLINE float saved_of(float h) { return gelu_slope(h); }
SMI_INLINE float times_slope(float gradient, float saved) { return gradient * saved; }

// other + gamma (acc + bias)
SMI_INLINE float residual_of(float acc, float bias, float gamma, float other) { return other + gamma * (acc + bias); }

}  // namespace smi

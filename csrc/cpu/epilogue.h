// What follows a GEMM in a Vision Transformer, applied to sums that are still in the cache.
#pragma once

#include "activation.h"

enum class Epilogue : int32_t {
  none,        // y = z, where z = x B + bias
  residual,    // y = residual + gamma * z; gamma may be null
  activation,  // y = f(z), and `slope` gets f'(z) unless it is null
  derivative,  // y = f'(z)
  times,       // y = z * slope
};

// Y[M, N] = epilogue(X[M, K] B[K, N]). T: float or bfloat16; bias and gamma are floats for either.
template <class T>
struct LinearParams {
  const T* x;             // [M, ldx]
  const void* packed;     // B
  const float* bias;      // [N] or null
  const T* residual;      // [M, N]
  const float* gamma;     // [N] or null
  T* slope;               // [M, N]
  T* y;                   // [M, N], overlaps nothing
  int64_t m, k, n, ldx;
  Epilogue epilogue;
  Activation activation;
};

// `width` columns, at most NR, that begin at `from`. WHOLE: width is NR.
template <bool WHOLE, class T>
inline vec read(const T* from, int j, int width) {
  if constexpr (WHOLE) return load(from + j);
  return j < width ? get(from + j, width - j < V ? width - j : V) : vec{};
}

template <bool WHOLE, class T>
inline void write(T* to, vec left, vec right, int width) {
  if constexpr (WHOLE) return store(to, left, right);
  put(to, left, width < V ? width : V);
  if (width > V) put(to + V, right, width - V);
}

// For `count` rows from `row` on, of `width` columns from `column` on. sums: row stride NR.
template <class T>
using Finish = void (*)(const LinearParams<T>& p, int64_t row, int count, int64_t column, int width, const float* sums);

template <Epilogue E, Activation A, bool WHOLE, class T>
inline void finish_rows(const LinearParams<T>& p, int64_t row, int count, int64_t column, int width, const float* sums) {
  vec bias[2] = {}, gamma[2];
  for (int j = 0; j < 2; ++j) {
    if (p.bias) bias[j] = read<WHOLE>(p.bias + column, j * V, width);
    gamma[j] = p.gamma ? read<WHOLE>(p.gamma + column, j * V, width) : broadcast(1);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t at = (row + i) * p.n + column;
    vec y[2], slope[2];
    for (int j = 0; j < 2; ++j) {
      y[j] = load(sums + i * NR + j * V) + bias[j];
      if constexpr (E == Epilogue::residual) y[j] = y[j] * gamma[j] + read<WHOLE>(p.residual + at, j * V, width);
      if constexpr (E == Epilogue::activation) {
        const Activated found = activate<A>(y[j]);
        slope[j] = found.slope;
        y[j] = found.value;
      }
      if constexpr (E == Epilogue::derivative) y[j] = activate<A>(y[j]).slope;
      if constexpr (E == Epilogue::times) y[j] *= read<WHOLE>(p.slope + at, j * V, width);
    }
    if constexpr (E == Epilogue::activation)
      if (p.slope) write<WHOLE>(p.slope + at, slope[0], slope[1], width);
    write<WHOLE>(p.y + at, y[0], y[1], width);
  }
}

// Prefetches what `finish` reads and writes there.
template <class T>
inline void expect(const LinearParams<T>& p, int64_t row, int count, int64_t column) {
  const T* read = p.epilogue == Epilogue::residual ? p.residual : p.epilogue == Epilogue::times ? p.slope : nullptr;
  const T* written = p.epilogue == Epilogue::activation ? p.slope : nullptr;
  constexpr int LINE = 64 / sizeof(T);
  for (int64_t from = row * p.n + column; count > 0; --count, from += p.n)
    for (int64_t at = from; at < from + NR; at += LINE) {
      if (read) __builtin_prefetch(read + at, 0);
      if (written) __builtin_prefetch(written + at, 1);
      __builtin_prefetch(p.y + at, 1);
    }
}

template <Epilogue E, Activation A, class T>
void finish(const LinearParams<T>& p, int64_t row, int count, int64_t column, int width, const float* sums) {
  width == NR ? finish_rows<E, A, true>(p, row, count, column, width, sums) : finish_rows<E, A, false>(p, row, count, column, width, sums);
}

template <Epilogue E, class T>
Finish<T> with_activation(Activation activation) {
  switch (activation) {
    case Activation::gelu: return finish<E, Activation::gelu, T>;
    case Activation::gelu_tanh: return finish<E, Activation::gelu_tanh, T>;
    case Activation::quick_gelu: return finish<E, Activation::quick_gelu, T>;
  }
  return nullptr;
}

template <class T>
Finish<T> finish_of(const LinearParams<T>& p) {
  switch (p.epilogue) {
    case Epilogue::none: return finish<Epilogue::none, Activation::gelu, T>;
    case Epilogue::residual: return finish<Epilogue::residual, Activation::gelu, T>;
    case Epilogue::activation: return with_activation<Epilogue::activation, T>(p.activation);
    case Epilogue::derivative: return with_activation<Epilogue::derivative, T>(p.activation);
    case Epilogue::times: return finish<Epilogue::times, Activation::gelu, T>;
  }
  return nullptr;
}

#include "linear_gemm.cuh"

template struct smi::LinearKernels<smi::Linear::gelu, smi::Number::bf16>;
template struct smi::LinearKernels<smi::Linear::residual, smi::Number::bf16>;
template struct smi::LinearKernels<smi::Linear::gelu_gradient, smi::Number::bf16>;

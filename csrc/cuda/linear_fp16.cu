#include "linear_gemm.cuh"

template struct smi::LinearKernels<smi::Linear::gelu, smi::Number::fp16>;
template struct smi::LinearKernels<smi::Linear::residual, smi::Number::fp16>;
template struct smi::LinearKernels<smi::Linear::gelu_gradient, smi::Number::fp16>;

#include "attention_run.cuh"

template cudaError_t smi::run_attention<128>(AttentionParams, bool, cudaStream_t);

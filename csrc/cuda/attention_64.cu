#include "attention_run.cuh"

template cudaError_t smi::run_attention<64>(AttentionParams, bool, cudaStream_t);

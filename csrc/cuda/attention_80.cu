#include "attention_run.cuh"

template cudaError_t smi::run_attention<80>(AttentionParams, bool, cudaStream_t);

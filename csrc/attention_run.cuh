// The definition of run_attention, for attention_<width>.cu.
#pragma once

#include "attention_launch.cuh"
#include "attention_run.h"

namespace smi {

template <int BD>
cudaError_t run_attention(AttentionParams p, bool backward, cudaStream_t stream) {
    constexpr int MOST_IMAGES = 65535;  // in a grid's second dimension; the third takes the rest
    const Launch launch = launch_of<BD>(p, backward);
    p.warps = launch.warps;
    if (launch.bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(launch.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, launch.bytes);
        if (error != cudaSuccess) return error;
    }
    if (backward && (p.index != nullptr || p.lengths != nullptr)) {
        const size_t numbers = static_cast<size_t>(p.batch) * p.rows * 3 * p.heads * p.width;
        const cudaError_t error = cudaMemsetAsync(p.dqkv, 0, numbers * sizeof(uint16_t), stream);
        if (error != cudaSuccess) return error;
    }
    const int layers = (p.batch + MOST_IMAGES - 1) / MOST_IMAGES, images = (p.batch + layers - 1) / layers;
    launch.kernel<<<dim3(p.heads, images, layers), 32 * launch.warps, launch.bytes, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace smi

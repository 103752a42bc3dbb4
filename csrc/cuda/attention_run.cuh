// The definition of run_attention, for attention_<width>.cu.
#pragma once

#include "attention_launch.cuh"
#include "attention_run.h"

namespace smi {

constexpr int MOST_IMAGES = 65535;  // of one launch: a grid's second dimension

template <class X>
X* shifted(X* pointer, int64_t bytes) { return pointer == nullptr ? nullptr : reinterpret_cast<X*>(reinterpret_cast<intptr_t>(pointer) + bytes); }

// The images from `first` on.
inline AttentionParams images_from(AttentionParams p, int64_t first) {
    const int64_t row = first * p.heads * p.width * sizeof(uint16_t);
    p.qkv = shifted(p.qkv, 3 * p.rows * row);
    p.dqkv = shifted(p.dqkv, 3 * p.rows * row);
    p.out = shifted(p.out, p.tokens * row);
    p.dout = shifted(p.dout, p.tokens * row);
    p.lse = shifted(p.lse, first * p.heads * p.tokens * sizeof(float));
    p.index = shifted(p.index, first * p.tokens * (p.wide_index ? 8 : 4));
    p.lengths = shifted(p.lengths, first * (p.wide_lengths ? 8 : 4));
    p.batch -= first;
    return p;
}

// Of the current device.
inline cudaError_t room_of_device(Room& room) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&room.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&room.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return error;
}

template <int BD>
cudaError_t run_attention(AttentionParams p, bool backward, cudaStream_t stream) {
    Room room{};
    if (const cudaError_t error = room_of_device(room); error != cudaSuccess) return error;
    const Launch launch = launch_of<BD>(p, backward, room);
    p.warps = launch.warps;
    p.spans = launch.spans;
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
    for (int first = 0; first < p.batch; first += MOST_IMAGES) {
        const AttentionParams part = images_from(p, first);
        const int images = part.batch < MOST_IMAGES ? part.batch : MOST_IMAGES;
        launch.kernel<<<dim3(p.heads, images), 32 * launch.warps, launch.bytes, stream>>>(part);
    }
    return cudaGetLastError();
}

}  // namespace smi

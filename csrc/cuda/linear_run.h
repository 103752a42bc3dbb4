// Linear layers on a GPU of compute capability 9.0. Dtypes are compiled one to a file: linear_<number>.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "linear.h"

namespace smi {

template <Linear KIND, Number NUMBER>
struct LinearKernels {
    // Bytes of workspace that `run` needs for these sizes: 0 without Division::stream_k.
    static size_t workspace_bytes(const LinearParams& p);
    // Launches on a stream of the current device, without waiting. Null, or what is wrong.
    static const char* run(const LinearParams& p, cudaStream_t stream);
};

}  // namespace smi

// Attention on a GPU. Widths are compiled one to a file: attention_<width>.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "attention.h"

namespace smi {

// Runs forward or backward on a stream of the current device. dqkv is filled with zeros first where some of its rows are no token's.
// Requires what AttentionParams says, 1 <= width <= BD and 1 <= tokens <= most_tokens(BD). cudaErrorInvalidValue where shared memory does not suffice.
template <int BD>
cudaError_t run_attention(AttentionParams p, bool backward, cudaStream_t stream);

}  // namespace smi

// Which kernel runs for how many tokens, with how many warps and how much shared memory. The same choice serves the GPU and the emulation.
#pragma once

#include "attention_backward_chunks.cuh"
#include "attention_backward_strip.cuh"
#include "attention_forward.cuh"

namespace smi {

// A block for every head of every image: with one head to a block everything that depends on the head is uniform, which saves registers,
// and registers, not the 32 blocks a multiprocessor can hold, limit how many heads it works on.
struct Launch {
    void (*kernel)(AttentionParams);
    int warps;
    int bytes;  // of shared memory
};

template <class T, int BD>
Launch forward_launch(int tokens) {
    constexpr int W = warps_of(BD);
    const int tiles = tiles_of(tokens), bytes = forward_bytes<BD>(tiles);
    if (tiles <= 2) return {attention_forward_kernel<T, BD, 2, 2, W / 2>, 2, forward_bytes<BD>(2)};
    if (tiles == 3) return {attention_forward_kernel<T, BD, 3, 3, W / 3>, 3, bytes};
    if (tiles == 4) return {attention_forward_kernel<T, BD, 4, 4, W / 4>, 4, bytes};
    // Two blocks a multiprocessor, so that one computes while the other loads; the tiles of queries go round evenly.
    const int turns = (tiles + W / 2 - 1) / (W / 2);
    return {attention_forward_kernel<T, BD, 0, W / 2, 2>, (tiles + turns - 1) / turns, bytes};
}

template <class T, int BD>
Launch backward_launch(int tokens) {
    constexpr int W = warps_of(BD);
    const int tiles = tiles_of(tokens);
    if (tiles <= 2) return {attention_backward_strip_kernel<T, BD, 2, W / 2>, 2, strip_bytes<BD>(2)};
    if (tiles == 3) return {attention_backward_strip_kernel<T, BD, 3, W / 3>, 3, strip_bytes<BD>(3)};
    if (tiles == 4) return {attention_backward_strip_kernel<T, BD, 4, W / 4>, 4, strip_bytes<BD>(4)};
    return {attention_backward_chunks_kernel<T, BD, W>, tiles, chunks_bytes<BD>(tiles)};
}

template <int BD>
Launch launch_of(const AttentionParams& p, bool backward) {
    if (p.number == Number::bf16) return backward ? backward_launch<bf16, BD>(p.tokens) : forward_launch<bf16, BD>(p.tokens);
    return backward ? backward_launch<fp16, BD>(p.tokens) : forward_launch<fp16, BD>(p.tokens);
}

}  // namespace smi

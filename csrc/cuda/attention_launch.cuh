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
    int bytes;      // of shared memory
    int spans = 0;  // AttentionParams::spans
};

// Bytes of shared memory that a device has: for a block at most, and in a multiprocessor, where each block takes BLOCK_BYTES more.
struct Room {
    int block, multiprocessor;
};
constexpr int BLOCK_BYTES = 1024;

// Turns that the warps of long backward, one for each tile, take at dQ.
template <int BD>
int turns_at_dq(int tiles, int spans) {
    int turns = 0;
    for (int left = tiles; left > 0; left -= spans * SPAN_TILES) {
        const int chunk = left < spans * SPAN_TILES ? left : spans * SPAN_TILES;
        turns += (chunk * (BD / DQ_NUMBERS<BD>) + tiles - 1) / tiles;
    }
    return turns;
}

// Spans of a chunk: those at which warps idle least, and then those at which they meet least often, where shared memory holds as many blocks.
template <int BD>
int spans_for(int tiles, Room room) {
    const int by_registers = warps_of(BD) / tiles;
    const auto blocks = [&](int spans) {
        const int bytes = chunks_bytes<BD>(tiles, spans), by_memory = room.multiprocessor / (bytes + BLOCK_BYTES);
        return bytes > room.block ? 0 : by_memory < by_registers ? by_memory : by_registers;
    };
    int best = 1;
    for (int spans = 2; spans <= spans_of(tiles); spans++)
        if (blocks(spans) >= blocks(best) && turns_at_dq<BD>(tiles, spans) <= turns_at_dq<BD>(tiles, best)) best = spans;
    return best;
}

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
Launch backward_launch(int tokens, Room room) {
    constexpr int W = warps_of(BD);
    const int tiles = tiles_of(tokens);
    if (tiles <= 2) return {attention_backward_strip_kernel<T, BD, 2, W / 2>, 2, strip_bytes<BD>(2)};
    if (tiles == 3) return {attention_backward_strip_kernel<T, BD, 3, W / 3>, 3, strip_bytes<BD>(3)};
    if (tiles == 4) return {attention_backward_strip_kernel<T, BD, 4, W / 4>, 4, strip_bytes<BD>(4)};
    const int spans = spans_for<BD>(tiles, room);
    return {attention_backward_chunks_kernel<T, BD, W>, tiles, chunks_bytes<BD>(tiles, spans), spans};
}

template <int BD>
Launch launch_of(const AttentionParams& p, bool backward, Room room) {
    if (p.number == Number::bf16) return backward ? backward_launch<bf16, BD>(p.tokens, room) : forward_launch<bf16, BD>(p.tokens);
    return backward ? backward_launch<fp16, BD>(p.tokens, room) : forward_launch<fp16, BD>(p.tokens);
}

}  // namespace smi

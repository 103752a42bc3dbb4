// What the attention kernels take. Nothing here knows torch; bindings.cpp fills it from tensors, emulate/attention.cpp from plain pointers.
#pragma once

#include <cstdint>

#include "number.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace smi {

struct AttentionParams {
    const void* qkv;      // [batch, rows, 3, heads, width], 16 bits a number, contiguous, 16-byte aligned; width a multiple of 8
    const void* index;    // [batch, tokens] row of qkv of each token, or null: token t is row t (then tokens == rows)
    const void* lengths;  // [batch] tokens that are real, or null: all
    void* out;            // [batch, tokens, heads, width]                 written by forward; backward reads it past STRIP_TOKENS tokens
    float* lse;           // [batch, heads, tokens] log(sum(exp(scores)))  written by forward, read by backward
    const void* dout;     // [batch, tokens, heads, width]
    void* dqkv;           // [batch, rows, 3, heads, width]; rows that are no real token's must hold zero already
    int batch, rows, tokens, heads, width;
    float scale;
    bool wide_index, wide_lengths;  // int64 instead of int32
    Number number;
    int warps;  // of a block; this and the next are filled in by the launch
    int spans;  // of backward past STRIP_TOKENS tokens: parts of dS that shared memory holds at a time
};

// Tokens are taken 16 at a time, the height of one tensor-core instruction.
constexpr int TILE = 16;
// Up to this many tokens a head's matrices P and dS are held whole, and backward needs no output.
constexpr int STRIP_TOKENS = 64;

HOST_DEVICE constexpr int tiles_of(int tokens) { return (tokens + TILE - 1) / TILE; }

// Warps that share a multiprocessor's 65536 registers: 128, 168 or 255 each, what the accumulators of a width need (no kernel spills).
constexpr int warps_of(int width) { return width <= 64 ? 16 : width <= 80 ? 12 : 8; }
// Backward keeps dK and dV of all keys in registers, a warp for every 16 keys.
constexpr int most_tokens(int width) { return warps_of(width) * TILE; }

// Kernels are compiled for these widths; others run in the next one, their missing columns zero in shared memory and never read or written.
constexpr int MOST_WIDTH = 128;
template <class F>
auto with_compiled_width(int width, F f) {
    if (width <= 32) return f.template operator()<32>();
    if (width <= 64) return f.template operator()<64>();
    if (width <= 80) return f.template operator()<80>();
    return f.template operator()<MOST_WIDTH>();
}

}  // namespace smi

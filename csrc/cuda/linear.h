// What the linear layers take. Nothing here knows torch or CUTLASS; bindings.cpp fills it from tensors.
#pragma once

#include <cstddef>

#include "number.h"

namespace smi {

// With acc = x W^T, or x W for the gradient, in float32 [rows, columns]:
enum class Linear {
    gelu,           // out = GELU(acc + bias), and what its gradient needs to `saved`    W [columns, depth]
    residual,       // out = other + gamma (acc + bias)                                  W [columns, depth]
    gelu_gradient,  // out = acc times the derivative, from what `gelu` saved (`other`)  W [depth, columns]
};

// How the multiprocessors divide a GEMM.
enum class Division {
    large,     // tiles of 128 x 192 results
    small,     // tiles of 64 x 128, where large ones leave multiprocessors idle
    stream_k,  // equal parts of all contractions, large tiles; residual only
};

struct LinearParams {
    const void* x;             // [rows, depth]; all have 16 bits a number, are contiguous and start at multiples of 16 bytes
    const void* weight;        // [columns, depth] or [depth, columns], as Linear says
    const void* bias;          // [columns], or null: zero
    const void* gamma;         // [columns], or null: one
    const void* other;         // [rows, columns]
    void* out;                 // [rows, columns]
    void* saved;               // [rows, columns], or null: nothing is saved
    void* workspace;           // as many bytes as the kernel names
    int rows, columns, depth;  // columns and depth are multiples of 8: TMA takes pitches of 16 bytes
    int multiprocessors;       // of the device
    Division division;
};

}  // namespace smi

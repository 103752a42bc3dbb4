// The host's version of warp.cuh: the same functions, each as the PTX manual defines its instruction, written independently of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <set>

#include "simt.h"

#define DEVICE inline
#define KERNEL(threads, blocks) void

namespace smi {

using emulate::block;
using std::min;

struct bf16 {};
struct fp16 {};
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { uint32_t x, y, z, w; };

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

template <class T>
float widen(uint16_t x);
template <>
inline float widen<bf16>(uint16_t x) { return from_bits(uint32_t(x) << 16); }
template <>
inline float widen<fp16>(uint16_t x) {
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return x >> 15 ? -size : size;
}

// Rounds to nearest, ties to even.
template <class T>
uint16_t narrow(float x);
template <>
inline uint16_t narrow<bf16>(float x) {
    const uint32_t bits = to_bits(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <>
inline uint16_t narrow<fp16>(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    if (size == 0) return sign;                       // frexp gives it the exponent 0
    int exponent;
    std::frexp(size, &exponent);                      // size = m 2^exponent, m in [1/2, 1)
    const int place = std::max(exponent - 11, -24);   // exponent of the last bit kept
    const int kept = int(std::nearbyint(std::ldexp(size, -place)));
    if (place == -24) return sign | kept;             // subnormal, or the smallest normal by carry
    return sign | (((place + 25) << 10) + kept - 1024);
}

inline int thread_id() { return block()->me().id; }
inline int block_head() { return block()->head; }
inline int block_image() { return block()->image; }
inline void sync_block() { block()->sync_block(); }
inline void sync_warp() { block()->meet(block()->warp(), [] {}); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline uint32_t shared_memory() { return emulate::Block::SHARED_START; }

// All 32 lanes leave a pointer to their operands; the last to come performs action(lanes) for the whole warp.
template <class Operands, class Action>
void together(Operands& mine, Action action) {
    emulate::Block& b = *block();
    b.slot(b.me().id % 32) = &mine;
    b.meet(b.warp(), [&] {
        Operands* lanes[32];
        for (int i = 0; i < 32; i++) {
            lanes[i] = static_cast<Operands*>(b.slot(i));
            if (lanes[i]->kind != mine.kind) return b.fail("the lanes of a warp are at different instructions");
        }
        action(lanes);
    });
}

struct Shuffle { int kind; float x, result; int mask; };
inline float shuffle_xor(float x, int mask) {
    Shuffle mine{0, x, 0, mask};
    together(mine, [](Shuffle** lanes) {
        for (int i = 0; i < 32; i++) lanes[i]->result = lanes[i ^ lanes[i]->mask]->x;
    });
    return mine.result;
}

inline void copy_async(uint32_t to, const void* from, bool real) {
    emulate::Copy copy{to, {}};
    block()->shared(to, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) block()->fail("an asynchronous copy from an address that is not aligned to 16");
    if (real) std::memcpy(copy.bytes, from, 16);
    block()->me().uncommitted.push_back(copy);
}
inline void copy_commit() {
    emulate::Fiber& me = block()->me();
    me.groups.push_back(std::move(me.uncommitted));
    me.uncommitted.clear();
}
template <int PENDING>
void copy_wait() {
    emulate::Fiber& me = block()->me();
    for (; me.groups.size() > PENDING; me.groups.pop_front())
        for (const emulate::Copy& copy : me.groups.front()) std::memcpy(block()->shared(copy.to, 16), copy.bytes, 16);
}

struct MatrixLoad { int kind; uint32_t row; uint32_t* to; };
inline void load_matrices_any(uint32_t (&to)[4], uint32_t row, bool transposed) {
    MatrixLoad mine{transposed ? 2 : 1, row, to};
    together(mine, [transposed](MatrixLoad** lanes) {
        for (int m = 0; m < 4; m++) {
            uint16_t matrix[8][8];
            std::set<uint32_t> banks;
            for (int r = 0; r < 8; r++) {
                std::memcpy(matrix[r], block()->shared(lanes[8 * m + r]->row, 16), 16);
                banks.insert(lanes[8 * m + r]->row / 16 % 8);
            }
            block()->counters.matrix_loads++;
            block()->counters.matrix_conflicts += 8 - banks.size();
            for (int i = 0; i < 32; i++) {  // lane i holds row i / 4, columns i % 4 * 2 and the next
                const int r = i / 4, c = i % 4 * 2;
                const uint16_t low = transposed ? matrix[c][r] : matrix[r][c], high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
                lanes[i]->to[m] = low | uint32_t(high) << 16;
            }
        }
    });
}
inline void load_matrices(uint32_t (&to)[4], uint32_t row) { load_matrices_any(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) { load_matrices_any(to, row, true); }

struct Product { int kind; float* c; const uint32_t* a; uint32_t b[2]; };
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{3, c, a, {b0, b1}};
    together(mine, [](Product** lanes) {
        float A[16][16], B[16][8];
        for (int i = 0; i < 32; i++) {
            const int group = i / 4, member = i % 4;  // as the manual calls them: groupID, threadID_in_group
            for (int e = 0; e < 8; e++) {             // elements a0..a7: a2, a3, a6, a7 eight rows below; a4..a7 eight columns right
                const int row = group + (e / 2 % 2 ? 8 : 0), column = member * 2 + e % 2 + (e >= 4 ? 8 : 0);
                A[row][column] = widen<T>(lanes[i]->a[e / 2] >> (e % 2 * 16));
            }
            for (int e = 0; e < 4; e++) {  // elements b0..b3: b2, b3 eight rows below
                const int row = member * 2 + e % 2 + (e >= 2 ? 8 : 0);
                B[row][group] = widen<T>(lanes[i]->b[e / 2] >> (e % 2 * 16));
            }
        }
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++) {  // elements c0..c3: c2, c3 eight rows below
                const int row = i / 4 + (e >= 2 ? 8 : 0), column = i % 4 * 2 + e % 2;
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
                lanes[i]->c[e] += sum;
            }
        block()->counters.products++;
    });
}

template <class T>
uint32_t pack(float low, float high) { return narrow<T>(low) | uint32_t(narrow<T>(high)) << 16; }
template <class T>
float2 unpack(uint32_t both) { return {widen<T>(both), widen<T>(both >> 16)}; }

struct Store { int kind; uint32_t to, x; };
// The lanes of a store need not be together on the device; the kernels always call it so, which lets conflicts be counted.
inline void shared_store_together(uint32_t to, uint32_t x) {
    Store mine{4, to, x};
    together(mine, [](Store** lanes) {
        std::set<uint32_t> words[32];
        size_t passes = 0;
        for (int i = 0; i < 32; i++) {
            std::memcpy(block()->shared(lanes[i]->to, 4), &lanes[i]->x, 4);
            words[lanes[i]->to / 4 % 32].insert(lanes[i]->to / 4);
        }
        for (const auto& bank : words) passes = std::max(passes, bank.size());
        block()->counters.stores++;
        block()->counters.store_conflicts += passes - 1;
    });
}
inline void shared_store(uint32_t to, uint32_t x) { shared_store_together(to, x); }
inline void shared_store(uint32_t to, float x) { std::memcpy(block()->shared(to, 4), &x, 4); }
inline float4 shared_load4(uint32_t from) {
    float4 x;
    std::memcpy(&x, block()->shared(from, 16), 16);
    return x;
}
inline uint4 shared_load16(uint32_t from) {
    uint4 x;
    std::memcpy(&x, block()->shared(from, 16), 16);
    return x;
}

inline uint4 global_load16(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) block()->fail("a 16-byte load from an address that is not aligned");
    uint4 x;
    std::memcpy(&x, from, 16);
    return x;
}
inline void global_store16(void* to, uint4 x) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) block()->fail("a 16-byte store to an address that is not aligned");
    std::memcpy(to, &x, 16);
}

}  // namespace smi

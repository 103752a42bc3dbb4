// Attention forward: out = softmax(scale q k^T) v of one head per block, its q, k and v in shared memory.
// A warp owns 16 queries at a time and takes the keys in rounds of 48, the rest 16 by 16, so that 47 keys cost 48. Up to 64 keys are a single round
// whose size the compiler knows; beyond, sums are rescaled from round to round.
#pragma once

#include "tile.cuh"

namespace smi {

constexpr int ROUND_TILES = 3;  // with the scores of a round, [16, 48], width 64 just fits in 128 registers

template <int BD>
HOST_DEVICE constexpr int forward_bytes(int tiles) { return 3 * tiles * TILE * Tile<BD>::ROW; }

// b_s [16, 16 ROUND] = scale log2(e) q k^T, -inf where there is no key
template <class T, int BD, int ROUND>
DEVICE void scores(float (&b_s)[ROUND][2][4], uint32_t s_q, int i_q, uint32_t s_k, int i_k, const Place& at, float scale) {
#pragma unroll
    for (int i = 0; i < ROUND * 8; i++) b_s[i / 8][i / 4 % 2][i % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < BD / 16; k++) {
        uint32_t b_q[4];  // [16, 16]
        load_a<BD>(b_q, s_q, i_q * TILE, 2 * k, at.lane);
#pragma unroll
        for (int t = 0; t < ROUND; t++) {
            uint32_t b_k[4];  // [16 keys, 16]
            load_b_from_transpose<BD>(b_k, s_k, (i_k + t) * TILE, 2 * k, at.lane);
            mma_pair<T>(b_s[t], b_q, b_k);
        }
    }
#pragma unroll
    for (int i = 0; i < ROUND * 8; i++) b_s[i / 8][i / 4 % 2][i % 4] *= scale;
    if ((i_k + ROUND) * TILE <= at.real) return;
    const int o_k = i_k * TILE + at.lane % 4 * 2;  // this lane's first key
#pragma unroll
    for (int i = 0; i < ROUND * 8; i++)
        if (o_k + i / 4 * 8 + i % 2 >= at.real) b_s[i / 8][i / 4 % 2][i % 4] = -INFINITE;
}

// Softmax so far of two rows per lane: largest score, sum of exponentials. Turns scores into exponentials and rescales b_o.
template <int BD, int ROUND>
DEVICE void softmax_round(float (&b_s)[ROUND][2][4], float (&b_o)[BD / 16][2][4], float (&b_m)[2], float (&b_l)[2]) {
    float before[2] = {b_m[0], b_m[1]};
#pragma unroll
    for (int i = 0; i < ROUND * 8; i++) b_m[i / 2 % 2] = fmaxf(b_m[i / 2 % 2], b_s[i / 8][i / 4 % 2][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        b_m[r] = fmaxf(b_m[r], shuffle_xor(b_m[r], 1));
        b_m[r] = fmaxf(b_m[r], shuffle_xor(b_m[r], 2));
        before[r] = exp2_fast(before[r] - b_m[r]);
        b_l[r] *= before[r];
    }
#pragma unroll
    for (int i = 0; i < ROUND * 8; i++) {
        float& x = b_s[i / 8][i / 4 % 2][i % 4];
        x = exp2_fast(x - b_m[i / 2 % 2]);
        b_l[i / 2 % 2] += x;
    }
#pragma unroll
    for (int i = 0; i < BD / 2; i++) b_o[i / 8][i / 4 % 2][i % 4] *= before[i / 2 % 2];
}

// The queries of tile i_q against the keys of ROUND tiles.
template <class T, int BD, int ROUND>
DEVICE void forward_round(const AttentionParams& p, const Place& at, float (&b_o)[BD / 16][2][4], float (&b_m)[2], float (&b_l)[2], uint32_t s_q, uint32_t s_k,
                          uint32_t s_v, int i_q, int i_k) {
    float b_s[ROUND][2][4];  // [16, 16 ROUND]
    scores<T, BD, ROUND>(b_s, s_q, i_q, s_k, i_k, at, p.scale * LOG2_E);
    softmax_round<BD, ROUND>(b_s, b_o, b_m, b_l);
#pragma unroll
    for (int t = 0; t < ROUND; t++) {
        uint32_t b_p[4];  // [16, 16]
        as_a<T>(b_p, b_s[t]);
#pragma unroll
        for (int d = 0; d < BD / 16; d++) {
            uint32_t b_v[4];  // [16 keys, 16]
            load_b<BD>(b_v, s_v, (i_k + t) * TILE, 2 * d, at.lane);
            mma_pair<T>(b_o[d], b_p, b_v);
        }
    }
}

// One tile of 16 queries (TILES of keys, 0: many): attends to all keys, leaves the output in the tile's own rows of s_q, then in global memory.
template <class T, int BD, int TILES>
DEVICE void forward_tile(const AttentionParams& p, const Place& at, uint32_t s_q, uint32_t s_k, uint32_t s_v, int i_q) {
    float b_o[BD / 16][2][4] = {};  // [16, BD]
    float b_m[2] = {-INFINITE, -INFINITE}, b_l[2] = {};
    if (TILES != 0) {
        forward_round<T, BD, TILES == 0 ? 1 : TILES>(p, at, b_o, b_m, b_l, s_q, s_k, s_v, i_q, 0);
    } else {
        int i_k = 0;
#pragma unroll 1
        for (; i_k + ROUND_TILES <= at.tiles; i_k += ROUND_TILES) forward_round<T, BD, ROUND_TILES>(p, at, b_o, b_m, b_l, s_q, s_k, s_v, i_q, i_k);
#pragma unroll 1
        for (; i_k < at.tiles; i_k++) forward_round<T, BD, 1>(p, at, b_o, b_m, b_l, s_q, s_k, s_v, i_q, i_k);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        b_l[r] += shuffle_xor(b_l[r], 1);
        b_l[r] += shuffle_xor(b_l[r], 2);
        const int row = i_q * TILE + at.lane / 4 + r * 8;
        if (at.lane % 4 == 0 && row < at.real) at.lse(p)[row] = (b_m[r] + log2_fast(b_l[r])) * LN_2;
        b_l[r] = reciprocal_fast(b_l[r]);
    }
#pragma unroll
    for (int i = 0; i < BD / 2; i++) b_o[i / 8][i / 4 % 2][i % 4] *= b_l[i / 2 % 2];
    sync_warp();  // every lane has read its part of the queries
#pragma unroll
    for (int d = 0; d < BD / 16; d++) {
        uint32_t b_out[4];  // [16, 16]
        as_a<T>(b_out, b_o[d]);
        store_a<BD>(s_q, i_q * TILE, 2 * d, b_out, at.lane);
    }
    sync_warp();
    store_rows<BD, BD / 8>(s_q, at.merged(p, p.out), i_q * TILE, 0, at.real, p.width, at.lane);
}

// Output rows and log-sum-exps past the image's length are zero.
DEVICE void zero_rest(const AttentionParams& p, const Place& at) {
    const Rows out = at.merged(p, p.out);
    const int chunks = p.width / 8;
    for (int i = at.real * chunks + at.thread; i < p.tokens * chunks; i += at.threads)
        global_store16(const_cast<uint16_t*>(out.first) + out.offset(i / chunks) + i % chunks * 8, {0, 0, 0, 0});
    for (int row = at.real + at.thread; row < p.tokens; row += at.threads) at.lse(p)[row] = 0.f;
}

template <class T, int BD, int TILES, int WARPS, int BLOCKS>
KERNEL(32 * WARPS, BLOCKS) attention_forward_kernel(const AttentionParams p) {
    const Place at(p);
    const int rows = (TILES ? TILES : at.tiles) * TILE, tile_bytes = rows * Tile<BD>::ROW;
    const uint32_t s_q = shared_memory(), s_k = s_q + tile_bytes, s_v = s_k + tile_bytes;
    load_rows<BD, 3>(s_q, tile_bytes, at.packed(p, p.qkv, 0), static_cast<int64_t>(p.heads) * p.width, 0, rows, at.real, p.width, at.thread,
                     at.threads);
    copy_commit();
    zero_rest(p, at);
    copy_wait<0>();
    sync_block();
    for (int i_q = at.i_w; i_q < at.tiles; i_q += p.warps) forward_tile<T, BD, TILES>(p, at, s_q, s_k, s_v, i_q);
}

}  // namespace smi

// Attention backward for up to 64 tokens: a head's whole [n, n] matrices P and dS pass through shared memory once.
// The number of tiles is known to the compiler: nothing is padded beyond 16 tokens, and no register is kept for more.
// First each warp owns 16 queries: it has their whole strip of P and dP in registers, so delta needs neither the output nor a second pass, and
// dQ follows at once. Then each warp owns 16 keys and reads P and dS by columns: dV and dK. Five GEMMs in all, nothing computed twice.
#pragma once

#include "attention_backward.cuh"

namespace smi {

using Strip = Tile<STRIP_TOKENS>;  // rows of P and dS, whatever TILES

template <int BD>
HOST_DEVICE constexpr int strip_bytes(int tiles) { return tiles * TILE * (4 * Tile<BD>::ROW + 2 * Strip::ROW); }

// The warp's 16 queries: leaves their rows of P and dS in s_p and s_ds, and their dQ in b_dq.
template <class T, int BD, int TILES>
DEVICE void strip_of_queries(float (&b_dq)[BD / 16][2][4], const AttentionParams& p, const Place& at, uint32_t s_q, uint32_t s_k, uint32_t s_v, uint32_t s_do,
                             uint32_t s_p, uint32_t s_ds) {
    const int o_q = at.i_w * TILE + at.lane / 4;  // this lane's rows are o_q and o_q + 8
    const float log2_e = at.real > 1 ? LOG2_E : 0.f;  // a token alone has the weight one, whatever its score is rounded to
    float b_lse[2], b_delta[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) b_lse[r] = o_q + 8 * r < at.real ? at.lse(p)[o_q + 8 * r] * log2_e : INFINITE;
    float b_s[TILES][2][4] = {}, b_dp[TILES][2][4] = {};  // [16, 16 TILES]
#pragma unroll
    for (int k = 0; k < BD / 16; k++) {
        uint32_t b_q[4], b_do[4];  // [16, 16]
        load_a<BD>(b_q, s_q, at.i_w * TILE, 2 * k, at.lane);
        load_a<BD>(b_do, s_do, at.i_w * TILE, 2 * k, at.lane);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            uint32_t b_k[4], b_v[4];  // [16 keys, 16]
            load_b_from_transpose<BD>(b_k, s_k, t * TILE, 2 * k, at.lane);
            mma_pair<T>(b_s[t], b_q, b_k);
            load_b_from_transpose<BD>(b_v, s_v, t * TILE, 2 * k, at.lane);
            mma_pair<T>(b_dp[t], b_do, b_v);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int o_k = t * TILE + at.lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float e = exp2_fast(b_s[t][i / 4][i % 4] * (p.scale * log2_e) - b_lse[i / 2 % 2]);
            b_s[t][i / 4][i % 4] = o_k + i / 4 * 8 + i % 2 < at.real ? e : 0.f;
            b_delta[i / 2 % 2] += b_s[t][i / 4][i % 4] * b_dp[t][i / 4][i % 4];
        }
        uint32_t b_p[4];  // [16, 16]
        as_a<T>(b_p, b_s[t]);
        store_a<STRIP_TOKENS>(s_p, at.i_w * TILE, 2 * t, b_p, at.lane);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        b_delta[r] += shuffle_xor(b_delta[r], 1);
        b_delta[r] += shuffle_xor(b_delta[r], 2);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int i = 0; i < 8; i++) b_s[t][i / 4][i % 4] *= b_dp[t][i / 4][i % 4] - b_delta[i / 2 % 2];
        uint32_t b_ds[4];  // [16, 16]
        as_a<T>(b_ds, b_s[t]);
        store_a<STRIP_TOKENS>(s_ds, at.i_w * TILE, 2 * t, b_ds, at.lane);
        accumulate<T, BD>(b_dq, b_ds, s_k, t * TILE, at.lane);
    }
}

// dK (which = 1) or dV (2) of the keys of tile i_w: factor times strip^T times the rows of a tile; passes through tile `to`.
template <class T, int BD, int TILES>
DEVICE void gradient_of_keys(const AttentionParams& p, const Place& at, uint32_t s_strip, uint32_t s_rows, float factor, uint32_t to, int which) {
    float b_c[BD / 16][2][4] = {};  // [16, BD]
#pragma unroll
    for (int i_q = 0; i_q < TILES; i_q++) {
        uint32_t b_a[4];  // [16 keys, 16 queries]
        load_a_from_transpose<STRIP_TOKENS>(b_a, s_strip, i_q * TILE, 2 * at.i_w, at.lane);
        accumulate<T, BD>(b_c, b_a, s_rows, i_q * TILE, at.lane);
    }
    store_gradient<T, BD>(b_c, factor, to, at.packed(p, p.dqkv, which), at.i_w * TILE, at.real, p.width, at.lane);
}

template <class T, int BD, int TILES, int BLOCKS>
KERNEL(32 * TILES, BLOCKS) attention_backward_strip_kernel(const AttentionParams p) {
    const Place at(p);
    const int tile_bytes = TILES * TILE * Tile<BD>::ROW, strip = TILES * TILE * Strip::ROW;
    const uint32_t s_q = shared_memory(), s_k = s_q + tile_bytes, s_v = s_k + tile_bytes, s_do = s_v + tile_bytes, s_p = s_do + tile_bytes, s_ds = s_p + strip;
    const int64_t step = static_cast<int64_t>(p.heads) * p.width;
    load_rows<BD, 3>(s_q, tile_bytes, at.packed(p, p.qkv, 0), step, 0, TILES * TILE, at.real, p.width, at.thread, at.threads);
    load_rows<BD, 1>(s_do, 0, at.merged(p, p.dout), 0, 0, TILES * TILE, at.real, p.width, at.thread, at.threads);
    copy_commit();
    copy_wait<0>();
    sync_block();
    float b_dq[BD / 16][2][4] = {};  // [16, BD]
    strip_of_queries<T, BD, TILES>(b_dq, p, at, s_q, s_k, s_v, s_do, s_p, s_ds);  // past the image's length: zeros, which others read
    sync_block();  // P and dS are complete, and k and v are free
    if (at.i_w >= at.tiles) return;
    store_gradient<T, BD>(b_dq, p.scale, s_v, at.packed(p, p.dqkv, 0), at.i_w * TILE, at.real, p.width, at.lane);
    gradient_of_keys<T, BD, TILES>(p, at, s_ds, s_q, p.scale, s_k, 1);
    sync_warp();  // the warp's rows of s_v hold dQ no more
    gradient_of_keys<T, BD, TILES>(p, at, s_p, s_do, 1.f, s_v, 2);
}

}  // namespace smi

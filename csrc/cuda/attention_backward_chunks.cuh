// Attention backward for up to 256 tokens, in one pass over the queries, 64 at a time: a span. A warp owns 16 keys for the whole kernel: their dK and
// dV stay in its registers. It computes P^T and dS^T, which are already the left factors of dV and dK, and leaves dS^T in shared memory, as many spans
// as fit: a chunk. After a barrier the warps divide the chunk's dQ among them. Later spans of q and dO arrive while earlier ones are computed.
#pragma once

#include "attention_backward.cuh"

namespace smi {

constexpr int SPAN_TILES = 4;
constexpr int SPAN_TOKENS = SPAN_TILES * TILE;
constexpr int MOST_SPANS = 4;
using Span = Tile<SPAN_TOKENS>;  // dS^T [n, 64] of a span

// Numbers of a row of dQ that a warp computes at a time.
template <int BD>
constexpr int DQ_NUMBERS = BD % 32 == 0 ? 32 : 16;

HOST_DEVICE constexpr int spans_of(int tiles) { return (tiles + SPAN_TILES - 1) / SPAN_TILES; }

template <int BD>
HOST_DEVICE constexpr int chunks_bytes(int tiles, int spans) {
    return tiles * TILE * (4 * Tile<BD>::ROW + spans * Span::ROW + 2 * static_cast<int>(sizeof(float)));
}

// Waits for all but the last `pending` groups of copies, of which there are fewer than MOST_SPANS.
DEVICE void copy_wait_for(int pending) {
    if (pending == 0) copy_wait<0>();
    else if (pending == 1) copy_wait<1>();
    else if (pending == 2) copy_wait<2>();
    else copy_wait<3>();
}

template <class T>
DEVICE float dot8(uint4 x, uint4 y) {
    const uint32_t b_x[4] = {x.x, x.y, x.z, x.w}, b_y[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 u = unpack<T>(b_x[i]), v = unpack<T>(b_y[i]);
        sum += u.x * v.x + u.y * v.y;
    }
    return sum;
}

// For each query of tile i_w two numbers: lse (in base 2) and delta = rowsum(O * dO), straight from global memory, two lanes a row.
// Rows that are not real get lse = inf, so that their P is zero.
template <class T, int BD>
DEVICE void load_lse_and_delta(const AttentionParams& p, const Place& at, uint32_t s_stats) {
    const int row = at.i_w * TILE + at.lane / 2;
    const bool is_real = row < at.real;
    const Rows out = at.merged(p, p.out), dout = at.merged(p, p.dout);
    const int64_t start = is_real ? out.offset(row) : 0;
    float delta = 0.f;
#pragma unroll
    for (int c = 0; c < BD / 16; c++) {
        const int chunk = 2 * c + at.lane % 2;
        if (is_real && chunk * 8 < p.width) delta += dot8<T>(global_load16(out.first + start + chunk * 8), global_load16(dout.first + start + chunk * 8));
    }
    delta += shuffle_xor(delta, 1);
    if (at.lane % 2 == 0) {
        shared_store(s_stats + row * 8, is_real ? at.lse(p)[row] * LOG2_E : INFINITE);
        shared_store(s_stats + row * 8 + 4, delta);
    }
}

// One 16x16 block: the warp's keys against the queries of tile i_q. Adds to dK and dV, leaves dS^T in s_ds, its span's.
template <class T, int BD>
DEVICE void block_of_keys(float (&b_dk)[BD / 16][2][4], float (&b_dv)[BD / 16][2][4], const Place& at, float scale, uint32_t s_q, uint32_t s_k,
                          uint32_t s_v, uint32_t s_do, uint32_t s_stats, uint32_t s_ds, int i_q) {
    const int o_k = at.i_w * TILE + at.lane / 4, o_q = i_q * TILE + at.lane % 4 * 2;
    float b_s[2][4], b_dp[2][4];  // [16 keys, 16 queries]
    product<T, BD>(b_s, s_k, at.i_w * TILE, s_q, i_q * TILE, at.lane);
    product<T, BD>(b_dp, s_v, at.i_w * TILE, s_do, i_q * TILE, at.lane);
    float b_ds[2][4];  // [16 keys, 16 queries]
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float4 stats = shared_load4(s_stats + (o_q + 8 * j) * 8);  // lse, delta of this lane's two queries
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float e = exp2_fast(b_s[j][i] * scale - (i % 2 ? stats.z : stats.x));
            b_s[j][i] = o_k + i / 2 * 8 < at.real ? e : 0.f;
            b_ds[j][i] = b_s[j][i] * (b_dp[j][i] - (i % 2 ? stats.w : stats.y));
        }
    }
    uint32_t b_a[4];  // [16 keys, 16 queries]
    as_a<T>(b_a, b_s);
    accumulate<T, BD>(b_dv, b_a, s_do, i_q * TILE, at.lane);
    as_a<T>(b_a, b_ds);
    store_a<SPAN_TOKENS>(s_ds, at.i_w * TILE, i_q % SPAN_TILES * 2, b_a, at.lane);
    accumulate<T, BD>(b_dk, b_a, s_q, i_q * TILE, at.lane);
}

// dQ of the chunk's tiles [i_q, last): blocks of [16, BC] divided among the warps. Leaves them in s_q, which the chunk needs no more.
// s_ds: the chunk's spans, `span_bytes` each.
template <class T, int BD>
DEVICE void chunk_of_queries(const AttentionParams& p, const Place& at, uint32_t s_q, uint32_t s_k, uint32_t s_ds, int span_bytes, int i_q, int last) {
    constexpr int BC = DQ_NUMBERS<BD>;
    for (int i = at.i_w; i < (last - i_q) * (BD / BC); i += p.warps) {
        const int tile = i / (BD / BC), chunk = i % (BD / BC) * (BC / 8);
        const uint32_t s_span = s_ds + tile / SPAN_TILES * span_bytes;
        float b_dq[BC / 16][2][4] = {};  // [16, BC]
#pragma unroll 1  // unrolled, width 64 spills
        for (int i_k = 0; i_k < at.tiles; i_k++) {
            uint32_t b_a[4];  // [16 queries, 16 keys]
            load_a_from_transpose<SPAN_TOKENS>(b_a, s_span, i_k * TILE, tile % SPAN_TILES * 2, at.lane);
#pragma unroll
            for (int d = 0; d < BC / 16; d++) {
                uint32_t b_k[4];  // [16 keys, 16]
                load_b<BD>(b_k, s_k, i_k * TILE, chunk + 2 * d, at.lane);
                mma_pair<T>(b_dq[d], b_a, b_k);
            }
        }
        const int row = (i_q + tile) * TILE;
#pragma unroll
        for (int d = 0; d < BC / 16; d++) {
#pragma unroll
            for (int e = 0; e < 8; e++) b_dq[d][e / 4][e % 4] *= p.scale;
            uint32_t b_a[4];  // [16, 16]
            as_a<T>(b_a, b_dq[d]);
            store_a<BD>(s_q, row, chunk + 2 * d, b_a, at.lane);
        }
        sync_warp();
        store_rows<BD, BC / 8>(s_q, at.packed(p, p.dqkv, 0), row, chunk, at.real, p.width, at.lane);
    }
}

template <class T, int BD, int WARPS>
KERNEL(32 * WARPS, 1) attention_backward_chunks_kernel(const AttentionParams p) {
    const Place at(p);
    const int rows = tiles_of(p.tokens) * TILE, tile_bytes = rows * Tile<BD>::ROW;
    const uint32_t s_q = shared_memory(), s_k = s_q + tile_bytes, s_v = s_k + tile_bytes, s_do = s_v + tile_bytes, s_ds = s_do + tile_bytes;
    const int span_bytes = rows * Span::ROW;
    const uint32_t s_stats = s_ds + p.spans * span_bytes;
    const int64_t step = static_cast<int64_t>(p.heads) * p.width;
    load_rows<BD, 2>(s_k, tile_bytes, at.packed(p, p.qkv, 1), step, 0, at.tiles * TILE, at.real, p.width, at.thread, at.threads);
    for (int from = 0; from < at.tiles * TILE; from += SPAN_TOKENS) {
        const int to = min(from + SPAN_TOKENS, at.tiles * TILE);
        load_rows<BD, 1>(s_q, 0, at.packed(p, p.qkv, 0), 0, from, to, at.real, p.width, at.thread, at.threads);
        load_rows<BD, 1>(s_do, 0, at.merged(p, p.dout), 0, from, to, at.real, p.width, at.thread, at.threads);
        copy_commit();
    }
    if (at.i_w < at.tiles) load_lse_and_delta<T, BD>(p, at, s_stats);
    float b_dk[BD / 16][2][4] = {}, b_dv[BD / 16][2][4] = {};  // [16, BD]
    for (int i = 0, first = 0; i < at.tiles; i++) {  // first: of the chunk
        if (i % SPAN_TILES == 0) {
            copy_wait_for(spans_of(at.tiles - i) - 1);
            sync_block();  // the span is there, and the previous chunk's dS is free
        }
        const uint32_t s_span = s_ds + (i - first) / SPAN_TILES * span_bytes;
        if (at.i_w < at.tiles) block_of_keys<T, BD>(b_dk, b_dv, at, p.scale * LOG2_E, s_q, s_k, s_v, s_do, s_stats, s_span, i);
        if (i + 1 < at.tiles && i + 1 - first < p.spans * SPAN_TILES) continue;
        sync_block();  // dS is complete, and the chunk's q is free; after the last, v and dO are
        chunk_of_queries<T, BD>(p, at, s_q, s_k, s_ds, span_bytes, first, i + 1);
        first = i + 1;
    }
    if (at.i_w >= at.tiles) return;
    store_gradient<T, BD>(b_dk, p.scale, s_v, at.packed(p, p.dqkv, 1), at.i_w * TILE, at.real, p.width, at.lane);
    store_gradient<T, BD>(b_dv, 1.f, s_do, at.packed(p, p.dqkv, 2), at.i_w * TILE, at.real, p.width, at.lane);
}

}  // namespace smi

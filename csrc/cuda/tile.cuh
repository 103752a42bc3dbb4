// Tiles of 16-bit numbers in shared memory: loading, storing, and the fragments that tensor cores take.
#pragma once

#include "attention.h"
#include "warp.cuh"

namespace smi {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float INFINITE = __builtin_huge_valf();

// Rows of BD numbers. The 16-byte chunks of a row are permuted by row, so that the eight rows of one 8x8 matrix lie in eight different bank groups.
template <int BD>
struct Tile {
    static constexpr int CHUNKS = BD / 8;
    static constexpr int ROW = BD * 2;  // bytes
    static_assert(BD % 16 == 0, "a product takes 16 numbers of a row at a time");

    static constexpr bool POWER_OF_TWO = (CHUNKS & (CHUNKS - 1)) == 0;
    static_assert(POWER_OF_TWO || CHUNKS % 4 == 2, "move() knows these permutations only");

    static DEVICE int permutation(int row) { return CHUNKS % 8 == 0 ? row & 7 : CHUNKS % 4 == 0 ? (row >> 1) & 3 : (row >> 2) & 1; }
    static DEVICE uint32_t at(uint32_t tile, int row, int chunk) { return tile + row * ROW + ((chunk ^ permutation(row)) << 4); }

    // From the address of a chunk c to that of c ^ chunk, an addition wherever bits do not overlap. One instruction, where keeping every
    // chunk's address would cost registers. Tiles start at multiples of the row (of 32 bytes, where a row is no power of two).
    static DEVICE uint32_t move(uint32_t address, int chunk) {
        return POWER_OF_TWO ? address ^ (chunk << 4) : (address + ((chunk & ~1) << 4)) ^ ((chunk & 1) << 4);
    }

    // Everywhere below row is a multiple of 16 (so that it does not change the permutation), and chunk is even.
    // The four 8x8 matrices of a 16x16 block whose corner is (row, 8 * chunk), in the order: down, then right.
    static DEVICE uint32_t down(uint32_t tile, int row, int chunk, int lane) { return move(tile + row * ROW + at(0, lane % 16, lane / 16), chunk); }
    // The same four in the order: right, then down.
    static DEVICE uint32_t right(uint32_t tile, int row, int chunk, int lane) {
        return move(tile + row * ROW + at(0, lane % 8 + lane / 16 * 8, lane / 8 % 2), chunk);
    }
    // Where this lane's two neighbouring numbers of an mma result [16, 16] go: quarter 1 is below quarter 0, 2 right of it.
    static DEVICE uint32_t pair(uint32_t tile, int row, int chunk, int quarter, int lane) {
        return move(tile + (row + quarter % 2 * 8) * ROW + at(0, lane / 4, 0) + lane % 4 * 4, chunk + quarter / 2);
    }
};

// a [16, 16] of an mma is rows of the tile;  a^T is;  b^T [8 + 8, 16] is;  b [16, 8 + 8] is.
template <int BD>
DEVICE void load_a(uint32_t (&a)[4], uint32_t tile, int row, int chunk, int lane) { load_matrices(a, Tile<BD>::down(tile, row, chunk, lane)); }
template <int BD>
DEVICE void load_a_from_transpose(uint32_t (&a)[4], uint32_t tile, int row, int chunk, int lane) {
    load_matrices_transposed(a, Tile<BD>::right(tile, row, chunk, lane));
}
template <int BD>
DEVICE void load_b_from_transpose(uint32_t (&b)[4], uint32_t tile, int row, int chunk, int lane) {
    load_matrices(b, Tile<BD>::right(tile, row, chunk, lane));
}
template <int BD>
DEVICE void load_b(uint32_t (&b)[4], uint32_t tile, int row, int chunk, int lane) { load_matrices_transposed(b, Tile<BD>::down(tile, row, chunk, lane)); }

// c [16, 16] = two neighbouring results [16, 8]
template <class T>
DEVICE void mma_pair(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    mma<T>(c[0], a, b[0], b[1]);
    mma<T>(c[1], a, b[2], b[3]);
}

// A result [16, 16] rounded: already the fragment a of the next mma.
template <class T>
DEVICE void as_a(uint32_t (&a)[4], const float (&c)[2][4]) {
    a[0] = pack<T>(c[0][0], c[0][1]);
    a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]);
    a[3] = pack<T>(c[1][2], c[1][3]);
}

// Rounded fragment a [16, 16] to a tile.
template <int BD>
DEVICE void store_a(uint32_t tile, int row, int chunk, const uint32_t (&a)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) shared_store(Tile<BD>::pair(tile, row, chunk, i, lane), a[i]);
}

// Rows of one head in global memory, named directly or by an index.
struct Rows {
    const uint16_t* first;
    int64_t stride;  // numbers from row to row
    const void* index;
    int64_t index_start;
    bool wide_index;

    DEVICE int64_t offset(int row) const {
        if (index == nullptr) return row * stride;
        const int64_t i = index_start + row;
        return stride * (wide_index ? static_cast<const int64_t*>(index)[i] : static_cast<const int32_t*>(index)[i]);
    }
};

// Rows [from, to) into COUNT tiles `tile_bytes` apart, from COUNT matrices `step` numbers apart. Zeros from row `real` on and from column `width` on.
template <int BD, int COUNT>
DEVICE void load_rows(uint32_t tile, int tile_bytes, const Rows& rows, int64_t step, int from, int to, int real, int width, int thread, int threads) {
    constexpr int CHUNKS = Tile<BD>::CHUNKS, BATCH = 4;  // the indices of a batch are on their way together
#pragma unroll 1
    for (int start = from * CHUNKS + thread; start < to * CHUNKS; start += threads * BATCH) {
        int64_t offset[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = start + j * threads, row = i / CHUNKS, chunk = i % CHUNKS;
            offset[j] = row < real && chunk * 8 < width ? rows.offset(row) + chunk * 8 : -1;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int i = start + j * threads, row = i / CHUNKS, chunk = i % CHUNKS;
            if (i >= to * CHUNKS) break;
#pragma unroll
            for (int c = 0; c < COUNT; c++)
                copy_async(Tile<BD>::at(tile + c * tile_bytes, row, chunk), rows.first + c * step + (offset[j] < 0 ? 0 : offset[j]), offset[j] >= 0);
        }
    }
}

// Chunks [chunk, chunk + COUNT) of 16 rows of a tile to global memory, by one warp.
template <int BD, int COUNT>
DEVICE void store_rows(uint32_t tile, const Rows& rows, int row, int chunk, int real, int width, int lane) {
#pragma unroll
    for (int i = lane; i < TILE * COUNT; i += 32) {
        const int r = row + i / COUNT, c = chunk + i % COUNT;
        if (r < real && c * 8 < width) global_store16(const_cast<uint16_t*>(rows.first) + rows.offset(r) + c * 8, shared_load16(Tile<BD>::at(tile, r, c)));
    }
}

// Which head of which image this block works on, and how far its tokens reach.
struct Place {
    int i_b, i_h, i_w;          // image, head, warp
    int lane, thread, threads;
    int real, tiles;            // tokens that are real; the tiles that hold them

    explicit DEVICE Place(const AttentionParams& p) {
        i_b = block_image();
        i_h = block_head();
        thread = thread_id();
        threads = p.warps * 32;
        i_w = thread / 32;
        lane = thread % 32;
        real = p.tokens;
        if (p.lengths != nullptr) {
            const int64_t length = p.wide_lengths ? static_cast<const int64_t*>(p.lengths)[i_b] : static_cast<const int32_t*>(p.lengths)[i_b];
            real = length < p.tokens ? static_cast<int>(length) : p.tokens;
        }
        tiles = tiles_of(real);
    }

    // Matrix `which` (q, k, v) of a packed buffer [batch, rows, 3, heads, width].
    DEVICE Rows packed(const AttentionParams& p, const void* buffer, int which) const {
        const int64_t row = static_cast<int64_t>(p.heads) * p.width;
        return {static_cast<const uint16_t*>(buffer) + (static_cast<int64_t>(i_b) * p.rows * 3 + which) * row + i_h * p.width, 3 * row, p.index,
                static_cast<int64_t>(i_b) * p.tokens, p.wide_index};
    }
    // A merged buffer [batch, tokens, heads, width].
    DEVICE Rows merged(const AttentionParams& p, const void* buffer) const {
        const int64_t row = static_cast<int64_t>(p.heads) * p.width;
        return {static_cast<const uint16_t*>(buffer) + static_cast<int64_t>(i_b) * p.tokens * row + i_h * p.width, row, nullptr, 0, false};
    }
    // This head's row of the log-sum-exp [batch, heads, tokens].
    DEVICE float* lse(const AttentionParams& p) const { return p.lse + (static_cast<int64_t>(i_b) * p.heads + i_h) * p.tokens; }
};

}  // namespace smi

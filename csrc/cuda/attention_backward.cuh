// What both attention backward kernels share. With P = softmax(scale q k^T), O = P v and dO given, per head:
//     dV = P^T dO,   dP = dO v^T,   delta = rowsum(P * dP) = rowsum(O * dO),   dS = P * (dP - delta),   dQ = scale dS k,   dK = scale dS^T q
// P is recomputed as exp(scale q k^T - lse). Every sum has one owner and one order, so there are no atomics and results repeat bit for bit.
#pragma once

#include "tile.cuh"

namespace smi {

// b_c [16, BD] += a [16, 16] times rows [row, row + 16) of a tile
template <class T, int BD>
DEVICE void accumulate(float (&b_c)[BD / 16][2][4], const uint32_t (&b_a)[4], uint32_t tile, int row, int lane) {
#pragma unroll
    for (int d = 0; d < BD / 16; d++) {
        uint32_t b_b[4];  // [16, 16]
        load_b<BD>(b_b, tile, row, 2 * d, lane);
        mma_pair<T>(b_c[d], b_a, b_b);
    }
}

// b_c [16, 16] = rows [row_a, row_a + 16) of one tile times the transpose of rows [row, row + 16) of another
template <class T, int BD>
DEVICE void product(float (&b_c)[2][4], uint32_t tile_a, int row_a, uint32_t tile, int row, int lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) b_c[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < BD / 16; k++) {
        uint32_t b_a[4], b_b[4];  // [16 rows, 16]
        load_a<BD>(b_a, tile_a, row_a, 2 * k, lane);
        load_b_from_transpose<BD>(b_b, tile, row, 2 * k, lane);
        mma_pair<T>(b_c, b_a, b_b);
    }
}

// Rows [row, row + 16) of a gradient, times a factor: rounded into the same rows of a tile that nobody needs any more, then to global memory.
template <class T, int BD>
DEVICE void store_gradient(float (&b_c)[BD / 16][2][4], float factor, uint32_t tile, const Rows& to, int row, int real, int width, int lane) {
#pragma unroll
    for (int d = 0; d < BD / 16; d++) {
#pragma unroll
        for (int i = 0; i < 8; i++) b_c[d][i / 4][i % 4] *= factor;
        uint32_t b_a[4];  // [16, 16]
        as_a<T>(b_a, b_c[d]);
        store_a<BD>(tile, row, 2 * d, b_a, lane);
    }
    sync_warp();
    store_rows<BD, BD / 8>(tile, to, row, 0, real, width, lane);
}

}  // namespace smi

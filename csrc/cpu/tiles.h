// The tile unit of AMX: 16 rows of 32 bfloat16s times 16 pairs of rows of 16 numbers, added to 16 x 16 floats, in one instruction. Where
// SMI_EMULATE_TILES is defined, loops that say the same.
#pragma once

#include "vector.h"

#if defined(SMI_BFLOAT16_PRODUCTS) && (defined(SMI_EMULATE_TILES) || (defined(__AMX_BF16__) && defined(__linux__)))
#define SMI_TILES

namespace tiles {

constexpr int SIDE = 16;         // rows of a tile, and floats in a row
constexpr int DEPTH = 2 * SIDE;  // numbers that one instruction multiplies and adds to each float

#if defined(SMI_EMULATE_TILES)

inline bool allowed() { return true; }

struct Tile {
  char rows[SIDE][64];
};
inline thread_local Tile file[8];

inline void configure() { memset(file, 0, sizeof file); }
inline void release() {}

template <int TILE>
inline void zero() {
  file[TILE] = {};
}
template <int TILE>
inline void load(const void* from, ptrdiff_t stride) {
  for (int i = 0; i < SIDE; ++i) memcpy(file[TILE].rows[i], static_cast<const char*>(from) + i * stride, 64);
}
template <int TILE>
inline void store(void* to, ptrdiff_t stride) {
  for (int i = 0; i < SIDE; ++i) memcpy(static_cast<char*>(to) + i * stride, file[TILE].rows[i], 64);
}

// Pair by pair: the sum of the two products is added to the float, as in the manual's pseudocode; subnormal numbers are kept here.
template <int SUM, int LEFT, int RIGHT>
inline void multiply_add() {
  for (int i = 0; i < SIDE; ++i) {
    float sums[SIDE];
    memcpy(sums, file[SUM].rows[i], 64);
    for (int k = 0; k < SIDE; ++k) {
      bfloat16 left[2], right[2];
      memcpy(left, file[LEFT].rows[i] + 4 * k, 4);
      for (int j = 0; j < SIDE; ++j) {
        memcpy(right, file[RIGHT].rows[k] + 4 * j, 4);
        sums[j] += to_float(left[0]) * to_float(right[0]) + to_float(left[1]) * to_float(right[1]);
      }
    }
    memcpy(file[SUM].rows[i], sums, 64);
  }
}

#else

}  // namespace tiles

#include <sys/syscall.h>
#include <unistd.h>

namespace tiles {

// Whether this process may use the unit: Linux keeps its 8 KB of state for those alone who asked.
inline bool allowed() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

// Eight tiles of 16 rows of 64 bytes, until `release`.
inline void configure() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline void release() { asm volatile("tilerelease"); }

template <int TILE>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
inline void load(const void* from, ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store(void* to, ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int SUM, int LEFT, int RIGHT>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

#endif

}  // namespace tiles
#endif

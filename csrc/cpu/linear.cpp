// Exports of linear.h: float32, and bfloat16 where the processor multiplies it.
#include "linear.h"

extern "C" {

// Numbers of a packed matrix [k, n].
int64_t smi_packed_numbers(int64_t k, int64_t n) { return k * panels(n) * NR; }

void smi_pack_float32(const float* from, int64_t row, int64_t column, const float* scale, int64_t k, int64_t n, float* packed) {
  pack<Floats>(from, row, column, scale, k, n, packed);
}

void smi_linear_float32(const LinearParams<float>* p, Part part) { linear<Floats>(*p, part); }

#if defined(SMI_BFLOAT16_PRODUCTS)
// What multiplies bfloat16s here: 0 nothing, 1 pairs (AVX-512 BF16), 2 the tile unit (AMX) as well.
int32_t smi_bfloat16_products() {
#if defined(SMI_TILES)
  if (tiles::allowed()) return 2;
#endif
  return 1;
}

// k is even.
void smi_pack_bfloat16(const bfloat16* from, int64_t row, int64_t column, const float* scale, int64_t k, int64_t n, bfloat16* packed) {
  pack<Pairs>(from, row, column, scale, k, n, packed);
}

void smi_linear_bfloat16(const LinearParams<bfloat16>* p, Part part) {
#if defined(SMI_TILES)
  if (p->k % Tiles::ALIGN == 0 && tiles::allowed()) return linear<Tiles>(*p, part);
#endif
  linear<Pairs>(*p, part);
}
#else
int32_t smi_bfloat16_products() { return 0; }
#endif
}

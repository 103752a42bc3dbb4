// Vectors of floats as GCC and Clang know them on every processor: loads and stores in three dtypes, exp, sqrt, sums, and rows that end within a vector.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int V = 16;  // floats in a vector
constexpr int MR = 12; // rows of a tile of accumulators: MR x NR and a row of the right factor fill the registers
#elif defined(__AVX__)
constexpr int V = 8;
constexpr int MR = 6;
#else
constexpr int V = 4;
constexpr int MR = 6;
#endif
constexpr int NR = 2 * V;  // columns of a tile
constexpr float WHOLE = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, and that lies in the lower bits

typedef float vec __attribute__((vector_size(4 * V)));
typedef int32_t ivec __attribute__((vector_size(4 * V)));
typedef uint32_t uvec __attribute__((vector_size(4 * V)));
typedef _Float16 fvec __attribute__((vector_size(2 * V)));
typedef uint16_t hvec __attribute__((vector_size(2 * V)));

struct bfloat16 {
  uint16_t bits;
};

inline vec broadcast(float x) { return x - vec{}; }
inline vec multiply_add(vec x, vec y, vec sum) { return sum + x * y; }

inline vec load(const float* p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline vec load(const bfloat16* p) {
  hvec h;
  memcpy(&h, p, sizeof h);
  uvec wide = __builtin_convertvector(h, uvec) << 16;
  vec x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

inline vec load(const _Float16* p) {
  fvec h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vec);
}

inline void store(_Float16* p, vec x) {
  fvec h = __builtin_convertvector(x, fvec);
  memcpy(p, &h, sizeof h);
}

inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }

inline uvec rounded(vec x) {  // to a bfloat16 in the lower half, to nearest, ties to even; for NaN with zeros below the upper half
  uvec u;
  memcpy(&u, &x, sizeof u);
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SMI_BFLOAT16_PRODUCTS  // this processor rounds to bfloat16s, and multiplies and adds pairs of them to floats
#endif

#if defined(SMI_BFLOAT16_PRODUCTS)
inline void store(bfloat16* p, vec x) {  // NaN stays NaN; numbers below the smallest normal one become 0
  const __m256bh h = _mm512_cvtneps_pbh(__m512(x));
  memcpy(p, &h, sizeof h);
}
#else
inline void store(bfloat16* p, vec x) {  // NaN stays NaN
  hvec h = __builtin_convertvector(x == x ? rounded(x) : uvec{} + 0x7fc0u, hvec);
  memcpy(p, &h, sizeof h);
}
#endif

// Two vectors, of bfloat16s only with such NaNs as come of bfloat16s and of arithmetic: with zeros below.
template <class T>
inline void store(T* p, vec left, vec right) {
  store(p, left), store(p + V, right);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline void store(bfloat16* p, vec left, vec right) {
  const __m256i packed = _mm256_packus_epi32(__m256i(rounded(left)), __m256i(rounded(right)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

#define SMI_INTEGERS  // this processor multiplies and adds pairs of 16-bit integers to sums of 32 bits faster than floats
#endif

inline ivec load(const int32_t* p) {
  ivec x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline void store(int32_t* p, ivec x) { memcpy(p, &x, sizeof x); }

struct [[gnu::may_alias]] Pair {  // two 16-bit numbers that one instruction multiplies and adds
  uint16_t first, second;
};

inline ivec load(const Pair* p) { return load(reinterpret_cast<const int32_t*>(p)); }
inline void store(Pair* p, ivec x) { memcpy(p, &x, sizeof x); }

inline ivec broadcast(Pair x) {
  int32_t both;
  memcpy(&both, &x, sizeof both);
  return both - ivec{};
}

#if defined(SMI_INTEGERS)
inline ivec multiply_add(ivec x, ivec y, ivec sum) { return sum + ivec(_mm256_madd_epi16(__m256i(x), __m256i(y))); }

inline ivec pairs(vec first, vec second, vec factor) {  // times factor, rounded to nearest, up to 32767
  const __m256i low = __m256i(first * factor + WHOLE), high = _mm256_slli_epi32(__m256i(second * factor + WHOLE), 16);
  return ivec(_mm256_blend_epi16(low, high, 0xaa));
}

inline void store_pairs(Pair* p, vec left, vec right) {  // of neighbours
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(__m256(left)), _mm256_cvtps_epi32(__m256(right)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
#endif

#if defined(SMI_BFLOAT16_PRODUCTS)
typedef uint16_t places __attribute__((vector_size(4 * V)));  // of 2 V numbers

inline vec multiply_add(ivec x, ivec y, vec sum) { return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(y))); }

// Rounded to nearest, ties to even: those of `left`, then those of `right`.
inline ivec rounded_pairs(vec left, vec right) { return ivec(_mm512_cvtne2ps_pbh(__m512(right), __m512(left))); }

// Pairs of one number of a row and of the one below it: of the lower (0) or upper (1) halves of the rows.
template <int HALF>
inline ivec upright(ivec row, ivec below) {
  places order;
  for (int i = 0; i < 2 * V; ++i) order[i] = uint16_t(i / 2 + HALF * V + i % 2 * 2 * V);
  return ivec(_mm512_permutex2var_epi16(__m512i(row), __m512i(order), __m512i(below)));
}

// The same of two rows of V numbers in one vector.
inline ivec upright(ivec rows) {
  places order;
  for (int i = 0; i < 2 * V; ++i) order[i] = uint16_t(i / 2 + i % 2 * V);
  return ivec(_mm512_permutexvar_epi16(__m512i(order), __m512i(rows)));
}
#endif

#if defined(__AVX512F__)
// 16 x 16 numbers of 32 bits, transposed: within quarters of rows first, then the quarters.
inline void transpose_16x16(ivec* r) {
  __m512i s[V], q[V];
  for (int i = 0; i < V; i += 2) {
    s[i] = _mm512_unpacklo_epi32(__m512i(r[i]), __m512i(r[i + 1]));
    s[i + 1] = _mm512_unpackhi_epi32(__m512i(r[i]), __m512i(r[i + 1]));
  }
  for (int i = 0; i < V; i += 4)
    for (int j = 0; j < 2; ++j) {
      q[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      q[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {  // quarter i of q[4 k + j]: column 4 i + j of rows 4 k to 4 k + 3
    const __m512i even = _mm512_shuffle_i32x4(q[j], q[4 + j], 0x88), odd = _mm512_shuffle_i32x4(q[j], q[4 + j], 0xdd);
    const __m512i below_even = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0x88), below_odd = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0xdd);
    r[j] = ivec(_mm512_shuffle_i32x4(even, below_even, 0x88));
    r[4 + j] = ivec(_mm512_shuffle_i32x4(odd, below_odd, 0x88));
    r[8 + j] = ivec(_mm512_shuffle_i32x4(even, below_even, 0xdd));
    r[12 + j] = ivec(_mm512_shuffle_i32x4(odd, below_odd, 0xdd));
  }
}
#endif

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return float(x); }
inline float to_float(bfloat16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(_Float16* p, float x) { *p = _Float16(x); }
inline void from_float(bfloat16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

// e^x to one unit in the last place; 0 below the smallest normal number, so that exp(-inf) = 0.
inline vec exp(vec x) {
  vec clamped = x > 88.f ? broadcast(88.f) : x;
  vec n = clamped * 1.44269504f + WHOLE;
  ivec exponent;
  memcpy(&exponent, &n, sizeof n);
  n -= WHOLE;
  vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  ivec bits;
  memcpy(&bits, &p, sizeof p);
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof p);
  return x < -87.33f ? vec{} : x == x ? p : x;  // NaN stays NaN
}

// 2^x to one unit in the last place, for x up to 127; 0 below the smallest normal number. NaN stays NaN.
inline vec exp2(vec x) {
  const vec n = x + WHOLE - WHOLE, r = x - n;
  vec p = 1.5345812e-4f * r + 1.3399931e-3f;
  p = p * r + 9.6184890e-3f;
  p = p * r + 5.5503288e-2f;
  p = p * r + 2.4022647e-1f;
  p = p * r + 6.9314721e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  p = vec(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  ivec bits;
  memcpy(&bits, &p, sizeof p);
  bits += __builtin_convertvector(n, ivec) << 23;
  memcpy(&p, &bits, sizeof p);
#endif
  return x < -126.f ? vec{} : p;
}

// 1 / x to two units in the last place, for x whose reciprocal is a normal number.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
  const vec near = vec(_mm512_rcp14_ps(__m512(x)));
  return near * (2.f - x * near);
#else
  return 1.f / x;
#endif
}

inline float sum(vec x) {  // by halves
  float part[V];
  store(part, x);
  for (int n = V / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

inline vec sqrt(vec x) {
  for (int i = 0; i < V; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Rows that end within a vector: body(offset, number of floats), whole vectors first.
template <class Body>
inline void each(int64_t d, Body body) {
  int64_t j = 0;
  for (; j + V <= d; j += V) body(j, V);
  if (j < d) body(j, int(d - j));
}

template <class T>
inline vec get(const T* p, int some) {
  if (some == V) return load(p);
  T part[V] = {};
  memcpy(part, p, some * sizeof(T));
  return load(part);
}

template <class T>
inline void put(T* p, vec x, int some) {
  if (some == V) return store(p, x);
  T part[V];
  store(part, x);
  memcpy(p, part, some * sizeof(T));
}

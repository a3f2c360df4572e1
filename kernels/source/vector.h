/* Sixteen floats at a time, in the compilers' vector extension: AVX-512, AVX2, NEON or plain code, as the target has it. */
#ifndef FUSEBOX_VECTOR_H
#define FUSEBOX_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

INLINE f32x16 load_f32(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_f32(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }
INLINE f32x16 as_f32(u32x16 bits) { f32x16 v; memcpy(&v, &bits, sizeof v); return v; }
INLINE u32x16 as_u32(f32x16 v) { u32x16 bits; memcpy(&bits, &v, sizeof bits); return bits; }
INLINE f32x16 splat(float v) { return (f32x16){0} + v; }

#ifdef __AVX512F__ /* compilers take the general form of these apart, entry by entry */
INLINE f32x16 load_bf16(const uint16_t *p) { return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16); }
INLINE f32x16 load_i8(const int8_t *p) { return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
#else
INLINE f32x16 load_bf16(const uint16_t *p) {
    u16x16 half;
    memcpy(&half, p, sizeof half);
    return as_f32(__builtin_convertvector(half, u32x16) << 16);
}

INLINE f32x16 load_i8(const int8_t *p) {
    i8x16 q;
    memcpy(&q, p, sizeof q);
    return __builtin_convertvector(__builtin_convertvector(q, i32x16), f32x16);
}
#endif

INLINE float one_f32(const float *p) { return *p; }
INLINE float one_i8(const int8_t *p) { return (float)*p; }
INLINE float one_bf16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

INLINE f32x16 choose(i32x16 where, f32x16 yes, f32x16 no) { return as_f32((u32x16)((as_u32(yes) & (u32x16)where) | (as_u32(no) & ~(u32x16)where))); }

/* Round to nearest even, as torch does; NaN stays NaN. */
INLINE uint16_t to_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* The same for sixteen. */
INLINE void store_bf16(uint16_t *p, f32x16 v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v); /* what float holds below 1e-38 becomes zero */
    memcpy(p, &rounded, sizeof rounded);
#else
    u32x16 bits = as_u32(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = as_u32(choose(v == v, as_f32(rounded), as_f32((u32x16){0} + 0x7fc0u)));
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    u16x16 half = __builtin_convertvector(rounded, u16x16);
    memcpy(p, &half, sizeof half);
#endif
#endif
}

INLINE float sum_of(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

INLINE f32x16 highest(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
INLINE f32x16 lowest(f32x16 a, f32x16 b) { return choose(a < b, a, b); }

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays NaN. */
INLINE f32x16 exp_f32(f32x16 x) {
    f32x16 held = lowest(highest(x, splat(-87.3f)), splat(88.3f));
    f32x16 shifted = held * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to whole numbers */
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = held - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32x16 power = __builtin_convertvector(n, i32x16);
    f32x16 out = p * as_f32((u32x16)((power + 127) << 23));
    out = choose(x < splat(-87.3f), splat(0.0f), out);
    return choose(x == x, out, x);
}

#endif

/* As many floats at a time as one register holds, in the compilers' vector extension. What they translate badly is written with intrinsics. */
#ifndef FUSEBOX_VECTOR_H
#define FUSEBOX_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define REGISTERS 16
#else /* NEON, SSE2 or plain code */
#define LANES 4
#define REGISTERS 16
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef int8_t i8v __attribute__((vector_size(LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));

INLINE f32v load_f32(const float *p) { f32v v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_f32(float *p, f32v v) { memcpy(p, &v, sizeof v); }
INLINE f32v as_f32(u32v bits) { f32v v; memcpy(&v, &bits, sizeof v); return v; }
INLINE u32v as_u32(f32v v) { u32v bits; memcpy(&bits, &v, sizeof bits); return bits; }
INLINE f32v splat(float v) { return v - (f32v){0}; }

#if defined(__AVX512F__)
INLINE f32v load_bf16(const uint16_t *p) { return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16); }
INLINE f32v load_i8(const int8_t *p) { return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
#elif defined(__AVX2__)
INLINE f32v load_bf16(const uint16_t *p) { return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16); }
INLINE f32v load_i8(const int8_t *p) { return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
#else
INLINE f32v load_bf16(const uint16_t *p) {
    u16v half;
    memcpy(&half, p, sizeof half);
    return as_f32(__builtin_convertvector(half, u32v) << 16);
}

INLINE f32v load_i8(const int8_t *p) {
    i8v q;
    memcpy(&q, p, sizeof q);
    return __builtin_convertvector(__builtin_convertvector(q, i32v), f32v);
}
#endif

/* sum + a * b, rounded once where the target can: written out, so that it is so wherever it is inlined. */
INLINE f32v added(f32v sum, f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

INLINE float one_f32(const float *p) { return *p; }
INLINE float one_i8(const int8_t *p) { return (float)*p; }
INLINE float one_bf16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

INLINE f32v choose(i32v where, f32v yes, f32v no) { return as_f32((u32v)((as_u32(yes) & (u32v)where) | (as_u32(no) & ~(u32v)where))); }

/* Round to nearest even, as torch does; NaN stays NaN. */
INLINE uint16_t to_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* The same for a vector. */
INLINE void store_bf16(uint16_t *p, f32v v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v); /* what float holds below 1e-38 becomes zero */
    memcpy(p, &rounded, sizeof rounded);
#else
    u32v bits = as_u32(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = as_u32(choose(v == v, as_f32(rounded), as_f32((u32v){0} + 0x7fc0u)));
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)rounded), _mm256_extracti128_si256((__m256i)rounded, 1)));
#else
    u16v half = __builtin_convertvector(rounded, u16v);
    memcpy(p, &half, sizeof half);
#endif
#endif
}

INLINE float sum_of(f32v v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

INLINE f32v highest(f32v a, f32v b) { return choose(a > b, a, b); }
INLINE f32v lowest(f32v a, f32v b) { return choose(a < b, a, b); }

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays NaN. */
INLINE f32v exp_f32(f32v x) {
    f32v held = lowest(highest(x, splat(-87.3f)), splat(88.3f));
    f32v shifted = held * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to whole numbers */
    f32v n = shifted - 12582912.0f;
    f32v r = held - n * 0.693359375f + n * 2.12194440e-4f;
    f32v p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32v power = __builtin_convertvector(n, i32v);
    f32v out = p * as_f32((u32v)((power + 127) << 23));
    out = choose(x < splat(-87.3f), splat(0.0f), out);
    return choose(x == x, out, x);
}

#endif

/* Reading packed weights. */
#ifndef FUSEBOX_PACKED_H
#define FUSEBOX_PACKED_H

#include "fusebox.h"
#include "vector.h"

#define MOST (TILE / LANES) /* vectors of a tile */
#define HELD 8 /* vectors of sums that registers hold, with room to hide the time that an addition takes */

INLINE int64_t tiles_of(const struct matrix *w) { return (w->out + TILE - 1) / TILE; }
INLINE int64_t tile_stride_of(const struct matrix *w) { return w->row_tiles ? TILE : w->in * TILE; }
INLINE int64_t row_stride_of(const struct matrix *w) { return w->row_tiles ? w->row_tiles * TILE : TILE; }

/* int4: one input channel's codes of a tile are sixteen words of 32 bits; output j is nibble j / 16 of word j % 16. */
#define WORDS (TILE / 8)
#define WORD_VECTORS (WORDS / LANES)

struct codes {
    u32v words[WORD_VECTORS];
};

INLINE struct codes load_codes(const uint32_t *p) {
    struct codes c;
    for (int i = 0; i < WORD_VECTORS; i++) memcpy(&c.words[i], p + i * LANES, sizeof c.words[i]); /* one by one: what is copied in other pieces has to pass through memory */
    return c;
}

/* The codes of vector `v` of the tile's outputs as numbers: nibbles minus 8. `v` is best a constant. */
INLINE f32v unpacked(const struct codes *c, int v) {
    const u32v words = c->words[v % WORD_VECTORS];
    const int shift = v / WORD_VECTORS * 4;
#ifdef __AVX512F__
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (f32v)_mm512_permutexvar_ps((__m512i)(words >> shift), table); /* reads the low four bits only */
#else
    return __builtin_convertvector((i32v)((words ^ 0x88888888u) << (28 - shift)) >> 28, f32v); /* code + 8, its top bit turned, is the code in four signed bits */
#endif
}

/* For sums of many rows the same with fewer operations, where there is no table of sixteen: (code + 8) * 16^nibble. What `unmasked` makes of their
 * sum is that of code * x, `total` being the sum of x. Vectors of the low half of the words only: more would not be exact. */
#ifdef __AVX512F__
INLINE f32v masked(const struct codes *c, int v) { return unpacked(c, v); }
INLINE f32v unmasked(f32v sum, int v, float total) { (void)v, (void)total; return sum; }
#else
INLINE f32v masked(const struct codes *c, int v) { return __builtin_convertvector((i32v)(c->words[v % WORD_VECTORS] & 15u << v / WORD_VECTORS * 4), f32v); }
INLINE f32v unmasked(f32v sum, int v, float total) { return sum * (1.0f / (float)(1 << v / WORD_VECTORS * 4)) - splat(8.0f * total); }
#endif

#endif

/* Reading packed weights. */
#ifndef FUSEBOX_PACKED_H
#define FUSEBOX_PACKED_H

#include "fusebox.h"
#include "vector.h"

#define MOST (TILE / LANES)

INLINE int64_t tiles_of(const struct matrix *w) { return (w->out + TILE - 1) / TILE; }
INLINE int64_t tile_stride_of(const struct matrix *w) { return w->row_tiles ? TILE : w->in * TILE; }
INLINE int64_t row_stride_of(const struct matrix *w) { return w->row_tiles ? w->row_tiles * TILE : TILE; }

/* The four-bit codes of 16 outputs as numbers: nibble `v` of each 32-bit word, minus 8. */
INLINE f32x16 unpacked(u32x16 words, int v) {
#ifdef __AVX512F__
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (f32x16)_mm512_permutexvar_ps((__m512i)(words >> (4 * v)), table); /* reads the low four bits only */
#else
    return __builtin_convertvector((i32x16)((words >> (4 * v)) & 15u), f32x16) - 8.0f;
#endif
}

#endif

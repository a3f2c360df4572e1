/* Packed weights and tokens laid out for a product with many tokens: blocks that stay in the caches while they are multiplied. */
#ifndef FUSEBOX_PANEL_H
#define FUSEBOX_PANEL_H

#include "packed.h"

#define STRIP 32  /* outputs multiplied at a time: two matrix registers, or some vectors */
#define STRIP_VECTORS (STRIP / LANES)
#define STRIPS (TILE / STRIP)
#define ROWS 16   /* tokens of a block: the rows of a matrix register */
#define CHUNK 32  /* input channels of a matrix register of bfloat16: the padding of both sides */
#define DEPTH 640 /* input channels unpacked at a time, at most: a strip of them lies in the first-level cache, all tokens' in the second */

#define PAIRED ((DEPTH / 2 + 1) * 2 * LANES) /* bfloat16 from one vector of outputs to the next; a line more than needed, so that they do not share cache sets */

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Where one input channel's weights of a strip begin, with which words and scales in int4; goes from channel to channel. */
struct channel {
    int64_t at, group_end;
    struct codes codes;
    int strip;
    const uint16_t *scales;
};

INLINE void read_channel(struct channel *c, const struct matrix *w, const int kind, int64_t tile, int strip, int64_t row) {
    c->at = tile * tile_stride_of(w) + row * row_stride_of(w) + strip * STRIP;
    if (kind != INT4) return;
    c->codes = load_codes((const uint32_t *)w->data + (c->at - strip * STRIP) / 8);
    c->strip = strip;
    if (row < c->group_end) return;
    int64_t groups = (w->in + w->group - 1) / w->group, group = row / w->group;
    c->scales = (const uint16_t *)w->scale + (tile * groups + group) * TILE + strip * STRIP;
    c->group_end = (group + 1) * w->group;
}

/* A vector of outputs' weights as numbers; int8 not scaled. */
INLINE f32v weights_at(const struct channel *c, const struct matrix *w, const int kind, const int v) {
    switch (kind) {
    case FLOAT32: return load_f32((const float *)w->data + c->at + v * LANES);
    case BFLOAT16: return load_bf16((const uint16_t *)w->data + c->at + v * LANES);
    case INT8: return load_i8((const int8_t *)w->data + c->at + v * LANES);
    default: return unpacked(&c->codes, c->strip * STRIP_VECTORS + v) * load_bf16(c->scales + v * LANES);
    }
}

/* panel[DEPTH][STRIP] float: a strip's channels `first` to `last`. */
INLINE void unpack_f32(float *panel, const struct matrix *w, const int kind, int64_t tile, int strip, int64_t first, int64_t last) {
    struct channel c = {0};
    for (int64_t row = first; row < last; row++, panel += STRIP) {
        read_channel(&c, w, kind, tile, strip, row);
        for (int v = 0; v < STRIP_VECTORS; v++) store_f32(panel + v * LANES, weights_at(&c, w, kind, v));
    }
}

/* Rows [blocks][in padded][ROWS] float of x [tokens][in]; missing tokens and channels are zero. */
INLINE void lay_out_f32(float *to, const void *x, const int is_bf16, int64_t tokens, int64_t in, int64_t block) {
    int64_t depth = padded(in, CHUNK);
    to += block * depth * ROWS;
    memset(to, 0, (size_t)(depth * ROWS) * sizeof *to);
    for (int64_t r = 0; r < ROWS && block * ROWS + r < tokens; r++) {
        int64_t at = (block * ROWS + r) * in;
        for (int64_t k = 0; k < in; k++) to[k * ROWS + r] = is_bf16 ? one_bf16((const uint16_t *)x + at + k) : ((const float *)x)[at + k];
    }
}

#ifdef __AVX512BF16__
/* Two input channels' weights side by side, the first one's below. Integers and bfloat16 are exact; others round to nearest even. */
INLINE __m512i paired(f32v low, f32v high, const int kind) {
    if (kind == INT8 || kind == BFLOAT16) return (__m512i)((as_u32(low) >> 16) | (as_u32(high) & 0xffff0000u));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* panel[2 vectors][DEPTH / 2][16 outputs][2 channels]: a strip's channels `first` to `last`, made a whole number of chunks with zeros. */
INLINE void unpack_bf16(uint16_t *panel, const struct matrix *w, const int kind, int64_t tile, int strip, int64_t first, int64_t last) {
    struct channel low = {0}, high = {0};
    int64_t row = first;
    for (; row + 1 < last; row += 2, panel += 2 * LANES) {
        read_channel(&low, w, kind, tile, strip, row);
        read_channel(&high, w, kind, tile, strip, row + 1);
        for (int v = 0; v < STRIP_VECTORS; v++) _mm512_store_si512(panel + v * PAIRED, paired(weights_at(&low, w, kind, v), weights_at(&high, w, kind, v), kind));
    }
    if (row < last) read_channel(&low, w, kind, tile, strip, row);
    for (const int64_t end = first + padded(last - first, CHUNK); row < end; row += 2, panel += 2 * LANES)
        for (int v = 0; v < STRIP_VECTORS; v++) _mm512_store_si512(panel + v * PAIRED, paired(row < last ? weights_at(&low, w, kind, v) : (f32v){0}, (f32v){0}, kind));
}

/* Rows [blocks][in padded / CHUNK][ROWS][CHUNK] of bfloat16; missing tokens and channels are zero. */
INLINE void lay_out_bf16(uint16_t *to, const uint16_t *x, int64_t tokens, int64_t in, int64_t block) {
    to += block * padded(in, CHUNK) * ROWS;
    for (int64_t k = 0; k < in; k += CHUNK, to += ROWS * CHUNK) {
        const int64_t width = in - k < CHUNK ? in - k : CHUNK;
        for (int64_t r = 0; r < ROWS; r++) {
            const int64_t token = block * ROWS + r;
            const __mmask32 here = token < tokens ? 0xffffffffu >> (CHUNK - width) : 0;
            _mm512_store_si512(to + r * CHUNK, _mm512_maskz_loadu_epi16(here, x + (here ? token * in + k : 0)));
        }
    }
}
#endif

#endif

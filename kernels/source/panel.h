/* Packed weights and tokens laid out for a product with many tokens: blocks that stay in the caches while they are multiplied. */
#ifndef FUSEBOX_PANEL_H
#define FUSEBOX_PANEL_H

#include "packed.h"

#define STRIP 32  /* outputs multiplied at a time: two vectors, or two matrix registers */
#define STRIPS (TILE / STRIP)
#define ROWS 16   /* tokens of a block: the rows of a matrix register */
#define CHUNK 32  /* input channels of a matrix register of bfloat16: the padding of both sides */
#define DEPTH 512 /* input channels unpacked at a time: a strip of them lies in the first-level cache, a tile in the second */

#define PAIRED ((DEPTH / 2 + 1) * 2 * LANES) /* entries from one vector of outputs to the next; a line more than needed, so that they do not share cache sets */

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* 16 outputs' weights of one input channel as numbers; int8 not scaled. words, scales: of int4, at this channel. */
INLINE f32x16 weights_at(const struct matrix *w, const int kind, int64_t at, u32x16 words, const uint16_t *scales, int v) {
    switch (kind) {
    case FLOAT32: return load_f32((const float *)w->data + at + v * LANES);
    case BFLOAT16: return load_bf16((const uint16_t *)w->data + at + v * LANES);
    case INT8: return load_i8((const int8_t *)w->data + at + v * LANES);
    default: return unpacked(words, v) * load_bf16(scales + v * LANES);
    }
}

/* Where one input channel's weights of a tile begin, and with which words and scales; goes from channel to channel. */
struct channel {
    int64_t at, group_end;
    u32x16 words;
    const uint16_t *scales;
};

INLINE void read_channel(struct channel *c, const struct matrix *w, const int kind, int64_t tile, int64_t row) {
    c->at = tile * tile_stride_of(w) + row * row_stride_of(w);
    if (kind != INT4) return;
    memcpy(&c->words, (const uint32_t *)w->data + c->at / 8, sizeof c->words);
    if (row < c->group_end) return;
    int64_t groups = (w->in + w->group - 1) / w->group, group = row / w->group;
    c->scales = (const uint16_t *)w->scale + (tile * groups + group) * TILE;
    c->group_end = (group + 1) * w->group;
}

/* panel[DEPTH][TILE] float: vectors `from` to `to` of a tile's channels from `first` on, zero beyond `last`. */
INLINE void unpack_f32(float *panel, const struct matrix *w, const int kind, int64_t tile, int64_t first, int64_t last, int from, int to) {
    struct channel c = {0};
    for (int64_t row = first; row < last; row++) {
        read_channel(&c, w, kind, tile, row);
        for (int v = from; v < to; v++) store_f32(panel + (row - first) * TILE + v * LANES, weights_at(w, kind, c.at, c.words, c.scales, v));
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
INLINE __m512i paired(f32x16 low, f32x16 high, const int kind) {
    if (kind == INT8 || kind == BFLOAT16) return (__m512i)((as_u32(low) >> 16) | (as_u32(high) & 0xffff0000u));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* panel[vectors][DEPTH / 2][16 outputs][2 channels]; `last - first` is made a whole number of chunks with zeros. */
INLINE void unpack_bf16(uint16_t *panel, const struct matrix *w, const int kind, int64_t tile, int64_t first, int64_t last, int from, int to) {
    struct channel low = {0}, high = {0};
    const int64_t end = first + padded(last - first, CHUNK);
    for (int64_t row = first; row < end; row += 2) {
        const int some = row < last, both = row + 1 < last;
        if (some) read_channel(&low, w, kind, tile, row);
        if (both) read_channel(&high, w, kind, tile, row + 1);
        for (int v = from; v < to; v++) {
            f32x16 a = some ? weights_at(w, kind, low.at, low.words, low.scales, v) : (f32x16){0};
            f32x16 b = both ? weights_at(w, kind, high.at, high.words, high.scales, v) : (f32x16){0};
            _mm512_storeu_si512(panel + v * PAIRED + (row - first) * LANES, paired(a, b, kind));
        }
    }
}

/* Rows [blocks][in padded / CHUNK][ROWS][CHUNK] of bfloat16; missing tokens and channels are zero. */
INLINE void lay_out_bf16(uint16_t *to, const uint16_t *x, int64_t tokens, int64_t in, int64_t block) {
    to += block * padded(in, CHUNK) * ROWS;
    for (int64_t k = 0; k < in; k += CHUNK, to += ROWS * CHUNK) {
        size_t width = (size_t)(in - k < CHUNK ? in - k : CHUNK) * sizeof *to;
        for (int64_t r = 0; r < ROWS; r++) {
            const int here = block * ROWS + r < tokens;
            if (!here || width < CHUNK * sizeof *to) memset(to + r * CHUNK, 0, CHUNK * sizeof *to);
            if (here) memcpy(to + r * CHUNK, x + (block * ROWS + r) * in + k, width);
        }
    }
}
#endif

#endif

/* What the C files share: the packed matrix, and the operations that the step runs. Mirrored in kernels/structures.py. */
#ifndef FUSEBOX_H
#define FUSEBOX_H

#include <stdint.h>

#define TILE 128 /* outputs side by side in packed weights; the same as in packing.py */
#define BLOCK 64 /* outputs that a thread takes at least: half a tile */
#define MOST_TOKENS 4
#define GROUP 4 /* query heads that go through the cache together; the same in structures.py */

enum { FLOAT32, BFLOAT16, INT8, INT4 };

/* Packed weights: TILE entries of one input channel and one tile side by side. row_tiles: 0 for [tiles][in][TILE]; else [in][row_tiles][TILE],
 * so that a channel's weights are one long piece, of which this matrix may be a part. scale: float [tiles * TILE] for INT8, bfloat16
 * [tiles][groups][TILE] for INT4. */
struct matrix {
    int64_t kind, in, out, group, row_tiles;
    const void *data, *scale;
    const float *bias;
};

/* y = alpha * (W x + bias), or y += it, for outputs of the blocks from `first` to `last` and `tokens` vectors side by side.
 * rows: input channels to read, ascending, `count` of them; NULL reads all. x and y go on by x_stride and y_stride a token. */
void fusebox_gemv_blocks(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         int64_t tokens, int64_t first, int64_t last, float alpha, int64_t add);

/* Sums over input channels `first` to `last` (of `rows`, where given) for all outputs: sums[tokens][tiles * TILE], `stride` apart; int8 not yet
 * scaled. Several parts are joined into y = alpha * (scale * their sum + bias), or y += it. */
void fusebox_gemv_part(const struct matrix *w, float *sums, int64_t stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t first, int64_t last, int64_t tokens);
void fusebox_gemv_long_rows(const struct matrix *w, float *sums, const float *x, const int32_t *rows, int64_t first, int64_t last);
void fusebox_join(float *y, const float *sums, int64_t parts, int64_t stride, const float *scale, const float *bias, int64_t first, int64_t last, float alpha, int64_t add);

int64_t fusebox_nonzero(int32_t *rows, const float *x, int64_t n);
int64_t fusebox_above(int32_t *rows, const float *x, int64_t n, float threshold);
int64_t fusebox_largest(int32_t *rows, const float *x, int64_t n, int64_t keep);

void fusebox_norm(float *out, const float *x, const float *gain, const float *shift, int64_t segments, int64_t n, float eps, int64_t centre);
void fusebox_rope(float *x, const float *cosine, const float *sine, int64_t heads, int64_t dim, int64_t turned);
void fusebox_activate(float *out, const float *x, const float *gated, int64_t n, int64_t kind);

/* Cached keys and values of one layer, token-major: keys [tokens][key_heads][dim], values [tokens][value_heads][dim_v].
 * kind: FLOAT32, BFLOAT16, or INT8 with one scale a token and head. */
struct cached {
    int64_t kind, key_heads, value_heads, dim, dim_v;
    void *keys, *values;
    float *key_scales, *value_scales;
};

void fusebox_append(const struct cached *kv, int64_t is_value, int64_t token, int64_t head, const float *x);
void fusebox_attend(float *out, const float *q, int64_t q_stride, const struct cached *kv, int64_t head, int64_t last, int64_t heads, int64_t first, int64_t length, float scale,
                    float *scores);

#endif

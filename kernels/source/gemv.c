/* y = W x for one to four vectors x, W packed: whole tiles at a time, whose outputs stay in registers while the input channels go by.
 *
 * Threads share out outputs, and then nothing is summed across threads; or input channels (gemv_part), where outputs do not divide
 * evenly or a channel's weights are one long piece (gemv_rows.c), and then the parts' sums are joined.
 */
#include "fusebox.h"
#include "packed.h"
#include <omp.h>
#include <stdlib.h>

#define AHEAD 12 /* chosen rows between a prefetch and its use */
#define FAR 8192 /* bytes, where all rows are read: the processor's own reading ahead keeps too few lines on their way */

INLINE void finish(float *y, const f32v *sum, const float *scale, const float *bias, int count, float alpha, int64_t add) {
    float out[TILE];
    for (int v = 0; v * LANES < count; v++) store_f32(out + v * LANES, sum[v]);
    for (int j = 0; j < count; j++) {
        float value = alpha * (out[j] * (scale ? scale[j] : 1.0f) + (bias ? bias[j] : 0.0f));
        y[j] = add ? y[j] + value : value;
    }
}

INLINE void fetch(const char *next, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

/* One function a dtype: the same loop, another load. `vectors` and `tokens` are constants at every call. */
#define DEFINE_SUMS(NAME, TYPE, LOAD)                                                                                     \
    INLINE void NAME(f32v *restrict sum, const float *restrict x, int64_t x_stride, const TYPE *restrict base, int64_t row_stride, \
                     const int32_t *restrict rows, int64_t first, int64_t last, const int vectors, const int tokens) {                  \
        f32v s[MOST_TOKENS * HELD] = {0};                                                                               \
        for (int64_t r = first; r < last; r++) {                                                                          \
            int64_t row = rows ? (int64_t)rows[r] : r;                                                                    \
            const TYPE *w = base + row * row_stride;                                                                      \
            if (!rows) fetch((const char *)w + FAR, vectors * LANES * sizeof(TYPE));                                      \
            else if (r + AHEAD < last) fetch((const char *)(base + (int64_t)rows[r + AHEAD] * row_stride), vectors * LANES * sizeof(TYPE)); \
            _Pragma("GCC unroll 8")                                                                                       \
            for (int v = 0; v < vectors; v++) {                                                                           \
                f32v value = LOAD(w + v * LANES);                                                                       \
                _Pragma("GCC unroll 4")                                                                                   \
                for (int t = 0; t < tokens; t++) s[t * vectors + v] = added(s[t * vectors + v], value, splat(x[t * x_stride + row]));                \
            }                                                                                                             \
        }                                                                                                                 \
        for (int i = 0; i < tokens * vectors; i++) sum[i] = s[i];                                                         \
    }

DEFINE_SUMS(sums_f32, float, load_f32)
DEFINE_SUMS(sums_bf16, uint16_t, load_bf16)
DEFINE_SUMS(sums_i8, int8_t, load_i8)

/* int4, from vector `from` of a tile on, whose words begin at `base`. */
INLINE void sums_i4(f32v *restrict sum, const float *restrict x, int64_t x_stride, const uint32_t *restrict base, int64_t row_stride,
                    const uint16_t *restrict scales, int64_t group, int from, const int32_t *restrict rows, int64_t first, int64_t last, const int vectors, const int tokens) {
    f32v s[MOST_TOKENS * HELD] = {0};
    int64_t r = first;
    while (r < last) {
        int64_t at = (rows ? (int64_t)rows[r] : r) / group, end = (at + 1) * group;
        f32v part[MOST_TOKENS * HELD] = {0};
        float total[MOST_TOKENS] = {0};
        for (; r < last; r++) {
            int64_t row = rows ? (int64_t)rows[r] : r;
            if (row >= end) break;
            if (!rows) fetch((const char *)(base + row * row_stride) + FAR, WORDS * sizeof *base);
            else if (r + AHEAD < last) __builtin_prefetch(base + (int64_t)rows[r + AHEAD] * row_stride);
            struct codes codes = load_codes(base + row * row_stride);
            if (vectors < MOST)
                for (int i = 0; i < WORD_VECTORS; i++) codes.words[i] >>= from / WORD_VECTORS * 4;
            for (int t = 0; t < tokens; t++) total[t] += x[t * x_stride + row];
            _Pragma("GCC unroll 8")
            for (int v = 0; v < vectors; v++) {
                f32v value = masked(&codes, v);
                _Pragma("GCC unroll 4")
                for (int t = 0; t < tokens; t++) part[t * vectors + v] = added(part[t * vectors + v], value, splat(x[t * x_stride + row]));
            }
        }
        for (int v = 0; v < vectors; v++) {
            f32v scale = load_bf16(scales + at * TILE + (from + v) * LANES);
            for (int t = 0; t < tokens; t++) s[t * vectors + v] = added(s[t * vectors + v], unmasked(part[t * vectors + v], v, total[t]), scale);
        }
    }
    for (int i = 0; i < tokens * vectors; i++) sum[i] = s[i];
}

/* Sums of `vectors` vectors of outputs from vector `at` on, counted over all tiles, over rows `first` to `last`, for `tokens` tokens; int8 not yet scaled. */
INLINE void vector_sums(f32v *sum, const struct matrix *w, const float *x, int64_t x_stride, const int32_t *rows, int64_t first, int64_t last,
                        int64_t at, const int vectors, const int tokens) {
    int64_t tile = at / MOST, row = row_stride_of(w), begin = tile * tile_stride_of(w) + at % MOST * LANES;
    switch (w->kind) {
    case FLOAT32: sums_f32(sum, x, x_stride, (const float *)w->data + begin, row, rows, first, last, vectors, tokens); break;
    case BFLOAT16: sums_bf16(sum, x, x_stride, (const uint16_t *)w->data + begin, row, rows, first, last, vectors, tokens); break;
    case INT8: sums_i8(sum, x, x_stride, (const int8_t *)w->data + begin, row, rows, first, last, vectors, tokens); break;
    default: {
        int64_t groups = (w->in + w->group - 1) / w->group;
        const uint32_t *words = (const uint32_t *)w->data + tile * tile_stride_of(w) / 8;
        sums_i4(sum, x, x_stride, words, row / 8, (const uint16_t *)w->scale + tile * groups * TILE, w->group, (int)(at % MOST), rows, first, last, vectors, tokens);
    }
    }
}

#define ALL_HELD (REGISTERS / 16) /* tokens at most for which HELD vectors of outputs stay in registers; half of them for more */

/* The same for numbers known only now: the one place where each pair of them is compiled. */
static __attribute__((noinline)) void sums_of(f32v *sum, const struct matrix *w, const float *x, int64_t x_stride, const int32_t *rows, int64_t first, int64_t last,
                                              int64_t at, int vectors, int64_t tokens) {
    if (tokens == 1 && vectors == HELD) vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD, 1);
    else if (tokens == 2 && vectors == HELD && ALL_HELD >= 2) vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD, 2);
    else if (tokens == 1 && LANES > BLOCK / HELD) vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD / 2, 1);
    else if (tokens == 2) vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD / 2, 2);
    else if (tokens == 3) vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD / 2, 3);
    else vector_sums(sum, w, x, x_stride, rows, first, last, at, HELD / 2, 4);
}

/* Vectors of outputs that are summed at a time from vector `at` on, of those up to `last`; they lie in one tile. */
INLINE int together(int64_t tokens, int64_t at, int64_t last) {
    const int fits = at + HELD <= last && at % MOST + HELD <= MOST;
    return fits && tokens <= ALL_HELD ? HELD : HELD / 2;
}

void fusebox_gemv_part(const struct matrix *w, float *sums, int64_t stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t first, int64_t last, int64_t tokens) {
    if (w->row_tiles) {
        for (int64_t t = 0; t < tokens; t++) fusebox_gemv_long_rows(w, sums + t * stride, x + t * x_stride, rows, first, last);
        return;
    }
    const int64_t end = tiles_of(w) * MOST;
    for (int64_t at = 0, vectors; at < end; at += vectors) {
        f32v sum[MOST_TOKENS * HELD];
        vectors = together(tokens, at, end);
        sums_of(sum, w, x, x_stride, rows, first, last, at, (int)vectors, tokens);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t v = 0; v < vectors; v++) store_f32(sums + t * stride + (at + v) * LANES, sum[t * vectors + v]);
    }
}

void fusebox_join(float *y, const float *sums, int64_t parts, int64_t stride, const float *scale, const float *bias, int64_t first, int64_t last, float alpha, int64_t add) {
    for (int64_t j = first; j < last; j += LANES) {
        float out[LANES] = {0};
        int width = LANES < last - j ? LANES : (int)(last - j);
        for (int64_t p = 0; p < parts; p++)
            for (int k = 0; k < width; k++) out[k] += sums[p * stride + j + k];
        for (int k = 0; k < width; k++) {
            float value = alpha * (out[k] * (scale ? scale[j + k] : 1.0f) + (bias ? bias[j + k] : 0.0f));
            y[j + k] = add ? y[j + k] + value : value;
        }
    }
}

void fusebox_gemv_blocks(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         int64_t tokens, int64_t first, int64_t last, float alpha, int64_t add) {
    const int64_t end = last * (BLOCK / LANES);
    for (int64_t at = first * (BLOCK / LANES), vectors; at < end && at * LANES < w->out; at += vectors) {
        f32v sum[MOST_TOKENS * HELD];
        vectors = together(tokens, at, end);
        sums_of(sum, w, x, x_stride, rows, 0, count, at, (int)vectors, tokens);
        int64_t start = at * LANES, width = vectors * LANES < w->out - start ? vectors * LANES : w->out - start;
        const float *scale = w->kind == INT8 ? (const float *)w->scale + start : 0, *bias = w->bias ? w->bias + start : 0;
        for (int64_t t = 0; t < tokens; t++) finish(y + t * y_stride + start, sum + t * vectors, scale, bias, (int)width, alpha, add);
    }
}

/* One product on its own, shared out over torch's threads. */
void fusebox_gemv(const struct matrix *w, float *y, const float *x, const int32_t *rows, int64_t count) {
    int64_t blocks = (w->out + BLOCK - 1) / BLOCK, width = tiles_of(w) * TILE, most = omp_get_max_threads(), ran = 1;
    float *sums = w->row_tiles ? malloc((size_t)(most * width) * sizeof *sums) : 0;
    _Pragma("omp parallel num_threads((int)most)")
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        if (sums) fusebox_gemv_part(w, sums + thread * width, 0, x, 0, rows, count * thread / threads, count * (thread + 1) / threads, 1);
        else fusebox_gemv_blocks(w, y, 0, x, 0, rows, count, 1, blocks * thread / threads, blocks * (thread + 1) / threads, 1.0f, 0);
        if (!thread) ran = threads;
    }
    if (sums) fusebox_join(y, sums, ran, width, w->kind == INT8 ? w->scale : 0, w->bias, 0, w->out, 1.0f, 0);
    free(sums);
}

int64_t fusebox_tile(void) { return TILE; }

/* y = W x for one to four vectors x, W packed tile by tile.
 *
 * One input channel's weights of a tile are one contiguous piece. The outputs of a block stay in registers while the rows go
 * by; threads share out blocks, and nothing is summed across threads.
 */
#include "fusebox.h"
#include "vector.h"

#define AHEAD 12 /* rows between a prefetch and its use */
#define MOST (TILE / LANES)

INLINE void finish(float *y, const f32x16 *sum, const float *scale, const float *bias, int count, float alpha, int64_t add) {
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
    INLINE void NAME(f32x16 *restrict sum, const float *restrict x, int64_t x_stride, const TYPE *restrict base,          \
                     const int32_t *restrict rows, int64_t count, const int vectors, const int tokens) {                  \
        f32x16 s[MOST_TOKENS * MOST] = {0};                                                                               \
        for (int64_t r = 0; r < count; r++) {                                                                             \
            int64_t row = rows ? (int64_t)rows[r] : r;                                                                    \
            if (rows && r + AHEAD < count) fetch((const char *)(base + (int64_t)rows[r + AHEAD] * TILE), vectors * LANES * sizeof(TYPE)); \
            const TYPE *w = base + row * TILE;                                                                            \
            _Pragma("GCC unroll 8")                                                                                       \
            for (int v = 0; v < vectors; v++) {                                                                           \
                f32x16 value = LOAD(w + v * LANES);                                                                       \
                _Pragma("GCC unroll 4")                                                                                   \
                for (int t = 0; t < tokens; t++) s[t * vectors + v] += value * x[t * x_stride + row];                     \
            }                                                                                                             \
        }                                                                                                                 \
        for (int i = 0; i < tokens * vectors; i++) sum[i] = s[i];                                                         \
    }

DEFINE_SUMS(sums_f32, float, load_f32)
DEFINE_SUMS(sums_bf16, uint16_t, load_bf16)
DEFINE_SUMS(sums_i8, int8_t, load_i8)

/* The four-bit codes of 16 outputs as numbers: nibble `v` of each 32-bit word, minus 8. */
INLINE f32x16 unpacked(u32x16 words, int v) {
#ifdef __AVX512F__
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (f32x16)_mm512_permutexvar_ps((__m512i)(words >> (4 * v)), table); /* reads the low four bits only */
#else
    return __builtin_convertvector((i32x16)((words >> (4 * v)) & 15u), f32x16) - 8.0f;
#endif
}

/* int4: [tiles][in][TILE / 8] words of 32 bits; output j is nibble j / 16 of word j % 16. */
INLINE void sums_i4(f32x16 *restrict sum, const float *restrict x, int64_t x_stride, const uint32_t *restrict base, const uint16_t *restrict scales,
                    int64_t group, int half, const int32_t *restrict rows, int64_t count, const int vectors, const int tokens) {
    f32x16 s[MOST_TOKENS * MOST] = {0};
    int64_t r = 0;
    while (r < count) {
        int64_t at = (rows ? (int64_t)rows[r] : r) / group, end = (at + 1) * group;
        f32x16 part[MOST_TOKENS * MOST] = {0};
        for (; r < count; r++) {
            int64_t row = rows ? (int64_t)rows[r] : r;
            if (row >= end) break;
            if (rows && r + AHEAD < count) __builtin_prefetch(base + (int64_t)rows[r + AHEAD] * LANES);
            u32x16 words;
            memcpy(&words, base + row * LANES, sizeof words);
            if (vectors < MOST && half) words >>= 16;
            _Pragma("GCC unroll 8")
            for (int v = 0; v < vectors; v++) {
                f32x16 value = unpacked(words, v);
                _Pragma("GCC unroll 4")
                for (int t = 0; t < tokens; t++) part[t * vectors + v] += value * x[t * x_stride + row];
            }
        }
        for (int v = 0; v < vectors; v++) {
            f32x16 scale = load_bf16(scales + at * TILE + (half * MOST / 2 + v) * LANES);
            for (int t = 0; t < tokens; t++) s[t * vectors + v] += part[t * vectors + v] * scale;
        }
    }
    for (int i = 0; i < tokens * vectors; i++) sum[i] = s[i];
}

/* `vectors` * 16 outputs from output `half` * BLOCK of a tile, for `tokens` tokens. */
INLINE void outputs(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                    int64_t tile, int half, float alpha, int64_t add, const int vectors, const int tokens) {
    f32x16 sum[MOST_TOKENS * MOST];
    int64_t start = tile * TILE + half * BLOCK, at = tile * w->in * TILE + half * BLOCK;
    switch (w->kind) {
    case FLOAT32: sums_f32(sum, x, x_stride, (const float *)w->data + at, rows, count, vectors, tokens); break;
    case BFLOAT16: sums_bf16(sum, x, x_stride, (const uint16_t *)w->data + at, rows, count, vectors, tokens); break;
    case INT8: sums_i8(sum, x, x_stride, (const int8_t *)w->data + at, rows, count, vectors, tokens); break;
    default: {
        int64_t groups = (w->in + w->group - 1) / w->group;
        sums_i4(sum, x, x_stride, (const uint32_t *)w->data + tile * w->in * LANES, (const uint16_t *)w->scale + tile * groups * TILE, w->group, half, rows, count, vectors, tokens);
    }
    }
    int width = vectors * LANES < w->out - start ? vectors * LANES : (int)(w->out - start);
    const float *scale = w->kind == INT8 ? (const float *)w->scale + start : 0, *bias = w->bias ? w->bias + start : 0;
    for (int t = 0; t < tokens; t++) finish(y + t * y_stride + start, sum + t * vectors, scale, bias, width, alpha, add);
}

void fusebox_gemv_blocks(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         int64_t tokens, int64_t first, int64_t last, float alpha, int64_t add) {
    for (int64_t block = first; block < last;) {
        int64_t tile = block / 2;
        int half = (int)(block % 2), whole = !half && block + 1 < last;
        if (tokens == 1 && whole) outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST, 1);
        else if (tokens == 1) outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST / 2, 1);
        else if (tokens == 2 && whole) outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST, 2);
        else if (tokens == 2) outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST / 2, 2);
        else {
            whole = 0;
            if (tokens == 3) outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST / 2, 3);
            else outputs(w, y, y_stride, x, x_stride, rows, count, tile, half, alpha, add, MOST / 2, 4);
        }
        block += 1 + whole;
    }
}

/* One product on its own, shared out over torch's threads. */
void fusebox_gemv(const struct matrix *w, float *y, const float *x, const int32_t *rows, int64_t count) {
    int64_t blocks = (w->out + BLOCK - 1) / BLOCK, pairs = (blocks + 1) / 2;
    _Pragma("omp parallel for schedule(static)")
    for (int64_t pair = 0; pair < pairs; pair++)
        fusebox_gemv_blocks(w, y, 0, x, 0, rows, count, 1, 2 * pair, 2 * pair + 2 < blocks ? 2 * pair + 2 : blocks, 1.0f, 0);
}

int64_t fusebox_tile(void) { return TILE; }

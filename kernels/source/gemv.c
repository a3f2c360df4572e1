/* y = W x for one to four vectors x, W packed tile by tile.
 *
 * One input channel's weights of a tile are one contiguous piece. Where tiles follow one another, a tile's outputs stay in
 * registers while the rows go by: one stream through memory. Where rows do, all outputs of a thread are kept in the first-level
 * cache and a few rows go by at a time: skipping a row then skips a piece long enough that the memory is not read ahead in vain.
 * Threads share out blocks, and nothing is summed across threads.
 */
#include "fusebox.h"
#include "vector.h"
#include <omp.h>

#define AHEAD 12     /* rows between a prefetch and its use */
#define TOGETHER 8   /* rows that go by at a time */
#define LONG 4096    /* bytes of a row from which the processor reads ahead by itself */
#define SLICE 8192   /* outputs that a thread keeps in cache */
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
    INLINE void NAME(f32x16 *restrict sum, const float *restrict x, int64_t x_stride, const TYPE *restrict base, int64_t row_stride, \
                     const int32_t *restrict rows, int64_t count, const int vectors, const int tokens) {                  \
        f32x16 s[MOST_TOKENS * MOST] = {0};                                                                               \
        for (int64_t r = 0; r < count; r++) {                                                                             \
            int64_t row = rows ? (int64_t)rows[r] : r;                                                                    \
            if (rows && r + AHEAD < count) fetch((const char *)(base + (int64_t)rows[r + AHEAD] * row_stride), vectors * LANES * sizeof(TYPE)); \
            const TYPE *w = base + row * row_stride;                                                                      \
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
INLINE void sums_i4(f32x16 *restrict sum, const float *restrict x, int64_t x_stride, const uint32_t *restrict base, int64_t row_stride,
                    const uint16_t *restrict scales, int64_t group, int half, const int32_t *restrict rows, int64_t count, const int vectors, const int tokens) {
    f32x16 s[MOST_TOKENS * MOST] = {0};
    int64_t r = 0;
    while (r < count) {
        int64_t at = (rows ? (int64_t)rows[r] : r) / group, end = (at + 1) * group;
        f32x16 part[MOST_TOKENS * MOST] = {0};
        for (; r < count; r++) {
            int64_t row = rows ? (int64_t)rows[r] : r;
            if (row >= end) break;
            if (rows && r + AHEAD < count) __builtin_prefetch(base + (int64_t)rows[r + AHEAD] * row_stride);
            u32x16 words;
            memcpy(&words, base + row * row_stride, sizeof words);
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

INLINE int64_t tiles_of(const struct matrix *w) { return (w->out + TILE - 1) / TILE; }
INLINE int64_t tile_stride_of(const struct matrix *w) { return w->by_row ? TILE : w->in * TILE; }
INLINE int64_t row_stride_of(const struct matrix *w) { return w->by_row ? tiles_of(w) * TILE : TILE; }

/* `vectors` * 16 outputs from output `half` * BLOCK of a tile, for `tokens` tokens. */
INLINE void outputs(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                    int64_t tile, int half, float alpha, int64_t add, const int vectors, const int tokens) {
    f32x16 sum[MOST_TOKENS * MOST];
    int64_t start = tile * TILE + half * BLOCK, row = row_stride_of(w), at = tile * tile_stride_of(w) + half * BLOCK;
    switch (w->kind) {
    case FLOAT32: sums_f32(sum, x, x_stride, (const float *)w->data + at, row, rows, count, vectors, tokens); break;
    case BFLOAT16: sums_bf16(sum, x, x_stride, (const uint16_t *)w->data + at, row, rows, count, vectors, tokens); break;
    case INT8: sums_i8(sum, x, x_stride, (const int8_t *)w->data + at, row, rows, count, vectors, tokens); break;
    default: {
        int64_t groups = (w->in + w->group - 1) / w->group;
        const uint32_t *words = (const uint32_t *)w->data + tile * tile_stride_of(w) / 8;
        sums_i4(sum, x, x_stride, words, row / 8, (const uint16_t *)w->scale + tile * groups * TILE, w->group, half, rows, count, vectors, tokens);
    }
    }
    int width = vectors * LANES < w->out - start ? vectors * LANES : (int)(w->out - start);
    const float *scale = w->kind == INT8 ? (const float *)w->scale + start : 0, *bias = w->bias ? w->bias + start : 0;
    for (int t = 0; t < tokens; t++) finish(y + t * y_stride + start, sum + t * vectors, scale, bias, width, alpha, add);
}

/* Some rows of one block, or two, added to sums in cache. */
#define DEFINE_PASS(NAME, TYPE, LOAD)                                                                                      \
    INLINE void NAME(float *restrict sum, const float *restrict x, const TYPE *restrict base, int64_t row_stride,          \
                     const int32_t *restrict rows, int64_t count, const int vectors) {                                     \
        f32x16 s[MOST];                                                                                                    \
        for (int v = 0; v < vectors; v++) s[v] = load_f32(sum + v * LANES);                                                \
        for (int64_t r = 0; r < count; r++) {                                                                              \
            const TYPE *w = base + (int64_t)rows[r] * row_stride;                                                          \
            float value = x[rows[r]];                                                                                      \
            _Pragma("GCC unroll 8")                                                                                        \
            for (int v = 0; v < vectors; v++) s[v] += value * LOAD(w + v * LANES);                                         \
        }                                                                                                                  \
        for (int v = 0; v < vectors; v++) store_f32(sum + v * LANES, s[v]);                                                \
    }

DEFINE_PASS(pass_f32, float, load_f32)
DEFINE_PASS(pass_bf16, uint16_t, load_bf16)
DEFINE_PASS(pass_i8, int8_t, load_i8)

/* int4: the rows are of one group. */
INLINE void pass_i4(float *restrict sum, const float *restrict x, const uint32_t *restrict base, int64_t row_stride, const uint16_t *restrict scales, int half,
                    const int32_t *restrict rows, int64_t count, const int vectors) {
    f32x16 s[MOST] = {0};
    for (int64_t r = 0; r < count; r++) {
        u32x16 words;
        memcpy(&words, base + (int64_t)rows[r] * row_stride, sizeof words);
        if (vectors < MOST && half) words >>= 16;
        float value = x[rows[r]];
        _Pragma("GCC unroll 8")
        for (int v = 0; v < vectors; v++) s[v] += value * unpacked(words, v);
    }
    for (int v = 0; v < vectors; v++) store_f32(sum + v * LANES, load_f32(sum + v * LANES) + s[v] * load_bf16(scales + v * LANES));
}

INLINE void pass(const struct matrix *w, float *sum, const float *x, const int32_t *rows, int64_t count, int64_t block, const int vectors) {
    int64_t row = row_stride_of(w), at = block * BLOCK;
    switch (w->kind) {
    case FLOAT32: pass_f32(sum, x, (const float *)w->data + at, row, rows, count, vectors); break;
    case BFLOAT16: pass_bf16(sum, x, (const uint16_t *)w->data + at, row, rows, count, vectors); break;
    case INT8: pass_i8(sum, x, (const int8_t *)w->data + at, row, rows, count, vectors); break;
    default: {
        int64_t groups = (w->in + w->group - 1) / w->group, half = block % 2;
        const uint16_t *scales = (const uint16_t *)w->scale + (block / 2 * groups + rows[0] / w->group) * TILE + half * BLOCK;
        pass_i4(sum, x, (const uint32_t *)w->data + block / 2 * LANES, row / 8, scales, (int)half, rows, count, vectors);
    }
    }
}

/* Chosen rows of a matrix that lies row by row, for at most SLICE outputs. */
static void long_rows(const struct matrix *w, float *y, const float *x, const int32_t *rows, int64_t count, int64_t first, int64_t last, float alpha, int64_t add) {
    float sum[SLICE] __attribute__((aligned(64)));
    int64_t bits = w->kind == FLOAT32 ? 32 : w->kind == BFLOAT16 ? 16 : w->kind == INT8 ? 8 : 4, bytes = (last - first) * BLOCK * bits / 8;
    memset(sum, 0, (size_t)(last - first) * BLOCK * sizeof *sum);
    for (int64_t r = 0, next; r < count; r = next) {
        int64_t end = w->kind == INT4 ? (rows[r] / w->group + 1) * w->group : w->in;
        for (next = r + 1; next < count && next < r + TOGETHER * (w->kind == INT4 ? 2 : 1) && rows[next] < end;) next++;
        if (bytes < LONG)
            for (int64_t k = next; k < count && k < next + TOGETHER; k++) {
                const char *piece = (const char *)w->data + (rows[k] * row_stride_of(w) + first * BLOCK) * bits / 8;
                for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(piece + line, 0, 2);
            }
        for (int64_t block = first; block < last;) {
            int whole = block % 2 == 0 && block + 1 < last;
            if (whole) pass(w, sum + (block - first) * BLOCK, x, rows + r, next - r, block, MOST);
            else pass(w, sum + (block - first) * BLOCK, x, rows + r, next - r, block, MOST / 2);
            block += 1 + whole;
        }
    }
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * BLOCK;
        int width = BLOCK < w->out - start ? BLOCK : (int)(w->out - start);
        f32x16 part[MOST];
        for (int v = 0; v < MOST / 2; v++) part[v] = load_f32(sum + (block - first) * BLOCK + v * LANES);
        finish(y + start, part, w->kind == INT8 ? (const float *)w->scale + start : 0, w->bias ? w->bias + start : 0, width, alpha, add);
    }
}

void fusebox_gemv_blocks(const struct matrix *w, float *y, int64_t y_stride, const float *x, int64_t x_stride, const int32_t *rows, int64_t count,
                         int64_t tokens, int64_t first, int64_t last, float alpha, int64_t add) {
    if (w->by_row && rows && tokens == 1) {
        for (int64_t block = first; block < last; block += SLICE / BLOCK)
            long_rows(w, y, x, rows, count, block, block + SLICE / BLOCK < last ? block + SLICE / BLOCK : last, alpha, add);
        return;
    }
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
    int64_t blocks = (w->out + BLOCK - 1) / BLOCK;
    _Pragma("omp parallel")
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        fusebox_gemv_blocks(w, y, 0, x, 0, rows, count, 1, blocks * thread / threads, blocks * (thread + 1) / threads, 1.0f, 0);
    }
}

int64_t fusebox_tile(void) { return TILE; }

/* Sums over input channels whose weights lie in one long piece each, all of them or some.
 *
 * Where channels are left out, the processor's own reading ahead fetches what is not needed and is late for what is. So eight rows
 * go by together, a hundred and twenty-eight outputs at a time, and the lines that come a fixed number of bytes later are asked for into the
 * second-level cache, across the gaps: more lines are then on their way than one core's first-level cache can wait for.
 */
#include "packed.h"

#define TOGETHER 16 /* rows at most; 8 are enough where no scales follow */
#define FAR (16 * 1024) /* bytes between asking for a line and using it */

/* One pass: `count` rows' weights of one tile are added to the sums, as many of them at a time as registers hold. */
#define DEFINE_PASS(NAME, TYPE, LOAD)                                                                                      \
    INLINE void NAME(float *restrict sum, const float *restrict values, const char *const *rows, int64_t at, int64_t count) { \
        for (int from = 0; from < MOST; from += HELD) {                                                                    \
            f32v s[HELD];                                                                                                  \
            _Pragma("GCC unroll 8")                                                                                        \
            for (int v = 0; v < HELD; v++) s[v] = load_f32(sum + (from + v) * LANES);                                      \
            for (int64_t r = 0; r < count; r++) {                                                                          \
                const TYPE *w = (const TYPE *)(rows[r] + at) + from * LANES;                                               \
                _Pragma("GCC unroll 8")                                                                                    \
                for (int v = 0; v < HELD; v++) s[v] = added(s[v], splat(values[r]), LOAD(w + v * LANES));                  \
            }                                                                                                              \
            _Pragma("GCC unroll 8")                                                                                        \
            for (int v = 0; v < HELD; v++) store_f32(sum + (from + v) * LANES, s[v]);                                      \
        }                                                                                                                  \
    }

DEFINE_PASS(pass_f32, float, load_f32)
DEFINE_PASS(pass_bf16, uint16_t, load_bf16)
DEFINE_PASS(pass_i8, int8_t, load_i8)

/* int4: the rows are of one group, whose scales follow. */
INLINE void pass_i4(float *restrict sum, const float *restrict values, const char *const *rows, int64_t at, const uint16_t *restrict scales, int64_t count) {
    _Pragma("GCC unroll 8")
    for (int from = 0; from < MOST; from += HELD) {
        f32v s[HELD] = {0};
        for (int64_t r = 0; r < count; r++) {
            const struct codes codes = load_codes((const uint32_t *)(rows[r] + at));
            _Pragma("GCC unroll 8")
            for (int v = 0; v < HELD; v++) s[v] = added(s[v], splat(values[r]), unpacked(&codes, from + v));
        }
        _Pragma("GCC unroll 8")
        for (int v = 0; v < HELD; v++) store_f32(sum + (from + v) * LANES, added(load_f32(sum + (from + v) * LANES), s[v], load_bf16(scales + (from + v) * LANES)));
    }
}

/* Where the lines that are asked for stand: row `next` and its fellows, `at` of `row_bytes` bytes into each; rows begin `stride` bytes apart. */
struct ahead {
    const char *data;
    const int32_t *rows;
    int64_t next, last, at, stride, row_bytes, tile_bytes, together;
};

/* Ask for the next lines; returns their bytes, 0 at the end. */
INLINE int64_t ask(struct ahead *a) {
    int64_t count = a->last - a->next < a->together ? a->last - a->next : a->together;
    for (int64_t r = 0; r < count; r++) {
        const char *from = a->data + (a->rows ? a->rows[a->next + r] : a->next + r) * a->stride + a->at;
        for (int64_t line = 0; line < a->tile_bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
    }
    a->at += a->tile_bytes;
    if (a->at >= a->row_bytes) a->at = 0, a->next += count;
    return count * a->tile_bytes;
}

/* How many of the rows from r on go by together: for int4 those of one group, in passes of like size. */
INLINE int64_t count_together(const struct matrix *w, const int32_t *rows, int64_t r, int64_t last, int64_t most) {
    if (w->kind != INT4) return last - r < most ? last - r : most;
    int64_t end = ((rows ? rows[r] : r) / w->group + 1) * w->group, count = 1;
    while (r + count < last && (rows ? rows[r + count] : r + count) < end) count++;
    int64_t passes = (count + most - 1) / most;
    return (count + passes - 1) / passes;
}

void fusebox_gemv_long_rows(const struct matrix *w, float *sums, const float *x, const int32_t *rows, int64_t first, int64_t last) {
    const int64_t bits[] = {32, 16, 8, 4}, tile_bytes = TILE * bits[w->kind] / 8, most = w->kind == INT4 ? TOGETHER : TOGETHER / 2;
    const int64_t tiles = tiles_of(w), groups = w->kind == INT4 ? (w->in + w->group - 1) / w->group : 0;
    struct ahead a = {w->data, rows, first, last, 0, w->row_tiles * tile_bytes, tiles * tile_bytes, tile_bytes, most};
    memset(sums, 0, (size_t)(tiles * TILE) * sizeof *sums);
    for (int64_t r = first, asked = 0, count; r < last; r += count) {
        const char *from[TOGETHER];
        float values[TOGETHER];
        count = count_together(w, rows, r, last, most);
        for (int64_t k = 0; k < count; k++) {
            int64_t row = rows ? rows[r + k] : r + k;
            from[k] = (const char *)w->data + row * a.stride, values[k] = x[row];
        }
        const uint16_t *scales = w->kind == INT4 ? (const uint16_t *)w->scale + (rows ? rows[r] : r) / w->group * TILE : 0;
        for (int64_t tile = 0; tile < tiles; tile++) {
            float *sum = sums + tile * TILE;
            for (asked -= count * tile_bytes; asked < FAR && a.next < last;) asked += ask(&a);
            switch (w->kind) {
            case FLOAT32: pass_f32(sum, values, from, tile * tile_bytes, count); break;
            case BFLOAT16: pass_bf16(sum, values, from, tile * tile_bytes, count); break;
            case INT8: pass_i8(sum, values, from, tile * tile_bytes, count); break;
            default: pass_i4(sum, values, from, tile * tile_bytes, scales + tile * groups * TILE, count);
            }
        }
    }
}

/* y = W x for one vector x, W packed tile by tile.
 *
 * Layout of packed weights: [tiles][in][TILE], TILE outputs side by side, so that one input channel's weights of a tile
 * are one contiguous piece. The outputs of a tile stay in registers while the rows go by; threads share out tiles, and
 * nothing is summed across threads. `rows` lists the input channels to read, ascending; NULL reads them all.
 */
#include <stdint.h>
#include <string.h>

#define TILE 128
#define LANES 16
#define VECTORS (TILE / LANES)
#define AHEAD 12 /* rows between a prefetch and its use */

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

static inline f32x16 load_f32(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
static inline void store_f32(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }

static inline f32x16 load_bf16(const uint16_t *p) {
    u16x16 half;
    memcpy(&half, p, sizeof half);
    u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
    f32x16 v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

static inline f32x16 load_i8(const int8_t *p) {
    i8x16 q;
    memcpy(&q, p, sizeof q);
    return __builtin_convertvector(__builtin_convertvector(q, i32x16), f32x16);
}

static inline void add_to(float *y, const f32x16 *sum, const float *bias, int count) {
    float out[TILE];
    for (int v = 0; v < VECTORS; v++) store_f32(out + v * LANES, sum[v]);
    for (int j = 0; j < count; j++) y[j] = out[j] + (bias ? bias[j] : 0.0f);
}

static inline void scale_by(f32x16 *sum, const float *scale, int count) {
    float padded[TILE] = {0};
    memcpy(padded, scale, (size_t)count * sizeof *scale);
    for (int v = 0; v < VECTORS; v++) sum[v] *= load_f32(padded + v * LANES);
}

static inline int width_of(int64_t tile, int64_t out) {
    int64_t left = out - tile * TILE;
    return left < TILE ? (int)left : TILE;
}

#define ROW(r) (rows ? (int64_t)rows[r] : (int64_t)(r))

/* One function a dtype: the same loop, another load. */
#define DEFINE_GEMV(NAME, TYPE, LOAD, SCALED)                                                                            \
    void NAME(float *restrict y, const float *restrict x, const TYPE *restrict weight, const float *restrict scale,      \
              const float *restrict bias, const int32_t *restrict rows, int64_t count, int64_t in, int64_t out) {        \
        int64_t tiles = (out + TILE - 1) / TILE;                                                                         \
        _Pragma("omp parallel for schedule(static)")                                                                     \
        for (int64_t tile = 0; tile < tiles; tile++) {                                                                   \
            const TYPE *base = weight + tile * in * TILE;                                                                \
            f32x16 sum[VECTORS] = {0};                                                                                   \
            for (int64_t r = 0; r < count; r++) {                                                                        \
                int64_t row = ROW(r);                                                                                    \
                if (rows && r + AHEAD < count) {                                                                         \
                    const char *next = (const char *)(base + (int64_t)rows[r + AHEAD] * TILE);                           \
                    for (size_t line = 0; line < TILE * sizeof(TYPE); line += 64) __builtin_prefetch(next + line);       \
                }                                                                                                        \
                const TYPE *w = base + row * TILE;                                                                       \
                f32x16 value = (f32x16){0} + x[row];                                                                     \
                for (int v = 0; v < VECTORS; v++) sum[v] += value * LOAD(w + v * LANES);                                 \
            }                                                                                                            \
            int width = width_of(tile, out);                                                                             \
            if (SCALED) scale_by(sum, scale + tile * TILE, width);                                                       \
            add_to(y + tile * TILE, sum, bias ? bias + tile * TILE : 0, width);                                          \
        }                                                                                                                \
    }

DEFINE_GEMV(fusebox_gemv_f32, float, load_f32, 0)
DEFINE_GEMV(fusebox_gemv_bf16, uint16_t, load_bf16, 0)
DEFINE_GEMV(fusebox_gemv_i8, int8_t, load_i8, 1)

/* int4, symmetric around 8: packed [tiles][in][TILE / 2]; the low nibble of byte j is output j, the high one output
 * j + TILE / 2. Scales [tiles][groups][TILE], one for `group` input channels of an output. */
void fusebox_gemv_i4(float *restrict y, const float *restrict x, const uint8_t *restrict weight, const float *restrict scale,
                     const float *restrict bias, const int32_t *restrict rows, int64_t count, int64_t in, int64_t out, int64_t group) {
    int64_t tiles = (out + TILE - 1) / TILE, groups = (in + group - 1) / group;
    _Pragma("omp parallel for schedule(static)")
    for (int64_t tile = 0; tile < tiles; tile++) {
        const uint8_t *base = weight + tile * in * (TILE / 2);
        const float *scales = scale + tile * groups * TILE;
        f32x16 sum[VECTORS] = {0};
        int64_t r = 0;
        while (r < count) {
            int64_t at = ROW(r) / group;
            int64_t end = (at + 1) * group;
            f32x16 part[VECTORS] = {0};
            float total = 0.0f;
            for (; r < count && ROW(r) < end; r++) {
                int64_t row = ROW(r);
                if (rows && r + AHEAD < count) __builtin_prefetch(base + (int64_t)rows[r + AHEAD] * (TILE / 2));
                const uint8_t *w = base + row * (TILE / 2);
                f32x16 value = (f32x16){0} + x[row];
                total += x[row];
                for (int v = 0; v < VECTORS / 2; v++) {
                    u8x16 q;
                    memcpy(&q, w + v * LANES, sizeof q);
                    part[v] += value * __builtin_convertvector(__builtin_convertvector(q & 15, i32x16), f32x16);
                    part[v + VECTORS / 2] += value * __builtin_convertvector(__builtin_convertvector(q >> 4, i32x16), f32x16);
                }
            }
            f32x16 middle = (f32x16){0} + 8.0f * total;
            for (int v = 0; v < VECTORS; v++) sum[v] += (part[v] - middle) * load_f32(scales + at * TILE + v * LANES);
        }
        add_to(y + tile * TILE, sum, bias ? bias + tile * TILE : 0, width_of(tile, out));
    }
}

int64_t fusebox_tile(void) { return TILE; }

/* Y = X W for many tokens, W packed: a prompt. A strip of outputs is unpacked for up to DEPTH input channels, and all tokens are multiplied with
 * it before the next one is; threads share out strips, so that nothing is summed across threads.
 *
 * bfloat16 tokens are multiplied as bfloat16 where the CPU can (matrix registers, else AVX512-BF16), all else as float. Sums are always float.
 */
#include "panel.h"
#include <omp.h>
#include <stdlib.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BLOCK_SUMS (ROWS * STRIP)

enum { BY_FLOAT, BY_BF16, BY_TILES };

/* Each of these: sums[ROWS][STRIP] (+)= a[ROWS] b[STRIP] over `depth` input channels. */

#define SUM_ROWS (REGISTERS / 4)
#define SUM_VECTORS 2

static void multiply_f32(float *restrict sums, const float *restrict a, const float *restrict b, int64_t depth, int first) {
    for (int r = 0; r < ROWS; r += SUM_ROWS)
        for (int v = 0; v < STRIP_VECTORS; v += SUM_VECTORS) {
            f32v s[SUM_ROWS][SUM_VECTORS] = {0};
            for (int64_t k = 0; k < depth; k++)
                for (int j = 0; j < SUM_VECTORS; j++) {
                    f32v value = load_f32(b + k * STRIP + (v + j) * LANES);
                    _Pragma("GCC unroll 8")
                    for (int i = 0; i < SUM_ROWS; i++) s[i][j] = added(s[i][j], value, splat(a[k * ROWS + r + i]));
                }
            for (int i = 0; i < SUM_ROWS; i++)
                for (int j = 0; j < SUM_VECTORS; j++) {
                    float *to = sums + (r + i) * STRIP + (v + j) * LANES;
                    store_f32(to, first ? s[i][j] : load_f32(to) + s[i][j]);
                }
        }
}

#ifdef __AVX512BF16__
static void multiply_bf16(float *restrict sums, const uint16_t *restrict a, const uint16_t *restrict b, int64_t depth, int first) {
    for (int r = 0; r < ROWS; r += 8) {
        __m512 s[8][2];
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++) s[i][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r + i) * STRIP + j * LANES);
        for (int64_t k = 0; k < depth; k += CHUNK)
            for (int pair = 0; pair < CHUNK / 2; pair++) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(b + (k / 2 + pair) * 2 * LANES), right = (__m512bh)_mm512_loadu_si512(b + PAIRED + (k / 2 + pair) * 2 * LANES);
                _Pragma("GCC unroll 8")
                for (int i = 0; i < 8; i++) {
                    int32_t both;
                    memcpy(&both, a + k * ROWS + (r + i) * CHUNK + 2 * pair, sizeof both);
                    __m512bh token = (__m512bh)_mm512_set1_epi32(both);
                    s[i][0] = _mm512_dpbf16_ps(s[i][0], token, left);
                    s[i][1] = _mm512_dpbf16_ps(s[i][1], token, right);
                }
            }
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++) _mm512_storeu_ps(sums + (r + i) * STRIP + j * LANES, s[i][j]);
    }
}
#endif

#ifdef HAS_TILES
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t rows[16];
};

/* Linux gives a process the matrix registers when it asks. */
static int tiles_granted(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 };
    static int granted = -1;
    if (granted < 0) granted = !syscall(SYS_arch_prctl, ASK, TILE_DATA);
    return granted;
}

/* Others configure a thread's registers once and count on it: `before` is what they set, for restore_tiles. */
static void configure_tiles(struct tile_config *before) {
    struct tile_config config = {.palette = 1};
    _tile_storeconfig(before);
    for (int i = 0; i < 8; i++) config.line_bytes[i] = 64, config.rows[i] = ROWS;
    _tile_loadconfig(&config);
}

static void restore_tiles(const struct tile_config *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* One or two blocks of tokens; the second one's begin `next` entries on. */
INLINE void multiply_tiles(float *sums, const uint16_t *a, int64_t next, const uint16_t *b, int64_t depth, int first, const int two) {
    const size_t line = STRIP * sizeof *sums;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, line);
        _tile_loadd(1, sums + LANES, line);
        if (two) {
            _tile_loadd(2, sums + BLOCK_SUMS, line);
            _tile_loadd(3, sums + BLOCK_SUMS + LANES, line);
        }
    }
    for (int64_t k = 0; k < depth; k += CHUNK, a += ROWS * CHUNK, b += CHUNK * LANES) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + PAIRED, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, a + next, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + LANES, line);
    if (two) {
        _tile_stored(2, sums + BLOCK_SUMS, line);
        _tile_stored(3, sums + BLOCK_SUMS + LANES, line);
    }
}
#endif

/* What all threads work on. rows: the tokens as laid out, a float or bfloat16 each. */
struct product {
    const struct matrix *w;
    const void *x;
    void *y, *rows;
    int64_t tokens, blocks, depth; /* depth: input channels, padded */
    int is_bf16, how;
};

static void lay_out(const struct product *p, int64_t block) {
    if (p->how == BY_FLOAT) lay_out_f32(p->rows, p->x, p->is_bf16, p->tokens, p->w->in, block);
#ifdef __AVX512BF16__
    else lay_out_bf16(p->rows, p->x, p->tokens, p->w->in, block);
#endif
}

INLINE void unpack_panel(const struct product *p, const int kind, void *panel, int64_t strip, int64_t first, int64_t last) {
    const int64_t tile = strip / STRIPS;
    const int inside = (int)(strip % STRIPS);
    if (p->how == BY_FLOAT) unpack_f32(panel, p->w, kind, tile, inside, first, last);
#ifdef __AVX512BF16__
    else unpack_bf16(panel, p->w, kind, tile, inside, first, last);
#endif
}

static void unpack_strip(const struct product *p, void *panel, int64_t strip, int64_t first, int64_t last) {
    switch (p->w->kind) { /* one function a dtype */
    case FLOAT32: unpack_panel(p, FLOAT32, panel, strip, first, last); break;
    case BFLOAT16: unpack_panel(p, BFLOAT16, panel, strip, first, last); break;
    case INT8: unpack_panel(p, INT8, panel, strip, first, last); break;
    default: unpack_panel(p, INT4, panel, strip, first, last);
    }
}

/* Two blocks of tokens, the second only where there is one, with an unpacked strip from channel k on. sums: [2][ROWS][STRIP]. */
static void multiply_blocks(const struct product *p, float *sums, const void *panel, int64_t block, int64_t k, int64_t depth) {
    const int64_t at = (block * p->depth + k) * ROWS, next = p->depth * ROWS;
    const int two = block + 1 < p->blocks, first = !k;
    if (p->how == BY_FLOAT) {
        for (int b = 0; b <= two; b++) multiply_f32(sums + b * BLOCK_SUMS, (const float *)p->rows + at + b * next, panel, depth, first);
        return;
    }
#ifdef __AVX512BF16__
    const uint16_t *rows = (const uint16_t *)p->rows + at;
    depth = padded(depth, CHUNK);
#ifdef HAS_TILES
    if (p->how == BY_TILES) {
        if (two) multiply_tiles(sums, rows, next, panel, depth, first, 1);
        else multiply_tiles(sums, rows, next, panel, depth, first, 0);
        return;
    }
#endif
    for (int b = 0; b <= two; b++) multiply_bf16(sums + b * BLOCK_SUMS, rows + b * next, panel, depth, first);
#endif
}

/* What sums become: scaled, the bias added, and rounded. */
struct ending {
    float scale[STRIP], bias[STRIP];
};

static struct ending ending_of(const struct matrix *w, int64_t output) {
    struct ending e = {0};
    for (int64_t j = 0; j < STRIP && output + j < w->out; j++) {
        e.scale[j] = w->kind == INT8 ? ((const float *)w->scale)[output + j] : 1.0f;
        e.bias[j] = w->bias ? w->bias[output + j] : 0.0f;
    }
    return e;
}

INLINE void finish_row(char *to, const float *sums, const struct ending *e, const int is_bf16) {
    f32v value[STRIP_VECTORS];
    for (int j = 0; j < STRIP_VECTORS; j++) value[j] = load_f32(sums + j * LANES) * load_f32(e->scale + j * LANES) + load_f32(e->bias + j * LANES);
    for (int j = 0; j < STRIP_VECTORS; j++) {
        if (is_bf16) store_bf16((uint16_t *)to + j * LANES, value[j]);
        else store_f32((float *)to + j * LANES, value[j]);
    }
}

/* Writes the outputs of two blocks' tokens; those beyond the last token or output are left out. */
INLINE void finish_blocks(const struct product *p, const float *sums, const struct ending *e, int64_t block, int64_t output, const int is_bf16) {
    const int64_t out = p->w->out, first = block * ROWS, count = p->tokens - first < 2 * ROWS ? p->tokens - first : 2 * ROWS;
    const size_t size = is_bf16 ? sizeof(uint16_t) : sizeof(float);
    char *y = (char *)p->y + (size_t)(first * out + output) * size;
    for (int64_t r = 0; r < count; r++, y += (size_t)out * size, sums += STRIP) {
        if (output + STRIP <= out) {
            finish_row(y, sums, e, is_bf16);
            continue;
        }
        char whole[STRIP * sizeof(float)];
        finish_row(whole, sums, e, is_bf16);
        memcpy(y, whole, (size_t)(out - output) * size);
    }
}

/* Strips `first` to `last`, of each tile together: they share cache lines. sums: [STRIPS][blocks][ROWS][STRIP]. */
static void multiply_strips(const struct product *p, void *panel, float *sums, int64_t first, int64_t last) {
    const int64_t in = p->w->in, parts = (in + DEPTH - 1) / DEPTH, depth = padded((in + parts - 1) / parts, CHUNK);
    for (int64_t after; first < last; first = after) {
        after = (first / STRIPS + 1) * STRIPS;
        if (after > last) after = last;
        for (int64_t k = 0; k < in; k += depth) {
            const int64_t end = k + depth < in ? k + depth : in;
            for (int64_t strip = first; strip < after; strip++) {
                const struct ending e = ending_of(p->w, strip * STRIP);
                unpack_strip(p, panel, strip, k, end);
                for (int64_t b = 0; b < p->blocks; b += 2) {
                    float *at = sums + (parts > 1 ? (strip - first) * p->blocks + b : 0) * BLOCK_SUMS;
                    multiply_blocks(p, at, panel, b, k, end - k);
                    if (end < in) continue;
                    if (p->is_bf16) finish_blocks(p, at, &e, b, strip * STRIP, 1);
                    else finish_blocks(p, at, &e, b, strip * STRIP, 0);
                }
            }
        }
    }
}

static int way_for(int is_bf16) {
#ifdef HAS_TILES
    if (is_bf16 && tiles_granted()) return BY_TILES;
#endif
#ifdef __AVX512BF16__
    if (is_bf16) return BY_BF16;
#endif
    (void)is_bf16;
    return BY_FLOAT;
}

/* As few tokens as a step takes: reading the weights is all the work. Float throughout. */
static void multiply_few(const struct product *p, float *x, float *y) {
    const int64_t in = p->w->in, out = p->w->out, blocks = (out + BLOCK - 1) / BLOCK;
    for (int64_t i = 0; i < p->tokens * in; i++) x[i] = p->is_bf16 ? one_bf16((const uint16_t *)p->x + i) : ((const float *)p->x)[i];
    _Pragma("omp parallel")
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        fusebox_gemv_blocks(p->w, y, out, x, in, 0, in, p->tokens, blocks * thread / threads, blocks * (thread + 1) / threads, 1.0f, 0);
    }
    for (int64_t i = 0; i < p->tokens * out; i++) {
        if (p->is_bf16) ((uint16_t *)p->y)[i] = to_bf16(y[i]);
        else ((float *)p->y)[i] = y[i];
    }
}

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static int64_t multiply_many(struct product *p) {
    const int64_t strips = (p->w->out + STRIP - 1) / STRIP, threads = omp_get_max_threads();
    const size_t panel_bytes = DEPTH * STRIP * sizeof(float), sum_bytes = (size_t)((p->blocks + 1) * ROWS * TILE) * sizeof(float);
    char *own = aligned((size_t)threads * (panel_bytes + sum_bytes));
    p->rows = aligned((size_t)(p->blocks * ROWS * p->depth) * sizeof(float));
    if (own && p->rows) {
        _Pragma("omp parallel num_threads((int)threads)")
        {
            int64_t thread = omp_get_thread_num(), ran = omp_get_num_threads();
            char *mine = own + (size_t)thread * (panel_bytes + sum_bytes);
            for (int64_t b = p->blocks * thread / ran; b < p->blocks * (thread + 1) / ran; b++) lay_out(p, b);
#ifdef HAS_TILES
            struct tile_config before;
            if (p->how == BY_TILES) configure_tiles(&before);
#endif
            _Pragma("omp barrier")
            multiply_strips(p, mine + sum_bytes, (float *)mine, strips * thread / ran, strips * (thread + 1) / ran);
#ifdef HAS_TILES
            if (p->how == BY_TILES) restore_tiles(&before);
#endif
        }
    }
    int64_t done = own && p->rows;
    free(own);
    free(p->rows);
    return done;
}

/* y [tokens][out] = x [tokens][in] W + bias, both of `kind` FLOAT32 or BFLOAT16. 1 when done, 0 when there is no memory. */
int64_t fusebox_gemm(const struct matrix *w, void *y, const void *x, int64_t tokens, int64_t kind) {
    struct product p = {.w = w, .x = x, .y = y, .tokens = tokens, .blocks = (tokens + ROWS - 1) / ROWS, .depth = padded(w->in, CHUNK), .is_bf16 = kind == BFLOAT16};
    p.how = way_for(p.is_bf16);
    if (tokens > MOST_TOKENS) return multiply_many(&p);
    float *room = aligned((size_t)(tokens * (w->in + w->out)) * sizeof *room);
    if (!room) return 0;
    multiply_few(&p, room, room + tokens * w->in);
    free(room);
    return 1;
}

/* Exchanges the matrix registers' configuration of each thread with 64 bytes of `configurations`; zeros release them. For foreign code that
 * configures a thread once: it is called between two of these. 0 where there are no such registers. */
int64_t fusebox_exchange_tiles(uint8_t *configurations) {
#ifdef HAS_TILES
    if (!tiles_granted()) return 0;
    _Pragma("omp parallel")
    {
        struct tile_config before, *wanted = (struct tile_config *)configurations + omp_get_thread_num();
        _tile_storeconfig(&before);
        restore_tiles(wanted);
        *wanted = before;
    }
    return 1;
#else
    (void)configurations;
    return 0;
#endif
}

/* How bfloat16 prompts are multiplied here: 0 as float, 1 by AVX512-BF16, 2 in matrix registers. */
int64_t fusebox_gemm_way(void) { return way_for(1); }

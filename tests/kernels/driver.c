/* Every kernel over odd sizes with buffers of exactly the promised length, for the address and undefined-behaviour sanitizers. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define GEMV(T) float *, const float *, const T *, const float *, const float *, const int32_t *, int64_t, int64_t, int64_t
void fusebox_gemv_f32(GEMV(float));
void fusebox_gemv_bf16(GEMV(uint16_t));
void fusebox_gemv_i8(GEMV(int8_t));
void fusebox_gemv_i4(GEMV(uint8_t), int64_t);
int64_t fusebox_largest(int32_t *, const float *, int64_t, int64_t);
int64_t fusebox_above(int32_t *, const float *, int64_t, float);
int64_t fusebox_nonzero(int32_t *, const float *, int64_t);
int64_t fusebox_tile(void);
void fusebox_norm(float *, const float *, const float *, const float *, int64_t, int64_t, float, int64_t);
void fusebox_rope(float *, const float *, const float *, int64_t, int64_t, int64_t);
void fusebox_activate(float *, const float *, const float *, int64_t, int64_t);
void fusebox_attention(float *, const float *, const float *, const float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);

static void *filled(size_t bytes) {
    unsigned char *p = malloc(bytes ? bytes : 1);
    for (size_t i = 0; i < bytes; i++) p[i] = (unsigned char)(i * 37 % 61);
    return p;
}

static float *floats(int64_t n) {
    float *p = malloc((size_t)(n ? n : 1) * sizeof *p);
    for (int64_t i = 0; i < n; i++) p[i] = (float)((i * 53) % 17 - 8) / 4.0f;
    return p;
}

int main(void) {
    const int64_t tile = fusebox_tile(), ins[] = {1, 2, 31, 64, 65, 200}, outs[] = {1, 127, 128, 129, 400};
    for (size_t a = 0; a < sizeof ins / sizeof *ins; a++)
        for (size_t b = 0; b < sizeof outs / sizeof *outs; b++) {
            int64_t in = ins[a], out = outs[b], tiles = (out + tile - 1) / tile, group = 32, groups = (in + group - 1) / group;
            size_t cells = (size_t)(tiles * in * tile);
            float *x = floats(in), *y = floats(out), *bias = floats(out), *scale8 = floats(tiles * tile), *scale4 = floats(tiles * groups * tile), *wf = floats((int64_t)cells);
            void *bytes = filled(cells * 2);
            int32_t *rows = malloc((size_t)in * sizeof *rows);
            int64_t counts[4];
            counts[0] = fusebox_largest(rows, x, in, in / 2);
            counts[1] = fusebox_above(rows, x, in, 1.0f);
            counts[2] = fusebox_nonzero(rows, x, in);
            counts[3] = fusebox_largest(rows, x, in, (in + 1) / 2);
            for (int sparse = 0; sparse < 2; sparse++) {
                const int32_t *chosen = sparse ? rows : 0;
                int64_t count = sparse ? counts[3] : in;
                fusebox_gemv_f32(y, x, wf, 0, bias, chosen, count, in, out);
                fusebox_gemv_bf16(y, x, bytes, 0, 0, chosen, count, in, out);
                fusebox_gemv_i8(y, x, bytes, scale8, bias, chosen, count, in, out);
                fusebox_gemv_i4(y, x, bytes, scale4, bias, chosen, count, in, out, group);
            }
            free(x); free(y); free(bias); free(scale8); free(scale4); free(wf); free(bytes); free(rows);
        }
    for (int64_t dim = 1; dim < 70; dim += 17)
        for (int64_t tokens = 1; tokens < 40; tokens += 19) {
            float *q = floats(4 * dim), *out = floats(4 * (dim + 3)), *keys = floats(tokens * 2 * dim), *values = floats(tokens * 4 * (dim + 3)), *gain = floats(dim);
            fusebox_attention(out, q, keys, values, 4, 2, 4, dim, dim + 3, tokens / 3, tokens, 0.25f);
            fusebox_norm(q, q, gain, gain, 4, dim, 1e-5f, tokens % 2);
            fusebox_rope(q, gain, gain, 4, dim, dim / 2 * 2);
            for (int64_t kind = 0; kind < 4; kind++) fusebox_activate(q, q, kind % 2 ? keys : 0, 2 * dim, kind);
            free(q); free(out); free(keys); free(values); free(gain);
        }
    puts("all checked");
    return 0;
}

/* Every kernel over odd sizes with buffers of exactly the promised length, for the address and undefined-behaviour sanitizers. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "fusebox.h"

int64_t fusebox_tile(void);
void fusebox_gemv(const struct matrix *, float *, const float *, const int32_t *, int64_t);
int64_t fusebox_gemm(const struct matrix *, void *, const void *, int64_t, int64_t);
void fusebox_attention(float *, const float *, const struct cached *, int64_t, int64_t, int64_t, float, float *);

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
            float *x = floats(in), *y = floats(out), *many_x = floats(MOST_TOKENS * in), *many_y = floats(MOST_TOKENS * out), *bias = floats(out), *scale8 = floats(tiles * tile), *scale4 = floats(tiles * groups * tile), *wf = floats((int64_t)cells);
            void *bytes = filled(cells * 2);
            int32_t *rows = malloc((size_t)in * sizeof *rows);
            int64_t counts[4];
            counts[0] = fusebox_largest(rows, x, in, in / 2);
            counts[1] = fusebox_above(rows, x, in, 1.0f);
            counts[2] = fusebox_nonzero(rows, x, in);
            counts[3] = fusebox_largest(rows, x, in, (in + 1) / 2);
            for (int64_t kind = FLOAT32; kind <= INT4; kind++)
                for (int sparse = 0; sparse < 2; sparse++) {
                    const void *data = kind == FLOAT32 ? (void *)wf : bytes, *scale = kind == INT8 ? scale8 : scale4;
                    for (int64_t row_tiles = 0; row_tiles <= tiles; row_tiles += tiles) {
                    struct matrix w = {kind, in, out, group, row_tiles, data, scale, sparse ? bias : 0};
                    const int32_t *chosen = sparse ? rows : 0;
                    int64_t count = sparse ? counts[3] : in, blocks = (out + BLOCK - 1) / BLOCK;
                    fusebox_gemv(&w, y, x, chosen, count);
                    for (int64_t tokens = 1; tokens <= MOST_TOKENS; tokens++)
                        fusebox_gemv_blocks(&w, many_y, out, many_x, in, chosen, count, tokens, blocks / 3, blocks, 0.5f, sparse);
                    }
                }
            free(many_x); free(many_y); free(x); free(y); free(bias); free(scale8); free(scale4); free(wf); free(bytes); free(rows);
        }
    const int64_t deep[] = {1, 33, 700}, wide[] = {1, 40, 200}, prompts[] = {1, 4, 5, 16, 33};
    for (size_t a = 0; a < sizeof deep / sizeof *deep; a++)
        for (size_t b = 0; b < sizeof wide / sizeof *wide; b++)
            for (size_t c = 0; c < sizeof prompts / sizeof *prompts; c++) {
                int64_t in = deep[a], out = wide[b], tokens = prompts[c], tiles = (out + tile - 1) / tile, group = 48, groups = (in + group - 1) / group, sizes[] = {4, 2, 1};
                float *bias = floats(out), *scale8 = floats(tiles * tile);
                void *scale4 = filled((size_t)(tiles * groups * tile) * 2);
                for (int64_t kind = FLOAT32; kind <= INT4; kind++) {
                    size_t cells = (size_t)(tiles * in * tile);
                    void *data = filled(kind == INT4 ? cells / 2 : cells * (size_t)sizes[kind]);
                    for (int64_t how = 0; how < 4; how++) {
                        int64_t dtype = how % 2 ? BFLOAT16 : FLOAT32;
                        struct matrix w = {kind, in, out, group, how / 2, data, kind == INT8 ? (void *)scale8 : scale4, how ? bias : 0};
                        void *x = filled((size_t)(tokens * in * sizes[dtype])), *y = malloc((size_t)(tokens * out * sizes[dtype]));
                        if (!fusebox_gemm(&w, y, x, tokens, dtype)) return 1;
                        free(x); free(y);
                    }
                    free(data);
                }
                free(bias); free(scale8); free(scale4);
            }
    for (int64_t dim = 1; dim < 70; dim += 17)
        for (int64_t tokens = 1; tokens < 40; tokens += 19) {
            float *q = floats(4 * dim), *out = floats(4 * (dim + 3)), *keys = floats(tokens * 2 * dim), *values = floats(tokens * 4 * (dim + 3)), *gain = floats(dim);
            float *scores = floats(64 * GROUP * tokens), *scales = floats(4 * tokens);
            for (int64_t kind = FLOAT32; kind <= INT8; kind++) {
                struct cached kv = {kind, 2, 4, dim, dim + 3, keys, values, scales, scales};
                for (int64_t head = 0; head < 2; head++) fusebox_append(&kv, 0, tokens - 1, head, q);
                for (int64_t head = 0; head < 4; head++) fusebox_append(&kv, 1, tokens - 1, head, values);
                fusebox_attention(out, q, &kv, 4, tokens / 3, tokens, 0.25f, scores);
            }
            free(scores); free(scales);
            fusebox_norm(q, q, gain, gain, 4, dim, 1e-5f, tokens % 2);
            fusebox_rope(q, gain, gain, 4, dim, dim / 2 * 2);
            for (int64_t kind = 0; kind < 4; kind++) fusebox_activate(q, q, kind % 2 ? keys : 0, 2 * dim, kind);
            free(q); free(out); free(keys); free(values); free(gain);
        }
    puts("all checked");
    return 0;
}

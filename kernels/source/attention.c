/* Attention of one token and head over cached ones, and the writing of the cache. */
#include "fusebox.h"
#include "vector.h"

#define PASS 128 /* channels of the values that stay in registers while the tokens go by */

/* Write one head's vector as token `token` of the keys or the values. */
void fusebox_append(const struct cached *kv, int64_t is_value, int64_t token, int64_t head, const float *x) {
    int64_t heads = is_value ? kv->value_heads : kv->key_heads, dim = is_value ? kv->dim_v : kv->dim;
    void *data = is_value ? kv->values : kv->keys;
    int64_t at = (token * heads + head) * dim;
    if (kv->kind == FLOAT32) {
        memcpy((float *)data + at, x, (size_t)dim * sizeof *x);
    } else if (kv->kind == BFLOAT16) {
        for (int64_t j = 0; j < dim; j++) ((uint16_t *)data)[at + j] = to_bf16(x[j]);
    } else {
        float most = 0.0f;
        for (int64_t j = 0; j < dim; j++) most = fabsf(x[j]) > most ? fabsf(x[j]) : most;
        float scale = most / 127.0f;
        (is_value ? kv->value_scales : kv->key_scales)[token * heads + head] = scale;
        for (int64_t j = 0; j < dim; j++) ((int8_t *)data)[at + j] = (int8_t)(scale > 0.0f ? rintf(x[j] / scale) : 0.0f);
    }
}

/* One pair of functions a dtype: scores of the tokens, and their weighted values. */
#define DEFINE_PASSES(SUFFIX, TYPE)                                                                                        \
    static void scores_##SUFFIX(float *restrict scores, const float *restrict q, const TYPE *restrict key, int64_t stride, \
                                int64_t dim, int64_t tokens, float scale, const float *restrict scales, int64_t heads) {    \
        for (int64_t t = 0; t < tokens; t++, key += stride) {                                                              \
            f32x16 sum = {0};                                                                                              \
            int64_t j = 0;                                                                                                 \
            for (; j + LANES <= dim; j += LANES) sum += load_f32(q + j) * load_##SUFFIX(key + j);                          \
            float total = sum_of(sum);                                                                                     \
            for (; j < dim; j++) total += q[j] * one_##SUFFIX(key + j);                                                    \
            scores[t] = scale * total * (scales ? scales[t * heads] : 1.0f);                                               \
        }                                                                                                                  \
    }                                                                                                                      \
    static void values_##SUFFIX(float *restrict out, const float *restrict shares, const TYPE *restrict value,             \
                                int64_t stride, int64_t dim, int64_t tokens) {                                             \
        int64_t j = 0;                                                                                                     \
        for (; j + PASS <= dim; j += PASS) {                                                                               \
            f32x16 sum[PASS / LANES] = {0};                                                                                \
            for (int64_t t = 0; t < tokens; t++)                                                                           \
                for (int v = 0; v < PASS / LANES; v++) sum[v] += shares[t] * load_##SUFFIX(value + t * stride + j + v * LANES); \
            for (int v = 0; v < PASS / LANES; v++) store_f32(out + j + v * LANES, sum[v]);                                 \
        }                                                                                                                  \
        for (; j + 2 * LANES <= dim; j += 2 * LANES) {                                                                     \
            f32x16 a = {0}, b = {0}, c = {0}, d = {0};                                                                     \
            int64_t t = 0;                                                                                                 \
            const TYPE *w = value + j;                                                                                     \
            for (; t + 2 <= tokens; t += 2) {                                                                              \
                a += shares[t] * load_##SUFFIX(w + t * stride), b += shares[t] * load_##SUFFIX(w + t * stride + LANES);    \
                c += shares[t + 1] * load_##SUFFIX(w + (t + 1) * stride), d += shares[t + 1] * load_##SUFFIX(w + (t + 1) * stride + LANES); \
            }                                                                                                              \
            if (t < tokens) a += shares[t] * load_##SUFFIX(w + t * stride), b += shares[t] * load_##SUFFIX(w + t * stride + LANES); \
            store_f32(out + j, a + c), store_f32(out + j + LANES, b + d);                                                  \
        }                                                                                                                  \
        for (; j + LANES <= dim; j += LANES) {                                                                             \
            f32x16 sum = {0};                                                                                              \
            for (int64_t t = 0; t < tokens; t++) sum += shares[t] * load_##SUFFIX(value + t * stride + j);                 \
            store_f32(out + j, sum);                                                                                       \
        }                                                                                                                  \
        for (; j < dim; j++) {                                                                                             \
            float sum = 0.0f;                                                                                              \
            for (int64_t t = 0; t < tokens; t++) sum += shares[t] * one_##SUFFIX(value + t * stride + j);                  \
            out[j] = sum;                                                                                                  \
        }                                                                                                                  \
    }

DEFINE_PASSES(f32, float)
DEFINE_PASSES(bf16, uint16_t)
DEFINE_PASSES(i8, int8_t)

/* Softmax of n scores in place, not yet divided; returns the sum to divide by. */
static float softened(float *scores, int64_t n) {
    float most = -INFINITY;
    for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    f32x16 sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 e = exp_f32(load_f32(scores + i) - most);
        store_f32(scores + i, e);
        sum += e;
    }
    float total = sum_of(sum);
    for (; i < n; i++) total += scores[i] = expf(scores[i] - most);
    return total;
}

/* Attention of query head `head` of `heads`: out [dim_v], q [dim], over tokens `first` to `length` - 1. Query head h reads
 * key head h * key_heads / heads and value head h * value_heads / heads. scores: room for length - first floats. */
void fusebox_attend(float *restrict out, const float *restrict q, const struct cached *kv, int64_t head, int64_t heads, int64_t first, int64_t length,
                    float scale, float *restrict scores) {
    int64_t n = length - first, kh = head * kv->key_heads / heads, vh = head * kv->value_heads / heads;
    int64_t k_stride = kv->key_heads * kv->dim, v_stride = kv->value_heads * kv->dim_v;
    int64_t k = first * k_stride + kh * kv->dim, v = first * v_stride + vh * kv->dim_v;
    const float *key_scales = kv->kind == INT8 ? kv->key_scales + first * kv->key_heads + kh : 0;
    if (kv->kind == FLOAT32) scores_f32(scores, q, (const float *)kv->keys + k, k_stride, kv->dim, n, scale, 0, 0);
    else if (kv->kind == BFLOAT16) scores_bf16(scores, q, (const uint16_t *)kv->keys + k, k_stride, kv->dim, n, scale, 0, 0);
    else scores_i8(scores, q, (const int8_t *)kv->keys + k, k_stride, kv->dim, n, scale, key_scales, kv->key_heads);
    float total = softened(scores, n);
    if (kv->kind == INT8)
        for (int64_t t = 0; t < n; t++) scores[t] *= kv->value_scales[(first + t) * kv->value_heads + vh];
    if (kv->kind == FLOAT32) values_f32(out, scores, (const float *)kv->values + v, v_stride, kv->dim_v, n);
    else if (kv->kind == BFLOAT16) values_bf16(out, scores, (const uint16_t *)kv->values + v, v_stride, kv->dim_v, n);
    else values_i8(out, scores, (const int8_t *)kv->values + v, v_stride, kv->dim_v, n);
    for (int64_t j = 0; j < kv->dim_v; j++) out[j] /= total;
}

/* All heads of one token on their own, shared out over torch's threads; scores: [heads][length]. */
void fusebox_attention(float *out, const float *q, const struct cached *kv, int64_t heads, int64_t first, int64_t length, float scale, float *scores) {
    _Pragma("omp parallel for schedule(static)")
    for (int64_t h = 0; h < heads; h++)
        fusebox_attend(out + h * kv->dim_v, q + h * kv->dim, kv, h, heads, first, length, scale, scores + h * length);
}

/* Attention of one token and head over cached ones, and the writing of the cache. */
#include "fusebox.h"
#include "vector.h"
#include <omp.h>

/* Vectors of the values that stay in registers, for each of `group` heads, while the tokens go by. */
#define PASS(group) (REGISTERS / 2 / (group) < 4 ? REGISTERS / 2 / (group) : 4)

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

/* One pair of functions a dtype: scores of the tokens, and their weighted values, for `group` query heads that read the same cached
 * head; q, scores and out of one follow the other's at a stride. `group` is a constant at every call. */
#define DEFINE_PASSES(SUFFIX, TYPE)                                                                                        \
    INLINE void scores_##SUFFIX(float *restrict scores, int64_t room, const float *restrict q, int64_t q_stride, const TYPE *restrict key, \
                                int64_t stride, int64_t dim, int64_t tokens, float scale, const float *restrict scales, int64_t heads, const int group) { \
        for (int64_t t = 0; t < tokens; t++, key += stride) {                                                              \
            f32v sum[GROUP] = {0};                                                                                       \
            int64_t j = 0;                                                                                                 \
            for (; j + LANES <= dim; j += LANES) {                                                                         \
                f32v k = load_##SUFFIX(key + j);                                                                         \
                for (int g = 0; g < group; g++) sum[g] = added(sum[g], load_f32(q + g * q_stride + j), k);                 \
            }                                                                                                              \
            float factor = scale * (scales ? scales[t * heads] : 1.0f);                                                    \
            for (int g = 0; g < group; g++) {                                                                              \
                float total = sum_of(sum[g]);                                                                              \
                for (int64_t i = j; i < dim; i++) total += q[g * q_stride + i] * one_##SUFFIX(key + i);                    \
                scores[g * room + t] = factor * total;                                                                     \
            }                                                                                                              \
        }                                                                                                                  \
    }                                                                                                                      \
    INLINE void values_##SUFFIX(float *restrict out, int64_t out_stride, const float *restrict shares, int64_t room,       \
                                const TYPE *restrict value, int64_t stride, int64_t dim, int64_t tokens, const int group) { \
        const int pass = PASS(group);                                                                                      \
        int64_t j = 0;                                                                                                     \
        for (; j + pass * LANES <= dim; j += pass * LANES) {                                                               \
            f32v sum[REGISTERS / 2] = {0};                                                                                 \
            for (int64_t t = 0; t < tokens; t++)                                                                           \
                for (int v = 0; v < pass; v++) {                                                                           \
                    f32v w = load_##SUFFIX(value + t * stride + j + v * LANES);                                          \
                    for (int g = 0; g < group; g++) sum[g * pass + v] = added(sum[g * pass + v], splat(shares[g * room + t]), w); \
                }                                                                                                          \
            for (int g = 0; g < group; g++)                                                                                \
                for (int v = 0; v < pass; v++) store_f32(out + g * out_stride + j + v * LANES, sum[g * pass + v]);         \
        }                                                                                                                  \
        for (; j + LANES <= dim; j += LANES) {                                                                             \
            f32v sum[GROUP] = {0};                                                                                       \
            for (int64_t t = 0; t < tokens; t++) {                                                                         \
                f32v w = load_##SUFFIX(value + t * stride + j);                                                          \
                for (int g = 0; g < group; g++) sum[g] = added(sum[g], splat(shares[g * room + t]), w);                    \
            }                                                                                                              \
            for (int g = 0; g < group; g++) store_f32(out + g * out_stride + j, sum[g]);                                   \
        }                                                                                                                  \
        for (; j < dim; j++)                                                                                               \
            for (int g = 0; g < group; g++) {                                                                              \
                float sum = 0.0f;                                                                                          \
                for (int64_t t = 0; t < tokens; t++) sum += shares[g * room + t] * one_##SUFFIX(value + t * stride + j);   \
                out[g * out_stride + j] = sum;                                                                             \
            }                                                                                                              \
    }

DEFINE_PASSES(f32, float)
DEFINE_PASSES(bf16, uint16_t)
DEFINE_PASSES(i8, int8_t)

/* Softmax of n scores in place, not yet divided; returns the sum to divide by. */
static float softened(float *scores, int64_t n) {
    float most = -INFINITY;
    for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    f32v sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32v e = exp_f32(load_f32(scores + i) - most);
        store_f32(scores + i, e);
        sum += e;
    }
    float total = sum_of(sum);
    for (; i < n; i++) total += scores[i] = expf(scores[i] - most);
    return total;
}

INLINE void attend(float *restrict out, const float *restrict q, int64_t q_stride, const struct cached *kv, int64_t key_head, int64_t value_head, int64_t first, int64_t length,
                   float scale, float *restrict scores, const int group) {
    int64_t n = length - first, k_stride = kv->key_heads * kv->dim, v_stride = kv->value_heads * kv->dim_v;
    int64_t k = first * k_stride + key_head * kv->dim, v = first * v_stride + value_head * kv->dim_v;
    float totals[GROUP];
    if (kv->kind == FLOAT32) scores_f32(scores, n, q, q_stride, (const float *)kv->keys + k, k_stride, kv->dim, n, scale, 0, 0, group);
    else if (kv->kind == BFLOAT16) scores_bf16(scores, n, q, q_stride, (const uint16_t *)kv->keys + k, k_stride, kv->dim, n, scale, 0, 0, group);
    else scores_i8(scores, n, q, q_stride, (const int8_t *)kv->keys + k, k_stride, kv->dim, n, scale, kv->key_scales + first * kv->key_heads + key_head, kv->key_heads, group);
    for (int g = 0; g < group; g++) totals[g] = softened(scores + g * n, n);
    if (kv->kind == INT8)
        for (int g = 0; g < group; g++)
            for (int64_t t = 0; t < n; t++) scores[g * n + t] *= kv->value_scales[(first + t) * kv->value_heads + value_head];
    if (kv->kind == FLOAT32) values_f32(out, kv->dim_v, scores, n, (const float *)kv->values + v, v_stride, kv->dim_v, n, group);
    else if (kv->kind == BFLOAT16) values_bf16(out, kv->dim_v, scores, n, (const uint16_t *)kv->values + v, v_stride, kv->dim_v, n, group);
    else values_i8(out, kv->dim_v, scores, n, (const int8_t *)kv->values + v, v_stride, kv->dim_v, n, group);
    for (int g = 0; g < group; g++)
        for (int64_t j = 0; j < kv->dim_v; j++) out[g * kv->dim_v + j] /= totals[g];
}

/* Attention of query heads `head` to `last` - 1 of `heads`: out [dim_v] and q [dim] of each, q at a stride, over tokens `first` to
 * `length` - 1. Query head h reads key head h * key_heads / heads and value head h * value_heads / heads; neighbours that read the same
 * go through the cache together. scores: room for GROUP * (length - first) floats. */
void fusebox_attend(float *restrict out, const float *restrict q, int64_t q_stride, const struct cached *kv, int64_t head, int64_t last, int64_t heads, int64_t first, int64_t length,
                    float scale, float *restrict scores) {
    for (int64_t group; head < last; head += group, out += group * kv->dim_v, q += group * q_stride) {
        int64_t kh = head * kv->key_heads / heads, vh = head * kv->value_heads / heads;
        for (group = 1; group < GROUP && head + group < last && (head + group) * kv->key_heads / heads == kh && (head + group) * kv->value_heads / heads == vh;) group++;
        if (group == 4) attend(out, q, q_stride, kv, kh, vh, first, length, scale, scores, 4);
        else if (group == 3) attend(out, q, q_stride, kv, kh, vh, first, length, scale, scores, 3);
        else if (group == 2) attend(out, q, q_stride, kv, kh, vh, first, length, scale, scores, 2);
        else attend(out, q, q_stride, kv, kh, vh, first, length, scale, scores, 1);
    }
}

/* All heads of one token on their own, shared out over torch's threads; scores: [threads][GROUP][length]. */
void fusebox_attention(float *out, const float *q, const struct cached *kv, int64_t heads, int64_t first, int64_t length, float scale, float *scores) {
    _Pragma("omp parallel")
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), head = heads * thread / threads;
        fusebox_attend(out + head * kv->dim_v, q + head * kv->dim, kv->dim, kv, head, heads * (thread + 1) / threads, heads, first, length, scale, scores + thread * GROUP * length);
    }
}

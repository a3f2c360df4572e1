/* Norms, rotary positions, activations and one-token attention on float32 vectors: the small operations between products. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* RMSNorm or LayerNorm of `segments` pieces of n; gain and shift [n] may be NULL. out may be x. */
void fusebox_norm(float *out, const float *x, const float *gain, const float *shift, int64_t segments, int64_t n, float eps, int64_t centre) {
    for (int64_t s = 0; s < segments; s++, x += n, out += n) {
        float sum = 0.0f, squares = 0.0f;
        if (centre) {
            for (int64_t i = 0; i < n; i++) sum += x[i];
            sum /= (float)n;
        }
        for (int64_t i = 0; i < n; i++) squares += (x[i] - sum) * (x[i] - sum);
        float scale = 1.0f / sqrtf(squares / (float)n + eps);
        for (int64_t i = 0; i < n; i++) {
            float v = (x[i] - sum) * scale;
            if (gain) v *= gain[i];
            out[i] = shift ? v + shift[i] : v;
        }
    }
}

/* Rotary positions, half-split as in transformers: channel j of the first half turns with channel j + turned / 2.
 * x [heads, dim] in place; cosine and sine [turned / 2] of the token's position; channels from `turned` on stay. */
void fusebox_rope(float *x, const float *cosine, const float *sine, int64_t heads, int64_t dim, int64_t turned) {
    int64_t half = turned / 2;
    for (int64_t h = 0; h < heads; h++, x += dim)
        for (int64_t j = 0; j < half; j++) {
            float a = x[j], b = x[j + half];
            x[j] = a * cosine[j] - b * sine[j];
            x[j + half] = b * cosine[j] + a * sine[j];
        }
}

enum { SILU, RELU, GELU, GELU_TANH };

static inline float activated(float v, int64_t kind) {
    switch (kind) {
    case SILU: return v / (1.0f + expf(-v));
    case RELU: return v > 0.0f ? v : 0.0f;
    case GELU: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    default: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    }
}

/* out = activation(x), times `gated` where that is not NULL. */
void fusebox_activate(float *out, const float *x, const float *gated, int64_t n, int64_t kind) {
    if (gated) for (int64_t i = 0; i < n; i++) out[i] = activated(x[i], kind) * gated[i];
    else for (int64_t i = 0; i < n; i++) out[i] = activated(x[i], kind);
}

#define LANES 16
typedef float f32x16 __attribute__((vector_size(64)));

static inline float dot(const float *a, const float *b, int64_t n) {
    f32x16 sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 u, v;
        memcpy(&u, a + i, sizeof u);
        memcpy(&v, b + i, sizeof v);
        sum += u * v;
    }
    float total = 0.0f;
    for (int k = 0; k < LANES; k++) total += sum[k];
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

/* Attention of one token over `length` cached ones, softmax in one pass over tokens (running maximum).
 * q [heads, dim], out [heads, dim_v]; keys [length, key_heads, dim], values [length, value_heads, dim_v], token-major.
 * Query head h reads key head h * key_heads / heads and value head h * value_heads / heads. `first` is the earliest token seen. */
void fusebox_attention(float *restrict out, const float *restrict q, const float *restrict keys, const float *restrict values, int64_t heads,
                       int64_t key_heads, int64_t value_heads, int64_t dim, int64_t dim_v, int64_t first, int64_t length, float scale) {
    _Pragma("omp parallel for schedule(static)")
    for (int64_t h = 0; h < heads; h++) {
        const float *query = q + h * dim, *key = keys + (h * key_heads / heads) * dim, *value = values + (h * value_heads / heads) * dim_v;
        float *o = out + h * dim_v, best = -INFINITY, total = 0.0f;
        for (int64_t j = 0; j < dim_v; j++) o[j] = 0.0f;
        for (int64_t t = first; t < length; t++) {
            float score = scale * dot(query, key + t * key_heads * dim, dim);
            if (score > best) {
                float shrink = expf(best - score);
                total *= shrink;
                for (int64_t j = 0; j < dim_v; j++) o[j] *= shrink;
                best = score;
            }
            float share = expf(score - best);
            const float *v = value + t * value_heads * dim_v;
            total += share;
            for (int64_t j = 0; j < dim_v; j++) o[j] += share * v[j];
        }
        for (int64_t j = 0; j < dim_v; j++) o[j] /= total;
    }
}

/* Norms, rotary positions and activations on float32 vectors: the small operations between products. */
#include "fusebox.h"
#include "vector.h"

static float total_of(const float *x, int64_t n) {
    f32v sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load_f32(x + i);
    float total = sum_of(sum);
    for (; i < n; i++) total += x[i];
    return total;
}

static float squares_of(const float *x, int64_t n, float mean) {
    f32v sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32v v = load_f32(x + i) - mean;
        sum += v * v;
    }
    float total = sum_of(sum);
    for (; i < n; i++) total += (x[i] - mean) * (x[i] - mean);
    return total;
}

/* RMSNorm or LayerNorm of `segments` pieces of n; gain and shift [n] may be NULL. out may be x. */
void fusebox_norm(float *out, const float *x, const float *gain, const float *shift, int64_t segments, int64_t n, float eps, int64_t centre) {
    for (int64_t s = 0; s < segments; s++, x += n, out += n) {
        float mean = centre ? total_of(x, n) / (float)n : 0.0f;
        float scale = 1.0f / sqrtf(squares_of(x, n, mean) / (float)n + eps);
        for (int64_t i = 0; i < n; i++) {
            float v = (x[i] - mean) * scale;
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

INLINE f32v tanh_f32(f32v x) { /* 1 - 2 / (e^2x + 1); tiny x loses nothing that float keeps after the sum with 1 */
    return 1.0f - 2.0f / (exp_f32(2.0f * x) + 1.0f);
}

INLINE f32v erf_f32(f32v x) { /* Abramowitz and Stegun 7.1.26: 1.5e-7 absolute */
    f32v a = as_f32(as_u32(x) & 0x7fffffffu), t = 1.0f / (1.0f + 0.3275911f * a);
    f32v p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    f32v y = 1.0f - p * exp_f32(-a * a);
    return as_f32(as_u32(y) | (as_u32(x) & 0x80000000u));
}

INLINE f32v activated(f32v v, int64_t kind) {
    switch (kind) {
    case SILU: return v / (1.0f + exp_f32(-v));
    case RELU: return choose(v <= splat(0.0f), splat(0.0f), v); /* NaN stays NaN */
    case GELU: return 0.5f * v * (1.0f + erf_f32(v * 0.70710678118654752f));
    default: return 0.5f * v * (1.0f + tanh_f32(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    }
}

/* out = activation(x), times `gated` where that is not NULL. */
void fusebox_activate(float *out, const float *x, const float *gated, int64_t n, int64_t kind) {
    for (int64_t i = 0; i < n; i += LANES) {
        float in[LANES] = {0}, factor[LANES] = {0}, result[LANES];
        int64_t width = n - i < LANES ? n - i : LANES;
        memcpy(in, x + i, (size_t)width * sizeof *in);
        f32v v = activated(load_f32(in), kind);
        if (gated) {
            memcpy(factor, gated + i, (size_t)width * sizeof *factor);
            v *= load_f32(factor);
        }
        store_f32(result, v);
        memcpy(out + i, result, (size_t)width * sizeof *out);
    }
}

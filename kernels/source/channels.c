/* Which entries of a vector are large enough to be read for: Top-K and threshold with index compaction in one go. */
#include "fusebox.h"
#include "vector.h"

#define MAGNITUDE 0x7fffffffu

static inline uint32_t magnitude_bits(float v) { /* orders as |v| does */
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits & MAGNITUDE;
}

/* Append to rows the indices from i on that `chosen` marks; returns how many. Room for LANES is needed whatever is chosen. */
#if defined(__AVX512F__)
typedef __mmask16 marks;
INLINE marks marked(i32v chosen) { return _mm512_movepi32_mask((__m512i)chosen); }
INLINE int64_t append(int32_t *rows, int64_t i, marks chosen) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(rows, _mm512_maskz_compress_epi32(chosen, _mm512_add_epi32(steps, _mm512_set1_epi32((int)i))));
    return __builtin_popcount(chosen);
}
#elif defined(__AVX2__)
typedef unsigned marks;
INLINE marks marked(i32v chosen) { return (unsigned)_mm256_movemask_ps((__m256)chosen); }
INLINE int64_t append(int32_t *rows, int64_t i, marks chosen) {
    int64_t count = 0;
    _Pragma("GCC unroll 8")
    for (int k = 0; k < LANES; k++) rows[count] = (int32_t)(i + k), count += chosen >> k & 1;
    return count;
}
#else
typedef i32v marks;
INLINE marks marked(i32v chosen) { return chosen; }
INLINE int64_t append(int32_t *rows, int64_t i, marks chosen) {
    int64_t count = 0;
    for (int k = 0; k < LANES; k++) rows[count] = (int32_t)(i + k), count -= chosen[k];
    return count;
}
#endif

INLINE i32v magnitudes(const float *x) { return (i32v)(as_u32(load_f32(x)) & MAGNITUDE); }

/* Indices of entries whose magnitude bits are at least `floor`, ascending; returns how many. */
static int64_t reaching(int32_t *restrict rows, const float *restrict x, int64_t n, uint32_t floor) {
    int64_t count = 0, i = 0;
    for (; i + LANES <= n; i += LANES) count += append(rows + count, i, marked(magnitudes(x + i) >= (i32v){0} + (int32_t)floor));
    for (; i < n; i++)
        if (magnitude_bits(x[i]) >= floor) rows[count++] = (int32_t)i;
    return count;
}

/* Indices of non-zero entries, ascending; returns how many. */
int64_t fusebox_nonzero(int32_t *restrict rows, const float *restrict x, int64_t n) { return reaching(rows, x, n, 1); }

/* Indices of entries with |x| > threshold, ascending; returns how many. NaN is above nothing. */
int64_t fusebox_above(int32_t *restrict rows, const float *restrict x, int64_t n, float threshold) {
    int64_t count = 0, i = 0;
    for (; i + LANES <= n; i += LANES) count += append(rows + count, i, marked(as_f32(as_u32(load_f32(x + i)) & MAGNITUDE) > splat(threshold)));
    for (; i < n; i++)
        if (fabsf(x[i]) > threshold) rows[count++] = (int32_t)i;
    return count;
}

/* How many entries have magnitude bits of at least `floor`. */
static int64_t at_least(const float *x, int64_t n, uint32_t floor) {
    i32v counts = {0};
    int64_t i = 0, total = 0;
    for (; i + LANES <= n; i += LANES) counts -= magnitudes(x + i) >= (i32v){0} + (int32_t)floor;
    for (int k = 0; k < LANES; k++) total += counts[k];
    for (; i < n; i++) total += magnitude_bits(x[i]) >= floor;
    return total;
}

/* Indices of the `keep` entries of largest magnitude, ascending; of equal ones the first. Bisects the bits of |x| until a
 * magnitude has exactly `keep` entries at or above it, or is that of the last one kept. */
int64_t fusebox_largest(int32_t *restrict rows, const float *restrict x, int64_t n, int64_t keep) {
    if (keep <= 0) return 0;
    if (keep >= n) {
        for (int64_t i = 0; i < n; i++) rows[i] = (int32_t)i;
        return n;
    }
    uint32_t low = 0, high = MAGNITUDE; /* at least `keep` entries reach low; fewer exceed high */
    int64_t above = 0;                  /* entries that exceed `high` */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + 1;
        int64_t count = at_least(x, n, middle);
        if (count >= keep) low = middle;
        else high = middle - 1, above = count;
        if (count == keep) {
            high = low - 1; /* all that reach `low` are wanted */
            above = keep;
            break;
        }
    }
    if (above == keep) return reaching(rows, x, n, high + 1);
    int64_t equal = keep - above, count = 0; /* of the entries of magnitude `low` itself, the first so many */
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude_bits(x[i]);
        if (bits > low || (bits == low && equal-- > 0)) rows[count++] = (int32_t)i;
    }
    return count;
}

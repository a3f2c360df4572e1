/* Which entries of a vector are large enough to be read for: Top-K and threshold with index compaction in one go. */
#include "fusebox.h"
#include "vector.h"

#define MAGNITUDE 0x7fffffffu

static inline uint32_t magnitude_bits(float v) { /* orders as |v| does */
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits & MAGNITUDE;
}

/* Indices of non-zero entries, ascending; returns how many. */
int64_t fusebox_nonzero(int32_t *restrict rows, const float *restrict x, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        rows[count] = (int32_t)i;
        count += x[i] != 0.0f;
    }
    return count;
}

/* Indices of entries with |x| > threshold, ascending; returns how many. */
int64_t fusebox_above(int32_t *restrict rows, const float *restrict x, int64_t n, float threshold) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        rows[count] = (int32_t)i;
        count += (x[i] < 0 ? -x[i] : x[i]) > threshold;
    }
    return count;
}

/* How many entries have magnitude bits of at least `floor`. */
static int64_t at_least(const float *x, int64_t n, uint32_t floor) {
    i32x16 counts = {0};
    int64_t i = 0, total = 0;
    for (; i + LANES <= n; i += LANES) counts -= (i32x16)(as_u32(load_f32(x + i)) & MAGNITUDE) >= (i32x16){0} + (int32_t)floor;
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
    int64_t equal = keep - above, count = 0; /* how many of magnitude `low` itself */
    uint32_t beyond = high + 1;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude_bits(x[i]);
        int tie = bits == low && beyond > low && equal > 0;
        equal -= tie;
        rows[count] = (int32_t)i;
        count += bits >= beyond || tie;
    }
    return count;
}

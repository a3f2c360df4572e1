/* Which entries of a vector are large enough to be read for: Top-K and threshold with index compaction in one go. */
#include <stdint.h>
#include <string.h>

static inline uint32_t magnitude_bits(float v) { /* orders as |v| does */
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits & 0x7fffffffu;
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

/* Indices of the `keep` entries of largest magnitude, ascending; of equal ones the first. Radix select over the bits of
 * |x|: three passes of 11, 10 and 10 bits find the smallest magnitude that is kept, one pass writes the indices. */
int64_t fusebox_largest(int32_t *restrict rows, const float *restrict x, int64_t n, int64_t keep) {
    if (keep <= 0) return 0;
    if (keep >= n) {
        for (int64_t i = 0; i < n; i++) rows[i] = (int32_t)i;
        return n;
    }
    static const int shift[3] = {20, 10, 0}, width[3] = {11, 10, 10};
    uint32_t prefix = 0, known = 0;
    int64_t wanted = keep; /* still to be found among entries that share the prefix */
    for (int pass = 0; pass < 3; pass++) {
        uint32_t counts[2048] = {0}, buckets = 1u << width[pass];
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = magnitude_bits(x[i]);
            if ((bits & known) == prefix) counts[(bits >> shift[pass]) & (buckets - 1)]++;
        }
        uint32_t bucket = buckets - 1;
        while (counts[bucket] < wanted) wanted -= counts[bucket--];
        prefix |= bucket << shift[pass];
        known |= (buckets - 1) << shift[pass];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude_bits(x[i]);
        int equal = bits == prefix && wanted > 0;
        wanted -= equal;
        rows[count] = (int32_t)i;
        count += bits > prefix || equal;
    }
    return count;
}

/* The k-th largest entry of each row, by bisection over its bit pattern: the patterns of real
   numbers, as integers, are in the order of the numbers once those of the negative ones are turned.
 */
#include "rows.h"

#define SIGN_BIT (8 * (int)sizeof(integer) - 1)
#define LOWEST ((integer)((uint64_t)1 << SIGN_BIT))

INLINE integer turned(integer bits) { return bits ^ ((bits >> SIGN_BIT) & ~LOWEST); }

INLINE int64_t count_from(const integer *ranks, int64_t n, integer least) {
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        integer count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t j = start; j < end; j++) count += ranks[j] >= least;
        total += count;
    }
    return total;
}

/* -inf if fewer than k entries may receive mass; NaN if one of them is NaN or inf. */
INLINE real kth_of_row(const real *x, integer *ranks, Row row, int64_t k) {
    int spoilt = 0;
    for (int64_t j = 0; j < row.limit; j++) {
        real score = row.mask && !row.mask[j] ? -(real)INFINITY : x[j];
        spoilt |= !(score < INFINITY);
        integer bits;
        memcpy(&bits, &score, sizeof bits);
        ranks[j] = turned(bits);
    }
    if (spoilt) return NAN;
    integer low = LOWEST, high = ~LOWEST; /* at least k ranks are >= low */
    while (low < high) {
        integer middle = (low >> 1) + (high >> 1) + ((low | high) & 1); /* rounded up */
        if (count_from(ranks, row.limit, middle) >= k)
            low = middle;
        else
            high = middle - 1;
    }
    integer bits = turned(low);
    real kth;
    memcpy(&kth, &bits, sizeof kth);
    return kth;
}

int kth_largest(const Rows *rows, int64_t k, const real *x, real *kth) {
    int64_t count = row_count(rows), size = rows_in_chunk(rows);
    int failed = 0;
#pragma omp parallel num_threads(rows->threads)
    {
        integer *ranks = malloc((rows->columns + 1) * sizeof(integer));
        if (!ranks) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t start = 0; start < count; start += size)
            for (int64_t i = start; !failed && i < start + size && i < count; i++)
                kth[i] = kth_of_row(x + i * rows->columns, ranks, row_at(rows, i), k);
        free(ranks);
    }
    return failed;
}

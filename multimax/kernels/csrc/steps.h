/* The steps around the modulator: l = after cap tanh(sigma(before score) / cap), with one of the
   factors, which are those of a row, or none. The score is that of the product query key^T, with a
   bias that comes before. A score of at most MASK_FLOOR is masked, as the steps could lift it. */
#pragma once
#include "softmax_row.h"

/* What the modulator sees, in the place of the scores. */
INLINE void prepare_row(Row row, real *x) {
    real floor = row.cap > 0 ? MASK_FLOOR : -(real)INFINITY; /* of what is capped */
#pragma omp simd
    for (int64_t j = 0; j < row.limit; j++) {
        real value = row.before * x[j];
        x[j] = x[j] <= MASK_FLOOR || value <= floor ? -(real)INFINITY : value;
    }
}

INLINE real cap_row_as(Row row, real *y, real *capped, int cap) {
    real highest = -INFINITY, inverse = 1 / row.cap;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < row.limit; j++) {
        real value = y[j];
        int hidden = value == -(real)INFINITY;
        if (cap)
            value = value == INFINITY ? (real)NAN : row.cap * hyperbolic_tangent(value * inverse);
        capped[j] = hidden ? 0 : value;
        value = hidden ? -(real)INFINITY : row.after * value;
        highest = value > highest ? value : highest;
        y[j] = value;
    }
    return highest;
}

/* l in the place of the y of a row, and what the factor multiplies; returns the largest l. */
static inline real cap_row(Row row, real *y, real *capped) {
    if (row.cap > 0) return cap_row_as(row, y, capped, 1);
    return cap_row_as(row, y, capped, 0);
}

/* l of a row with its bias; returns the largest. One function for all that call it, of all orders.
   `capped` is written if there is such a step. */
static inline real logits_row(const real *x, real *l, real *capped, Row row, Modulator m,
                              int order) {
    real highest;
    BY_ORDER(order, highest = modulate_row(x, l, row, m, ORDER))
    if (row.capped) highest = cap_row(row, l, capped);
    return row.bias && !row.bias_before ? add_bias_row(row, l) : highest;
}

/* From dL/dl to dL/dy, in place; returns the gradient of the factor after the modulator. Where
   there is no gradient, y may be anything. */
static inline double pull_back_cap(Row row, const real *capped, real *d) {
    real inverse = row.cap > 0 ? 1 / row.cap : 0;
    double total = 0;
    for (int64_t start = 0; start < row.limit; start += SEGMENT) {
        int64_t end = start + SEGMENT < row.limit ? start + SEGMENT : row.limit;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) {
            real value = d[j] != 0 ? capped[j] : 0, tangent = value * inverse;
            sum += d[j] * value;
            d[j] *= row.after * (1 - tangent * tangent);
        }
        total += sum;
    }
    return total;
}

/* From the gradients of what the modulator sees to those of the scores, in place; returns the
   gradient of the factor before it. Where there is no gradient, x may be anything. */
static inline double pull_back_factor(const real *x, real *d, int64_t n, real factor) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) {
            sum += d[j] * (d[j] != 0 ? x[j] : 0);
            d[j] *= factor;
        }
        total += sum;
    }
    return factor == 0 ? 0 : total / factor;
}

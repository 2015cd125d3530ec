/* SoftMax of one row of modulated scores, and what its backward pass is made of. */
#pragma once
#include "modulator.h"

/* Adds the bias of a row to its scores, or to their y: -inf where it, or the mask, masks; returns
   the largest. */
INLINE real add_bias_row(Row row, real *y) {
    real highest = -INFINITY;
    if (row.mask) {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = y[j] + row.bias[j];
            value = row.mask[j] && !(row.bias[j] <= MASK_FLOOR) ? value : -(real)INFINITY;
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    } else {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = row.bias[j] <= MASK_FLOOR ? -(real)INFINITY : y[j] + row.bias[j];
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    }
    return highest;
}

/* Exactly 0 where mask or bias mask, also next to NaN. */
RARE void hide_row(Row row, real *p) {
    if (row.mask) mask_row(row, p, p);
    if (row.bias)
        for (int64_t j = 0; j < row.limit; j++) p[j] = row.bias[j] <= MASK_FLOOR ? 0 : p[j];
}

/* The same, also where the score itself is masked, if p has not taken the place of the scores x. */
RARE void clear_row(Row row, Modulator m, int order, const real *x, real *p) {
    if (x != p)
        for (int64_t j = 0; j < row.limit; j++) p[j] = hides(x[j], m, order) ? 0 : p[j];
    hide_row(row, p);
}

/* From the y of a row, in p, to its probabilities; its statistics are the highest y and 1 / sum, or
   zeros if all is masked. */
INLINE void normalize_row(Row row, Modulator m, int order, real highest, const real *x, real *p,
                          real *statistics) {
    if (highest == -INFINITY) highest = 0; /* all masked, or NaN, which `>` does not see */
    double sum = exponentiate_row(p, row.limit, highest);
    real inverse = sum == 0 ? 0 : (real)(1 / sum);
    scale_row(p, row.limit, inverse);
    if (isnan(inverse)) clear_row(row, m, order, x, p);
    if (statistics) statistics[0] = highest, statistics[1] = inverse;
}

/* Probabilities of a row without a bias. */
INLINE void forward_row(Row row, Modulator m, int order, const real *x, real *p, real *statistics) {
    normalize_row(row, m, order, modulate_row(x, p, row, m, order), x, p, statistics);
}

INLINE double dot(const real *a, const real *b, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) sum += a[j] * b[j];
        total += sum;
    }
    return total;
}

/* dy = p (g - mean), where g is that of the entries which dropout keeps; dy may be g. */
INLINE void subtract_mean_row(Row row, const real *p, const real *g, real mean, real *dy) {
    if (row.factor > 0) {
#pragma omp simd
        for (int64_t j = 0; j < row.limit; j++) dy[j] = p[j] * (g[j] * kept(row, j) - mean);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < row.limit; j++) dy[j] = p[j] * (g[j] - mean);
    }
}

INLINE void drop_row(Row row, real *p) {
    if (row.factor == 0) return;
#pragma omp simd
    for (int64_t j = 0; j < row.limit; j++) p[j] *= kept(row, j);
}

/* Sparsemax and 1.5-entmax: p = (s - tau)+ of s = x, or p = (s - tau)+^2 of s = x / 2, where tau is
   such that p sums to one; forward and backward, a row at a time.

   Source: Martins and Astudillo 2016; Peters et al. 2019. */
#include "rows.h"

#define MOST_STEPS 100

/* s less its largest, -inf where masked. False for a row that is all masked. */
INLINE int shift_row(const real *x, real *s, Row row, real factor) {
    real highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < row.limit; j++) {
        real value = row.mask && !row.mask[j] ? -(real)INFINITY : x[j];
        highest = value > highest ? value : highest;
        s[j] = value;
    }
    int any = highest > -INFINITY;
    if (!any) highest = 0; /* all masked, or NaN, which `>` does not see */
#pragma omp simd
    for (int64_t j = 0; j < row.limit; j++) s[j] = (s[j] - highest) * factor;
    return any;
}

/* Newton's method from the left, where the sum of p is convex, decreasing and at least 1: it rises
   to tau and never passes it. For sparsemax it ends, on the support, after finitely many steps. */
INLINE real find_threshold(const real *s, int64_t n, int squared) {
    real tau = -1;
    double support = -1;
    for (int step = 0; step < MOST_STEPS; step++) {
        double total = 0, slope = 0;
        for (int64_t start = 0; start < n; start += SEGMENT) {
            int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
            real sum = 0, count = 0;
#pragma omp simd reduction(+ : sum, count)
            for (int64_t j = start; j < end; j++) {
                real above = s[j] - tau;
                above = above < 0 ? 0 : above;
                sum += squared ? above * above : above;
                count += squared ? 2 * above : (real)(above > 0 ? 1 : 0);
            }
            total += sum;
            slope += count;
        }
        real next = tau + (real)((total - 1) / slope);
        if (isnan(next)) return next;
        if (!(next > tau) || (!squared && slope == support)) break;
        support = slope;
        tau = next;
    }
    return tau;
}

INLINE void threshold_row(const real *x, real *p, Row row, int squared) {
    int64_t n = row.limit;
    int any = shift_row(x, p, row, squared ? (real)0.5 : (real)1);
    real tau = any ? find_threshold(p, n, squared) : 0;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real above = p[j] - tau;
        above = above < 0 ? 0 : above;
        p[j] = squared ? above * above : above;
    }
    if (isnan(tau)) { /* exactly 0 where masked, also next to NaN */
        for (int64_t j = 0; j < n; j++) p[j] = x[j] == -INFINITY ? 0 : p[j];
        if (row.mask) mask_row(row, p, p);
    }
}

/* dx = w (g - (sum of w g) / (sum of w)), w = 1 on the support (sparsemax) or sqrt(p) (entmax). */
INLINE void threshold_backward_row(const real *p, const real *g, real *dx, int64_t n, int squared) {
    double total = 0, weights = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0, weight = 0;
#pragma omp simd reduction(+ : sum, weight)
        for (int64_t j = start; j < end; j++) {
            real w = squared ? SQUARE_ROOT(p[j]) : (real)(p[j] > 0 ? 1 : 0);
            sum += w * g[j];
            weight += w;
        }
        total += sum;
        weights += weight;
    }
    real mean = weights > 0 ? (real)(total / weights) : 0;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real w = squared ? SQUARE_ROOT(p[j]) : (real)(p[j] > 0 ? 1 : 0);
        dx[j] = w * (g[j] - mean);
    }
    if (!(weights > 0)) /* all is masked, or NaN but for what is masked */
        for (int64_t j = 0; j < n; j++) dx[j] = isnan(p[j]) ? p[j] : dx[j];
}

int threshold_forward(const Rows *rows, int squared, const real *x, real *p) {
    int64_t count = row_count(rows), size = rows_in_chunk(rows);
#pragma omp parallel for schedule(static) num_threads(rows->threads)
    for (int64_t start = 0; start < count; start += size)
        for (int64_t i = start; i < start + size && i < count; i++) {
            int64_t at = i * rows->columns;
            if (squared)
                threshold_row(x + at, p + at, row_at(rows, i), 1);
            else
                threshold_row(x + at, p + at, row_at(rows, i), 0);
        }
    return 0;
}

int threshold_backward(const Rows *rows, int squared, const real *p, const real *g, real *dx) {
    int64_t count = row_count(rows), size = rows_in_chunk(rows), n = rows->columns;
#pragma omp parallel for schedule(static) num_threads(rows->threads)
    for (int64_t start = 0; start < count; start += size)
        for (int64_t i = start; i < start + size && i < count; i++) {
            if (squared)
                threshold_backward_row(p + i * n, g + i * n, dx + i * n, n, 1);
            else
                threshold_backward_row(p + i * n, g + i * n, dx + i * n, n, 0);
        }
    return 0;
}

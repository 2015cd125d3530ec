/* SoftMax of modulated scores, forward and backward. */
#include "softmax_row.h"

#define STEP 1024 /* entries */

LAYOUT(Rows, threads)

int softmax_forward(const Rows *rows, int order, const real *coefficients, const real *x, real *p) {
    Modulator m = modulator(coefficients, order, 1);
    int64_t count = row_count(rows), size = rows_in_chunk(rows);
#pragma omp parallel for schedule(static) num_threads(rows->threads)
    for (int64_t start = 0; start < count; start += size) {
        int64_t end = start + size < count ? start + size : count;
        for (int64_t i = start; i < end; i++) {
            int64_t at = i * rows->columns;
            BY_ORDER(order, forward_row(row_at(rows, i), m, ORDER, x + at, p + at, NULL))
        }
    }
    return 0;
}

/* A row of NaN has no gradient where p is 0, and NaN elsewhere. */
RARE void clear_gradient(const real *p, real *dx, int64_t n) {
    int spoilt = 0;
    for (int64_t j = 0; j < n; j++) spoilt |= isnan(p[j]);
    for (int64_t j = 0; spoilt && j < n; j++) dx[j] = p[j] == 0 ? 0 : dx[j];
}

INLINE void subtract_row(Row row, const real *p, const real *g, real *dx) {
    real mean = (real)dot(p, g, row.limit);
    if (row.mask && !isfinite(mean)) { /* perhaps because of a g that is masked */
        mask_row(row, g, dx);
        mean = (real)dot(p, dx, row.limit);
        subtract_mean_row(row, p, dx, mean, dx);
        mask_row(row, dx, dx);
    } else {
        subtract_mean_row(row, p, g, mean, dx);
    }
    if (isnan(mean)) clear_gradient(p, dx, row.limit);
}

/* From p and g = dL/dp to dL/dx, in steps of some rows that stay in the L1 cache. */
INLINE void backward_chunk(const Rows *rows, Modulator m, int order, int64_t start, int64_t end,
                           const real *x, const real *p, const real *g, real *dx, double *sums) {
    int64_t columns = rows->columns, step = columns >= STEP ? 1 : STEP / (columns + 1) + 1;
    VectorSums of_chunk = {0};
    for (int64_t first = start; first < end; first += step) {
        int64_t last = first + step < end ? first + step : end;
        for (int64_t i = first; i < last; i++) {
            int64_t at = i * columns;
            subtract_row(row_at(rows, i), p + at, g + at, dx + at);
        }
        int64_t at = first * columns, n = (last - first) * columns;
        if (n > 2 * STEP)
            pull_back(x + at, dx + at, n, m, order, sums);
        else
            pull_back_block(x + at, dx + at, n, m, order, sums ? &of_chunk : NULL);
    }
    if (sums) add_sums(&of_chunk, m, order, sums);
}

/* `sums` (2 + 4 order) gets the gradients of the coefficients, unless it is NULL. */
int softmax_backward(const Rows *rows, int order, const real *coefficients, const real *x,
                     const real *p, const real *g, real *dx, double *sums) {
    Modulator m = modulator(coefficients, order, 1);
    int64_t count = row_count(rows), size = rows_in_chunk(rows), chunks = (count + size - 1) / size;
    Sums *partial = sums ? calloc(chunks + 1, sizeof(Sums)) : NULL;
    if (sums && !partial) return 1;
#pragma omp parallel for schedule(static) num_threads(rows->threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t start = chunk * size, end = start + size < count ? start + size : count;
        double *into = partial ? partial[chunk].values : NULL;
        BY_ORDER(order, backward_chunk(rows, m, ORDER, start, end, x, p, g, dx, into))
    }
    add_up(sums, partial, chunks, order);
    return 0;
}

/* SoftMax of modulated scores, forward and backward. */
#include "softmax_row.h"

int softmax_forward(const Rows *rows, int order, const real *coefficients, const real *x, real *p) {
    Modulator m = modulator(coefficients, order);
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

/* From p and g = dL/dp to dL/dx. */
INLINE void backward_chunk(const Rows *rows, Modulator m, int order, int64_t start, int64_t end,
                           const real *x, const real *p, const real *g, real *dx, double *sums) {
    int64_t columns = rows->columns, first = start * columns, n = (end - start) * columns;
    for (int64_t i = start; i < end; i++) {
        int64_t at = i * columns;
        Row row = row_at(rows, i);
        real mean = (real)dot(p + at, g + at, row.limit);
        if (row.mask && !isfinite(mean)) { /* perhaps because of a g that is masked */
            mask_row(row, g + at, dx + at);
            mean = (real)dot(p + at, dx + at, row.limit);
            subtract_mean_row(row, p + at, dx + at, mean, dx + at);
            mask_row(row, dx + at, dx + at);
        } else {
            subtract_mean_row(row, p + at, g + at, mean, dx + at);
        }
    }
    pull_back(x + first, dx + first, n, m, order, rows->mask != NULL, sums);
}

/* `sums` (2 + 4 order) gets the gradients of the coefficients, unless it is NULL. */
int softmax_backward(const Rows *rows, int order, const real *coefficients, const real *x,
                     const real *p, const real *g, real *dx, double *sums) {
    Modulator m = modulator(coefficients, order);
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

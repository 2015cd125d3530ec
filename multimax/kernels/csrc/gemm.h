/* Small matrix products, C (+)= A B, for factors that stay in the cache. */
#pragma once
#include "rows.h"

/* Of C, as many as the registers hold. */
#if VECTOR_BYTES == 32
#define TILE_ROWS 6
#else
#define TILE_ROWS 8
#endif
#define TILE_COLUMNS (2 * LANES)

/* A tile of `rows` x TILE_COLUMNS of C; A is read at a[i * row_step + k * step]. */
INLINE void multiply_tile(int rows, int64_t depth, const real *a, int64_t row_step, int64_t step,
                          const real *b, int64_t b_stride, real *c, int64_t c_stride, int add) {
    vector left[TILE_ROWS], right[TILE_ROWS];
    for (int i = 0; i < rows; i++) {
        left[i] = add ? load(c + i * c_stride) : (vector){0};
        right[i] = add ? load(c + i * c_stride + LANES) : (vector){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        vector b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + LANES);
        for (int i = 0; i < rows; i++) {
            real factor = a[i * row_step + k * step];
            left[i] += factor * b0;
            right[i] += factor * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        store(c + i * c_stride, left[i]);
        store(c + i * c_stride + LANES, right[i]);
    }
}

#define DEPTH 256 /* of A and B that is worked off at once, so that B is read from the L2 cache */

/* C (m x n) = or += A (m x depth) B (depth x n), n a multiple of TILE_COLUMNS. */
static void multiply(int64_t m, int64_t n, int64_t depth, const real *a, int64_t row_step,
                     int64_t step, const real *b, int64_t b_stride, real *c, int64_t c_stride,
                     int add) {
    if (depth == 0 && !add)
        for (int64_t i = 0; i < m; i++) memset(c + i * c_stride, 0, n * sizeof(real));
    for (int64_t start = 0; start < depth; start += DEPTH) {
        int64_t length = depth - start < DEPTH ? depth - start : DEPTH;
        int sum = add || start > 0;
        for (int64_t j = 0; j < n; j += TILE_COLUMNS) {
            const real *of_a = a + start * step, *of_b = b + start * b_stride + j;
            real *of_c = c + j;
            int64_t i = 0;
            for (; i + TILE_ROWS <= m; i += TILE_ROWS)
                multiply_tile(TILE_ROWS, length, of_a + i * row_step, row_step, step, of_b,
                              b_stride, of_c + i * c_stride, c_stride, sum);
            for (; i + 4 <= m; i += 4)
                multiply_tile(4, length, of_a + i * row_step, row_step, step, of_b, b_stride,
                              of_c + i * c_stride, c_stride, sum);
            for (; i < m; i++)
                multiply_tile(1, length, of_a + i * row_step, row_step, step, of_b, b_stride,
                              of_c + i * c_stride, c_stride, sum);
        }
    }
}

/* Rows of `from` into rows of `to` that are wider, with zeros behind them. */
static void copy_padded(const real *from, int64_t from_stride, real *to, int64_t to_stride,
                        int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        memcpy(to + i * to_stride, from + i * from_stride, columns * sizeof(real));
        memset(to + i * to_stride + columns, 0, (to_stride - columns) * sizeof(real));
    }
}

/* The same, transposed: to[j][i] = from[i][j]. */
static void copy_transposed(const real *from, int64_t from_stride, real *to, int64_t to_stride,
                            int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; j++)
        memset(to + j * to_stride + rows, 0, (to_stride - rows) * sizeof(real));
    for (int64_t start = 0; start < rows; start += LANES)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = start; i < rows && i < start + LANES; i++)
                to[j * to_stride + i] = from[i * from_stride + j];
}

/* The modulator: from scores to y and, in the backward pass, from dL/dy to dL/dscore.

   y = sigma(z), z = scale score + shift, score = score_scale x,
   sigma(z) = z + t0 (r0 - z)+ + t1 (z - r1)+ + t2 (r2 - z)+^2 + t3 (z - r3)+^2

   A score of at most MASK_FLOOR is masked if there is a sigma, and so is such a z.

   Coefficients: [scale, shift] for order 0, [scale, shift, t0, t1, r0, r1] for 1,
   [scale, shift, t0..t3, r0..r3] for 2. */
#pragma once
#include "rows.h"

#define MOST_COEFFICIENTS 10
#define MASK_FLOOR ((real) - 9984) /* that of functional.py */
#define TAME ((real)1e6) /* products of such scores and coefficients do not overflow */

typedef struct {
    real scale, shift; /* of x: scale has the factor score_scale */
    real t0, t1, t2, t3, r0, r1, r2, r3;
    real score_scale;
    int affine; /* scale and shift are not those of the identity */
    int tame;   /* so are all coefficients */
} Modulator;
typedef struct {
    double values[MOST_COEFFICIENTS];
} Sums;

INLINE int is_tame(const real *x, int64_t n) {
    vector squares[4] = {{0}};
    real rest = 0;
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES)
        for (int64_t k = 0; k < 4; k++) {
            vector v = load(x + j + k * LANES);
            squares[k] += v * v;
        }
    for (; j < n; j++) rest += x[j] * x[j];
    return rest + sum_of(squares[0] + squares[1] + squares[2] + squares[3]) < TAME * TAME;
}

static Modulator modulator(const real *c, int order, real score_scale) {
    Modulator m = {c[0] * score_scale, c[1]};
    m.score_scale = score_scale, m.affine = c[0] != 1 || c[1] != 0;
    if (order == 1) m.t0 = c[2], m.t1 = c[3], m.r0 = c[4], m.r1 = c[5];
    if (order == 2) m.t0 = c[2], m.t1 = c[3], m.t2 = c[4], m.t3 = c[5];
    if (order == 2) m.r0 = c[6], m.r1 = c[7], m.r2 = c[8], m.r3 = c[9];
    m.tame = is_tame(&m.scale, 1) && is_tame(c, 2 + 4 * order);
    return m;
}

INLINE real positive(real x) { return x < 0 ? 0 : x; } /* NaN stays NaN */

INLINE real modulated(real x, Modulator m, int order) {
    real z = m.scale * x + m.shift, y = z;
    if (order >= 1) y += m.t0 * positive(m.r0 - z) + m.t1 * positive(z - m.r1);
    if (order >= 2) {
        real low = positive(m.r2 - z), high = positive(z - m.r3);
        y += m.t2 * low * low + m.t3 * high * high;
    }
    if (order >= 1) y = z <= MASK_FLOOR ? -INFINITY : y;
    return y;
}

/* y of an entry. An affine map can lift what is masked, and turn the infinities. */
INLINE real y_of(real x, Modulator m, int order, int affine) {
    real score = m.score_scale * x, y = modulated(x, m, order);
    if (affine) y = score == INFINITY ? (real)NAN : y;
    if (affine) y = score <= MASK_FLOOR ? -(real)INFINITY : y;
    return y;
}

INLINE real modulate_row_as(const real *x, real *y, Row row, Modulator m, int order, int affine) {
    real highest = -INFINITY;
    if (row.mask) {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = row.mask[j] ? y_of(x[j], m, order, affine) : -(real)INFINITY;
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    } else {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = y_of(x[j], m, order, affine);
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    }
    return highest;
}

/* y of a row, -inf where masked, also by its score; returns the largest. */
INLINE real modulate_row(const real *x, real *y, Row row, Modulator m, int order) {
    if (order >= 1 && m.affine) return modulate_row_as(x, y, row, m, order, 1);
    return modulate_row_as(x, y, row, m, order, 0);
}

/* Whether a score is masked by itself: what modulate_row makes -inf of. */
INLINE int hides(real x, Modulator m, int order) {
    real score = m.score_scale * x;
    return score <= (order >= 1 ? MASK_FLOOR : -(real)INFINITY) ||
           (score < INFINITY && modulated(x, m, order) == -INFINITY);
}

/* exp(y - highest) in the place of y; returns the sum. */
INLINE double exponentiate_row(real *y, int64_t n, real highest) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) {
            y[j] = exponential(y[j] - highest);
            sum += y[j];
        }
        total += sum;
    }
    return total;
}

/* Of one vector, from dy to dx; s, u, scale and shift sum up what the coefficients' gradients need.
 */
typedef struct {
    vector s[4], u[4], scale, shift;
} VectorSums;

INLINE vector pull_back_vector(vector x, vector dy, Modulator m, int order, VectorSums *sums) {
    vector z = m.scale * x + m.shift, slope = (vector){0} + 1;
    if (order >= 1) {
        vector below = m.r0 - z, above = z - m.r1;
        vector dy_below = where(exceeds_zero(below), dy), dy_above = where(exceeds_zero(above), dy);
        if (sums) {
            sums->s[0] += dy_below * below;
            sums->s[1] += dy_above * above;
            sums->u[0] += dy_below;
            sums->u[1] += dy_above;
        }
        slope += where(above > 0, (vector){0} + m.t1) - where(below > 0, (vector){0} + m.t0);
    }
    if (order >= 2) {
        vector low = m.r2 - z, high = z - m.r3;
        low = where(exceeds_zero(low), low), high = where(exceeds_zero(high), high);
        if (sums) {
            vector dy_low = dy * low, dy_high = dy * high;
            sums->s[2] += dy_low * low;
            sums->s[3] += dy_high * high;
            sums->u[2] += dy_low;
            sums->u[3] += dy_high;
        }
        slope += 2 * m.t3 * high - 2 * m.t2 * low;
    }
    vector dz = dy * slope;
    if (sums) {
        sums->scale += dz * x;
        sums->shift += dz;
    }
    return dz * m.scale;
}

/* From dy to dx, in place, adding to the sums, unless they are NULL; no dy, no gradient. */
INLINE void pull_back_some(const real *x, real *d, int64_t n, Modulator m, int order,
                           VectorSums *sums) {
    VectorSums local = {0}, *v = NULL;
    if (sums) local = *sums, v = &local; /* in registers */
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        store(d + j, pull_back_vector(load(x + j), load(d + j), m, order, v));
    if (j < n) { /* the rest, padded by zeros, which add nothing */
        real rest_x[LANES], rest_d[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            rest_x[i] = j + i < n ? x[j + i] : 0;
            rest_d[i] = j + i < n ? d[j + i] : 0;
        }
        store(rest_d, pull_back_vector(load(rest_x), load(rest_d), m, order, v));
        memcpy(d + j, rest_d, (n - j) * sizeof(real));
    }
    if (sums) *sums = local;
}

/* A masked score may be anything, and must add nothing: 0 is in its place. */
SEPARATE void tame_masked(const real *x, const real *d, real *tamed, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) tamed[j] = d[j] != 0 ? x[j] : 0;
}

/* Of at most SEGMENT entries. Whether they are tame is asked once: of each vector, it doubles the
   time. */
INLINE void pull_back_block(const real *x, real *d, int64_t n, Modulator m, int order,
                            VectorSums *sums) {
    real tamed[SEGMENT];
    if (!m.tame || !is_tame(x, n)) {
        tame_masked(x, d, tamed, n);
        x = tamed;
    }
    if (sums)
        pull_back_some(x, d, n, m, order, sums);
    else
        pull_back_some(x, d, n, m, order, NULL);
}

/* The gradients of the coefficients from the sums over some thousand entries. */
INLINE void add_sums(const VectorSums *v, Modulator m, int order, double *sums) {
    double t[4] = {m.t0, -m.t1, 2 * (double)m.t2, -2 * (double)m.t3};
    sums[0] += sum_of(v->scale);
    sums[1] += sum_of(v->shift);
    for (int k = 0; k < 2 * order; k++) {
        sums[2 + k] += sum_of(v->s[k]);
        sums[2 + 2 * order + k] += t[k] * sum_of(v->u[k]);
    }
}

INLINE void pull_back(const real *x, real *d, int64_t n, Modulator m, int order, double *sums) {
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t length = start + SEGMENT < n ? SEGMENT : n - start;
        VectorSums of_segment = {0};
        pull_back_block(x + start, d + start, length, m, order, sums ? &of_segment : NULL);
        if (sums) add_sums(&of_segment, m, order, sums);
    }
}

INLINE void scale_row(real *p, int64_t n, real factor) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) p[j] *= factor;
}

#define BY_ORDER(order, call)                                                                      \
    switch (order) {                                                                               \
    case 0: {                                                                                      \
        enum { ORDER = 0 };                                                                        \
        call;                                                                                      \
    } break;                                                                                       \
    case 1: {                                                                                      \
        enum { ORDER = 1 };                                                                        \
        call;                                                                                      \
    } break;                                                                                       \
    default: {                                                                                     \
        enum { ORDER = 2 };                                                                        \
        call;                                                                                      \
    } break;                                                                                       \
    }

/* Sums of the chunks, in their order, whatever the number of threads. */
static inline void add_up(double *sums, Sums *partial, int64_t chunks, int order) {
    for (int64_t chunk = 0; partial && chunk < chunks; chunk++)
        for (int k = 0; k < 2 + 4 * order; k++) sums[k] += partial[chunk].values[k];
    free(partial);
}

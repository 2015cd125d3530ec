/* The modulator: from scores to y and, in the backward pass, from dL/dy to dL/dscore.

   y = sigma(z), z = scale x + shift,
   sigma(z) = z + t0 (r0 - z)+ + t1 (z - r1)+ + t2 (r2 - z)+^2 + t3 (z - r3)+^2

   Coefficients: [scale, shift] for order 0, [scale, shift, t0, t1, r0, r1] for 1,
   [scale, shift, t0..t3, r0..r3] for 2. */
#pragma once
#include "rows.h"

#define MOST_COEFFICIENTS 10

typedef struct { real scale, shift, t0, t1, t2, t3, r0, r1, r2, r3; } Modulator;
typedef struct { double values[MOST_COEFFICIENTS]; } Sums;

static Modulator modulator(const real *c, int order) {
    if (order == 0) return (Modulator){.scale = c[0], .shift = c[1]};
    if (order == 1)
        return (Modulator){.scale = c[0], .shift = c[1], .t0 = c[2], .t1 = c[3], .r0 = c[4], .r1 = c[5]};
    return (Modulator){c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9]};
}

INLINE real positive(real x) { return x < 0 ? 0 : x; } /* NaN stays NaN */

INLINE real modulated(real x, Modulator m, int order) {
    real z = m.scale * x + m.shift, y = z;
    if (order >= 1) y += m.t0 * positive(m.r0 - z) + m.t1 * positive(z - m.r1);
    if (order >= 2) {
        real low = positive(m.r2 - z), high = positive(z - m.r3);
        y += m.t2 * low * low + m.t3 * high * high;
    }
    return y;
}

/* y of a row, -inf where masked; returns the largest. */
INLINE real modulate_row(const real *x, real *y, Row row, Modulator m, int order) {
    real highest = -INFINITY;
    if (row.mask) {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = row.mask[j] ? modulated(x[j], m, order) : -(real)INFINITY;
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    } else {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < row.limit; j++) {
            real value = modulated(x[j], m, order);
            highest = value > highest ? value : highest;
            y[j] = value;
        }
    }
    return highest;
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

/* From dy to dx, in place, adding up the gradients of the coefficients; no dy, no gradient. */
INLINE void pull_back_segment(const real *x, real *d, int64_t n, Modulator m, int order, int masked,
                              double *sums) {
    real s0 = 0, s1 = 0, s2 = 0, s3 = 0, u0 = 0, u1 = 0, u2 = 0, u3 = 0, scale = 0, shift = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, u0, u1, u2, u3, scale, shift)
    for (int64_t j = 0; j < n; j++) {
        real dy = d[j], score = x[j];
        if (masked) score = dy == 0 ? 0 : score; /* a masked score may be anything */
        real z = m.scale * score + m.shift, slope = 1;
        if (order >= 1) {
            real below = m.r0 - z, above = z - m.r1;
            real dy_below = below > 0 ? dy : 0, dy_above = above > 0 ? dy : 0;
            if (sums) {
                s0 += dy_below * below;
                s1 += dy_above * above;
                u0 += dy_below;
                u1 += dy_above;
            }
            slope += (above > 0 ? m.t1 : 0) - (below > 0 ? m.t0 : 0);
        }
        if (order >= 2) {
            real low = positive(m.r2 - z), high = positive(z - m.r3);
            if (sums) {
                real dy_low = dy * low, dy_high = dy * high;
                s2 += dy_low * low;
                s3 += dy_high * high;
                u2 += dy_low;
                u3 += dy_high;
            }
            slope += 2 * (m.t3 * high - m.t2 * low);
        }
        real dz = dy * slope;
        if (sums) {
            scale += dz * score;
            shift += dz;
        }
        d[j] = dz * m.scale;
    }
    if (!sums) return;
    sums[0] += scale;
    sums[1] += shift;
    if (order == 1) {
        sums[2] += s0, sums[3] += s1;
        sums[4] += (double)m.t0 * u0, sums[5] -= (double)m.t1 * u1;
    }
    if (order == 2) {
        sums[2] += s0, sums[3] += s1, sums[4] += s2, sums[5] += s3;
        sums[6] += (double)m.t0 * u0, sums[7] -= (double)m.t1 * u1;
        sums[8] += 2 * (double)m.t2 * u2, sums[9] -= 2 * (double)m.t3 * u3;
    }
}

INLINE void pull_back(const real *x, real *d, int64_t n, Modulator m, int order, int masked,
                      double *sums) {
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t length = start + SEGMENT < n ? SEGMENT : n - start;
        if (sums && masked) pull_back_segment(x + start, d + start, length, m, order, 1, sums);
        else if (sums) pull_back_segment(x + start, d + start, length, m, order, 0, sums);
        else if (masked) pull_back_segment(x + start, d + start, length, m, order, 1, NULL);
        else pull_back_segment(x + start, d + start, length, m, order, 0, NULL);
    }
}

INLINE void scale_row(real *p, int64_t n, real factor) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) p[j] *= factor;
}

#define BY_ORDER(order, call)                                                                      \
    switch (order) {                                                                               \
    case 0: { enum { ORDER = 0 }; call; } break;                                                   \
    case 1: { enum { ORDER = 1 }; call; } break;                                                   \
    default: { enum { ORDER = 2 }; call; } break;                                                  \
    }

/* Sums of the chunks, in their order, whatever the number of threads. */
static inline void add_up(double *sums, Sums *partial, int64_t chunks, int order) {
    for (int64_t chunk = 0; partial && chunk < chunks; chunk++)
        for (int k = 0; k < 2 + 4 * order; k++) sums[k] += partial[chunk].values[k];
    free(partial);
}

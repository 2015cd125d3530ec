/* What the kernels share: the number type, its exponential, and which entries of a row count.
   Compiled once for float and once for double (-DDOUBLE). */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t integer;
#define EXPONENT_BITS 52
#define EXPONENT_BIAS 1023
#define LOWEST_EXPONENT -708.0
#define SQUARE_ROOT sqrt
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer */
#else
typedef float real;
typedef int32_t integer;
#define EXPONENT_BITS 23
#define EXPONENT_BIAS 127
#define LOWEST_EXPONENT -87.0f
#define SQUARE_ROOT sqrtf
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */
#endif

#define INLINE static inline __attribute__((always_inline))
#define RARE static __attribute__((noinline, cold, unused)) /* out of the way of the rest */
#define SEPARATE static __attribute__((noinline, unused))
#define SEGMENT 4096 /* entries that are summed in `real`; the sums of segments in double */
#define CHUNK 16384  /* entries of the rows that are one unit of work: they stay in the L2 cache */

/* The widest vectors of the processor. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(real)))

typedef real vector __attribute__((vector_size(VECTOR_BYTES)));
typedef integer mask_vector __attribute__((vector_size(VECTOR_BYTES))); /* of a comparison */

INLINE vector load(const real *from) {
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(real *to, vector v) { memcpy(to, &v, sizeof v); }

INLINE vector where(mask_vector condition, vector v) {
    return (vector)(condition & (mask_vector)v);
}

INLINE mask_vector exceeds_zero(vector v) { return ~(v <= 0); } /* or is NaN */

INLINE real sum_of(vector v) {
    real sum = 0;
    for (int64_t lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

/* What c_library.py compares of a structure with its own: size, and offset of the last field. */
#define LAYOUT(structure, last)                                                                    \
    void layout_of_##structure(int64_t *layout) {                                                  \
        layout[0] = sizeof(structure);                                                             \
        layout[1] = offsetof(structure, last);                                                     \
    }

/* Rows of scores: outer x heads x queries of them, each with `columns` entries. */
typedef struct {
    int64_t outer, heads, queries, columns;
    const uint8_t *mask;                       /* 1: may receive mass; NULL: all may */
    int64_t mask_outer, mask_head, mask_query; /* strides of the mask */
    int64_t threads;
} Rows;

/* What matters about a row when it is worked on. */
typedef struct {
    int64_t limit;           /* entries from here on are masked by causality */
    const uint8_t *mask;     /* of this row, or NULL */
    const real *bias;        /* of this row, or NULL */
    int bias_before;         /* it is in the scores; else it is added to y */
    uint32_t key, threshold; /* of its dropout */
    real factor;             /* of the entries that dropout keeps; 0: no dropout */
    int stepped, capped;     /* it has steps around the modulator, and some of them after it */
    real before, after, cap; /* its factors there, 1 if there are none; its cap, 0 if none */
} Row;

INLINE int64_t row_count(const Rows *rows) { return rows->outer * rows->heads * rows->queries; }

INLINE int64_t rows_in_chunk(const Rows *rows) {
    return rows->columns >= CHUNK ? 1 : CHUNK / (rows->columns + 1) + 1;
}

INLINE Row row_at(const Rows *rows, int64_t index) {
    int64_t query = index % rows->queries, rest = index / rows->queries;
    int64_t head = rest % rows->heads, outer = rest / rows->heads;
    const uint8_t *mask = rows->mask;
    if (mask) mask += outer * rows->mask_outer + head * rows->mask_head + query * rows->mask_query;
    return (Row){.limit = rows->columns, .mask = mask};
}

/* `from` where the mask allows, exactly 0 elsewhere, also next to NaN; they may be the same. */
INLINE void mask_row(Row row, const real *from, real *to) {
#pragma omp simd
    for (int64_t j = 0; j < row.limit; j++) to[j] = row.mask[j] ? from[j] : 0;
}

INLINE uint64_t scramble(uint64_t x) { /* the finalizer of SplitMix64 */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* The factor of an entry under dropout: a hash of the row's key and the column decides. */
INLINE real kept(Row row, int64_t column) {
    uint32_t x = row.key ^ ((uint32_t)column * 0x9E3779B1u);
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    x ^= x >> 16;
    return x >= row.threshold ? row.factor : 0;
}

/* exp(x) = 2^n (1 + r polynomial) for x <= 0, by x = n ln 2 + r with |r| <= ln 2 / 2. Of x below
   LOWEST_EXPONENT it is that of LOWEST_EXPONENT. */
typedef struct {
    real r, polynomial, two_to_n;
} Exponent;

INLINE Exponent exponent_of(real x) {
    real bounded = x < LOWEST_EXPONENT ? LOWEST_EXPONENT : x;
    real shifted = bounded * (real)1.4426950408889634 + ROUNDER;
    real n = shifted - ROUNDER;
#ifdef DOUBLE
    real r = (bounded - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    real power = 1.6059043836821613e-10; /* Taylor, degree 13 */
    power = power * r + 2.08767569878681e-09;
    power = power * r + 2.505210838544172e-08;
    power = power * r + 2.755731922398589e-07;
    power = power * r + 2.7557319223985893e-06;
    power = power * r + 2.48015873015873e-05;
    power = power * r + 0.0001984126984126984;
    power = power * r + 0.001388888888888889;
    power = power * r + 0.008333333333333333;
    power = power * r + 0.041666666666666664;
    power = power * r + 0.16666666666666666;
    power = power * r + 0.5;
#else
    real r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    real power = 0.0013836832f; /* minimax, relative error 2e-9 */
    power = power * r + 0.008374824f;
    power = power * r + 0.041668226f;
    power = power * r + 0.1666642f;
    power = power * r + 0.49999992f;
#endif
    power = power * r + 1;
    integer bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (integer)((uint64_t)(bits + EXPONENT_BIAS) << EXPONENT_BITS); /* low bits hold n */
    Exponent e = {.r = r, .polynomial = power};
    memcpy(&e.two_to_n, &bits, sizeof bits);
    return e;
}

/* exp(x) for x <= 0 to about 1 unit in the last place; 0 below LOWEST_EXPONENT, NaN for NaN. */
INLINE real exponential(real x) {
    Exponent e = exponent_of(x);
    return x < LOWEST_EXPONENT ? 0 : (e.polynomial * e.r + 1) * e.two_to_n;
}

/* tanh(x) to about 2 units in the last place, also of small x: from exp(-2 |x|) - 1. */
INLINE real hyperbolic_tangent(real x) {
    Exponent e = exponent_of(x < 0 ? 2 * x : -2 * x);
    real less = e.polynomial * e.r * e.two_to_n + (e.two_to_n - 1);
    real tangent = less / (2 + less);
    return x < 0 ? tangent : -tangent;
}

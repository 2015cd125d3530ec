/* Attention, out = dropout(SoftMax(sigma(query key^T) + bias)) value, forward and backward; the
   bias may also be inside of sigma, and there may be steps.h around sigma. No matrix of queries x
   keys is ever held: a tile of some queries is worked off in the cache, and the backward pass
   computes it again from two numbers per row, its highest y and 1 / sum.

   This is what both passes share. `general` is known when it is compiled: the code of bias and
   steps would slow down that without them by 2 %.

   Source: Dao, FlashAttention-2, 2023, for the recomputation and delta = sum(out d_out). */
#pragma once
#include "gemm.h"
#include "steps.h"

#define TILE_ENTRIES                                                                               \
    65536               /* of the scores of a tile, which share the L2 cache with keys and values */
#define MOST_QUERIES 64 /* of a tile */
#define LEAST_SHARES 16 /* of the backward pass, whatever the number of threads */

typedef struct {
    int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
    const real *query, *key, *value, *out, *d_out; /* out is written by the forward pass */
    int64_t query_strides[3], key_strides[3], value_strides[3]; /* batch, head, row */
    int64_t out_strides[3], d_out_strides[3];
    real *statistics;                /* (batch, heads, queries, 2) */
    real *d_query, *d_key, *d_value; /* contiguous */
    const uint8_t *mask;             /* 1: may be attended; NULL: all may */
    int64_t mask_strides[3];         /* batch, head, query */
    int64_t causal;                  /* query i sees keys up to i + keys - queries */
    uint64_t seed;
    double dropout, score_scale; /* the latter makes scores of the products query key^T */
    int64_t threads, order;
    const real *coefficients;
    double *sums;              /* gradients of the coefficients, or NULL */
    const real *bias;          /* or NULL */
    int64_t bias_strides[4];   /* batch, head, query, key */
    int64_t bias_before;       /* it is added to the scores, before they are modulated */
    real *d_bias;              /* or NULL */
    int64_t d_bias_strides[4]; /* 0 where the bias is broadcast; of the keys 0 or 1 */
    const real *factor;        /* of each row, or NULL; score_scale is 1 if there is a step */
    int64_t factor_strides[3]; /* batch, head, query */
    int64_t factor_first;      /* it multiplies the scores, not what is modulated and capped */
    double softcap;            /* 0: none */
    double *d_rows, *d_factor; /* gradients of each row's factor (batch, heads, queries), and their
                                  sums; or NULL */
    int64_t d_factor_strides[3];
    const real *d_logsumexp; /* (batch, heads, queries), or NULL */
} Attention;

/* What a thread works with. Widths are padded to whole tiles of the matrix product. */
typedef struct {
    int64_t tile, width, dim, value_dim;
    int64_t packed;                      /* the (batch, key head) whose keys are here, or -1 */
    real *key, *key_T, *value, *value_T; /* (keys, dim), (dim, width); of the values likewise */
    real *query, *d_out, *result;        /* (tile, dim) */
    real *scores, *p, *d;                /* (tile, width) */
    real *d_key, *d_value;               /* (keys, dim) */
    real *capped;                        /* what is capped of a row, for its steps */
    real *bias;                          /* of a row, if its entries are not side by side */
    real *d_bias; /* (heads of a key head, width), of all queries, if they have the same bias */
    real *memory;
} Space;

INLINE int64_t padded(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

INLINE int64_t tile_rows(const Attention *a) {
    int64_t rows = TILE_ENTRIES / (padded(a->keys) + 1) / 8 * 8;
    return rows < 8 ? 8 : rows > MOST_QUERIES ? MOST_QUERIES : rows;
}

INLINE int has_steps(const Attention *a) { return a->factor || a->softcap > 0; }

/* Whether the gradient of the bias is a sum over queries. */
INLINE int sums_queries(const Attention *a) { return a->d_bias && !a->d_bias_strides[2]; }

static int reserve(Space *s, const Attention *a, int backward) {
    *s = (Space){tile_rows(a), padded(a->keys), padded(a->dim), padded(a->value_dim), .packed = -1};
    int64_t widest = s->dim > s->value_dim ? s->dim : s->value_dim;
    struct {
        real **part;
        int64_t size;
        int both;
    } parts[] = {
        {&s->key_T, a->dim * s->width, 1},
        {&s->value, a->keys * s->value_dim, !backward},
        {&s->key, a->keys * s->dim, 0},
        {&s->value_T, a->value_dim * s->width, 0},
        {&s->query, s->tile * s->dim, 1},
        {&s->d_out, s->tile * s->value_dim, 0},
        {&s->result, s->tile * widest, 1},
        {&s->scores, s->tile * s->width, 1},
        {&s->p, s->tile * s->width, 0},
        {&s->d, s->tile * s->width, 0},
        {&s->d_key, a->keys * s->dim, 0},
        {&s->d_value, a->keys * s->value_dim, 0},
        {&s->capped, has_steps(a) ? s->width : 0, 1},
        {&s->bias, a->bias ? s->width : 0, 1},
        {&s->d_bias, sums_queries(a) ? a->heads / a->key_heads * s->width : 0, 0},
    };
    int64_t total = 0, count = sizeof parts / sizeof *parts;
    for (int64_t i = 0; i < count; i++)
        if (parts[i].both || (backward && parts[i].part != &s->value))
            total += parts[i].size + LANES;
    real *next = s->memory = malloc((total + LANES) * sizeof(real));
    if (!next) return 1;
    for (int64_t i = 0; i < count; i++)
        if (parts[i].both || (backward && parts[i].part != &s->value)) {
            *parts[i].part = next;
            next += parts[i].size + LANES;
        }
    return 0;
}

INLINE const real *at(const real *tensor, const int64_t *strides, int64_t b, int64_t h,
                      int64_t row) {
    return tensor + b * strides[0] + h * strides[1] + row * strides[2];
}

/* Keys and values of a head, in the forms that the matrix products read. */
static void pack(Space *s, const Attention *a, int64_t b, int64_t h, int backward) {
    if (s->packed == b * a->key_heads + h) return;
    s->packed = b * a->key_heads + h;
    const real *key = at(a->key, a->key_strides, b, h, 0),
               *value = at(a->value, a->value_strides, b, h, 0);
    copy_transposed(key, a->key_strides[2], s->key_T, s->width, a->keys, a->dim);
    if (backward) {
        copy_padded(key, a->key_strides[2], s->key, s->dim, a->keys, a->dim);
        copy_transposed(value, a->value_strides[2], s->value_T, s->width, a->keys, a->value_dim);
    } else {
        copy_padded(value, a->value_strides[2], s->value, s->value_dim, a->keys, a->value_dim);
    }
}

/* How many keys a query sees under causality. */
INLINE int64_t limit_of(const Attention *a, int64_t q) {
    int64_t limit = a->causal ? q + 1 + a->keys - a->queries : a->keys;
    return limit < 0 ? 0 : limit > a->keys ? a->keys : limit;
}

/* The bias of a row with its entries side by side. */
INLINE const real *bias_of(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                           int64_t limit) {
    const real *bias = at(a->bias, a->bias_strides, b, h, q);
    int64_t step = a->bias_strides[3];
    if (step == 1) return bias;
    for (int64_t j = 0; j < limit; j++) s->bias[j] = bias[j * step];
    return s->bias;
}

/* The factor of a row, 1 if there is none. */
INLINE real factor_of(const Attention *a, int64_t b, int64_t h, int64_t q) {
    return a->factor ? *at(a->factor, a->factor_strides, b, h, q) : 1;
}

INLINE Row row_of(Space *s, const Attention *a, int general, int64_t b, int64_t h, int64_t q) {
    Row row = {.limit = limit_of(a, q)};
    if (general && a->bias) {
        row.bias = bias_of(s, a, b, h, q, row.limit);
        row.bias_before = (int)a->bias_before;
    }
    if (general && has_steps(a)) {
        real factor = factor_of(a, b, h, q);
        row.stepped = 1, row.capped = a->softcap > 0 || (a->factor && !a->factor_first);
        row.before = a->factor_first ? factor : 1, row.after = a->factor_first ? 1 : factor;
        row.cap = (real)a->softcap;
    }
    if (a->mask)
        row.mask =
            a->mask + b * a->mask_strides[0] + h * a->mask_strides[1] + q * a->mask_strides[2];
    if (a->dropout > 0) {
        uint64_t number = (b * a->heads + h) * a->queries + q;
        row.key = (uint32_t)scramble(a->seed + number * 0x9E3779B97F4A7C15u);
        row.threshold = (uint32_t)(a->dropout * 4294967296.0);
        row.factor = (real)(1 / (1 - a->dropout));
    }
    return row;
}

/* Scores of some queries, as they are modulated: with a bias and a factor that come before. Up to
   the last key that one of them sees, whose number is returned. */
INLINE int64_t scores_of(Space *s, const Attention *a, int general, int64_t b, int64_t h, int64_t q,
                         int64_t rows) {
    int64_t seen = limit_of(a, q + rows - 1);
    const real *query = at(a->query, a->query_strides, b, h, q);
    multiply(rows, padded(seen), a->dim, query, a->query_strides[2], 1, s->key_T, s->width,
             s->scores, s->width, 0);
    for (int64_t i = 0; general && i < rows; i++) {
        Row row = row_of(s, a, general, b, h, q + i);
        if (row.bias_before) add_bias_row(row, s->scores + i * s->width);
        if (row.stepped) prepare_row(row, s->scores + i * s->width);
    }
    return seen;
}

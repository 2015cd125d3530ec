/* Attention, out = dropout(SoftMax(sigma(query key^T) + bias)) value, forward and backward; the bias
   may also be inside of sigma. No matrix of queries x keys is ever held: a tile of some queries is
   worked off in the cache, and the backward pass computes it again from two numbers per row, its
   highest y and 1 / sum.

   Source: Dao, FlashAttention-2, 2023, for the recomputation and delta = sum(out d_out). */
#include "gemm.h"
#include "softmax_row.h"

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
    double dropout;
    int64_t threads, order;
    const real *coefficients;
    double *sums;             /* gradients of the coefficients, or NULL */
    const real *bias;         /* or NULL */
    int64_t bias_strides[4];  /* batch, head, query, key */
    int64_t bias_before;      /* it is added to the scores, before they are modulated */
    real *d_bias;             /* or NULL */
    int64_t d_bias_strides[4]; /* 0 where the bias is broadcast; of the keys 0 or 1 */
} Attention;

LAYOUT(Attention, d_bias_strides)

/* What a thread works with. Widths are padded to whole tiles of the matrix product. */
typedef struct {
    int64_t tile, width, dim, value_dim;
    int64_t packed;                      /* the (batch, key head) whose keys are here, or -1 */
    real *key, *key_T, *value, *value_T; /* (keys, dim), (dim, width); of the values likewise */
    real *query, *d_out, *result;        /* (tile, dim) */
    real *scores, *p, *d;                /* (tile, width) */
    real *d_key, *d_value;               /* (keys, dim) */
    real *bias;                          /* of a row, if its entries are not side by side */
    real *d_bias; /* (heads of a key head, width), of all queries, if they have the same bias */
    real *memory;
} Space;

INLINE int64_t padded(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

INLINE int64_t tile_rows(const Attention *a) {
    int64_t rows = TILE_ENTRIES / (padded(a->keys) + 1) / 8 * 8;
    return rows < 8 ? 8 : rows > MOST_QUERIES ? MOST_QUERIES : rows;
}

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
        {&s->key_T, a->dim * s->width, 1}, {&s->value, a->keys * s->value_dim, !backward},
        {&s->key, a->keys * s->dim, 0},    {&s->value_T, a->value_dim * s->width, 0},
        {&s->query, s->tile * s->dim, 1},  {&s->d_out, s->tile * s->value_dim, 0},
        {&s->result, s->tile * widest, 1}, {&s->scores, s->tile * s->width, 1},
        {&s->p, s->tile * s->width, 0},    {&s->d, s->tile * s->width, 0},
        {&s->d_key, a->keys * s->dim, 0},  {&s->d_value, a->keys * s->value_dim, 0},
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

INLINE Row row_of(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q) {
    Row row = {.limit = limit_of(a, q), .bias_before = (int)a->bias_before};
    if (a->bias) row.bias = bias_of(s, a, b, h, q, row.limit);
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

/* Scores of some queries, with a bias that is added before they are modulated, up to the last key
   that one of them sees, whose number is returned. */
INLINE int64_t scores_of(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                         int64_t rows) {
    int64_t seen = limit_of(a, q + rows - 1);
    const real *query = at(a->query, a->query_strides, b, h, q);
    multiply(rows, padded(seen), a->dim, query, a->query_strides[2], 1, s->key_T, s->width,
             s->scores, s->width, 0);
    for (int64_t i = 0; a->bias && a->bias_before && i < rows; i++)
        add_bias_row(row_of(s, a, b, h, q + i), s->scores + i * s->width);
    return seen;
}

static void forward_tile(Space *s, const Attention *a, Modulator m, int64_t b, int64_t h, int64_t q,
                         int64_t rows) {
    int64_t seen = scores_of(s, a, b, h, q, rows), first = (b * a->heads + h) * a->queries + q;
    for (int64_t i = 0; i < rows; i++) {
        real *p = s->scores + i * s->width;
        Row row = row_of(s, a, b, h, q + i);
        BY_ORDER(a->order, forward_row(row, m, ORDER, p, p, a->statistics + 2 * (first + i)))
        drop_row(row, p);
        memset(p + row.limit, 0, (seen - row.limit) * sizeof(real));
    }
    multiply(rows, s->value_dim, seen, s->scores, s->width, 1, s->value, s->value_dim, s->result,
             s->value_dim, 0);
    for (int64_t i = 0; i < rows; i++)
        memcpy((real *)at(a->out, a->out_strides, b, h, q + i), s->result + i * s->value_dim,
               a->value_dim * sizeof(real));
}

/* Adds a row of gradients to that of a bias, which may be the same for all keys. */
INLINE void add_row(const real *d, int64_t n, real *to, int64_t step) {
    real sum = 0;
    if (step) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) to[j] += d[j];
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += d[j];
        to[0] += sum;
    }
}

/* Adds the gradients of the scores of some queries, or of their y, to those of the bias. */
static void add_to_d_bias(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                          int64_t rows, int64_t seen) {
    for (int64_t i = 0; i < rows; i++) {
        const real *d = s->d + i * s->width;
        if (sums_queries(a))
            add_row(d, seen, s->d_bias + h % (a->heads / a->key_heads) * s->width, 1);
        else
            add_row(d, seen, (real *)at(a->d_bias, a->d_bias_strides, b, h, q + i),
                    a->d_bias_strides[3]);
    }
}

/* Adds to d_key, d_value and d_bias of the space and writes d_query. */
INLINE void backward_tile(Space *s, const Attention *a, Modulator m, int order, int64_t b,
                          int64_t h, int64_t q, int64_t rows, double *sums) {
    int64_t seen = scores_of(s, a, b, h, q, rows), first = (b * a->heads + h) * a->queries + q;
    const real *query = at(a->query, a->query_strides, b, h, q);
    const real *d_out = at(a->d_out, a->d_out_strides, b, h, q);
    copy_padded(query, a->query_strides[2], s->query, s->dim, rows, a->dim);
    copy_padded(d_out, a->d_out_strides[2], s->d_out, s->value_dim, rows, a->value_dim);
    multiply(rows, padded(seen), a->value_dim, s->d_out, s->value_dim, 1, s->value_T, s->width,
             s->d, s->width, 0);
    for (int64_t i = 0; i < rows; i++) {
        real *p = s->p + i * s->width, *d = s->d + i * s->width;
        Row row = row_of(s, a, b, h, q + i);
        recompute_row(row, m, order, s->scores + i * s->width, a->statistics + 2 * (first + i), p);
        const real *out = at(a->out, a->out_strides, b, h, q + i);
        real delta = (real)dot(s->d_out + i * s->value_dim, out, a->value_dim);
        subtract_mean_row(row, p, d, delta, d);
        drop_row(row, p);
        if (!isfinite(delta)) {
            hide_row(row, p);
            hide_row(row, d);
        }
        memset(p + row.limit, 0, (seen - row.limit) * sizeof(real));
        memset(d + row.limit, 0, (s->width - row.limit) * sizeof(real));
    }
    if (a->d_bias && !a->bias_before) add_to_d_bias(s, a, b, h, q, rows, seen);
    pull_back(s->scores, s->d, rows * s->width, m, order, sums);
    if (a->d_bias && a->bias_before) add_to_d_bias(s, a, b, h, q, rows, seen);
    multiply(seen, s->value_dim, rows, s->p, 1, s->width, s->d_out, s->value_dim, s->d_value,
             s->value_dim, 1);
    multiply(seen, s->dim, rows, s->d, 1, s->width, s->query, s->dim, s->d_key, s->dim, 1);
    multiply(rows, s->dim, seen, s->d, s->width, 1, s->key, s->dim, s->result, s->dim, 0);
    for (int64_t i = 0; i < rows; i++)
        memcpy(a->d_query + (first + i) * a->dim, s->result + i * s->dim, a->dim * sizeof(real));
}

int attention_forward(const Attention *a) {
    Modulator m = modulator(a->coefficients, (int)a->order);
    int64_t tile = tile_rows(a), tiles = (a->queries + tile - 1) / tile;
    int failed = 0;
#pragma omp parallel num_threads(a->threads)
    {
        Space space;
        if (reserve(&space, a, 0)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t index = 0; index < a->batch * a->heads * tiles; index++) {
            if (failed) continue;
            int64_t q = index % tiles * tile, h = index / tiles % a->heads,
                    b = index / tiles / a->heads;
            int64_t rows = a->queries - q < tile ? a->queries - q : tile;
            pack(&space, a, b, h / (a->heads / a->key_heads), 0);
            forward_tile(&space, a, m, b, h, q, rows);
        }
        free(space.memory);
    }
    return failed;
}

/* All queries of a share of the tiles, in every head that uses this key head. */
static void backward_share(Space *s, const Attention *a, Modulator m, int64_t b, int64_t key_head,
                           int64_t start, int64_t end, double *sums) {
    int64_t group = a->heads / a->key_heads;
    pack(s, a, b, key_head, 1);
    memset(s->d_key, 0, a->keys * s->dim * sizeof(real));
    memset(s->d_value, 0, a->keys * s->value_dim * sizeof(real));
    if (sums_queries(a)) memset(s->d_bias, 0, group * s->width * sizeof(real));
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
        for (int64_t q = start; q < end; q += s->tile) {
            int64_t rows = end - q < s->tile ? end - q : s->tile;
            BY_ORDER(a->order, backward_tile(s, a, m, ORDER, b, h, q, rows, sums))
        }
}

static void add_rows(const real *from, int64_t stride, real *to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[i * columns + j] += from[i * stride + j];
}

/* Adds what a share found to the gradients, in the order of the shares. */
static void add_share(Space *s, const Attention *a, int64_t b, int64_t key_head) {
    int64_t head = b * a->key_heads + key_head, group = a->heads / a->key_heads;
    add_rows(s->d_key, s->dim, a->d_key + head * a->keys * a->dim, a->keys, a->dim);
    add_rows(s->d_value, s->value_dim, a->d_value + head * a->keys * a->value_dim, a->keys,
             a->value_dim);
    for (int64_t i = 0; sums_queries(a) && i < group; i++)
        add_row(s->d_bias + i * s->width, a->keys,
                (real *)at(a->d_bias, a->d_bias_strides, b, key_head * group + i, 0),
                a->d_bias_strides[3]);
}

/* d_key, d_value and d_bias must be zero. Few heads are split into shares of their queries, which
   are added up in a fixed order. So are heads that have the same rows of the bias: they take turns.
 */
int attention_backward(const Attention *a) {
    Modulator m = modulator(a->coefficients, (int)a->order);
    int by_query = a->d_bias && !sums_queries(a);
    int64_t batch_turns = by_query && !a->d_bias_strides[0] ? a->batch : 1;
    int64_t head_turns = by_query && !a->d_bias_strides[1] ? a->key_heads : 1;
    int64_t turns = batch_turns * head_turns, key_heads = a->key_heads / head_turns;
    int64_t heads = a->batch / batch_turns * key_heads, tile = tile_rows(a); /* of a turn */
    int64_t tiles = (a->queries + tile - 1) / tile,
            shares = (LEAST_SHARES + heads - 1) / (heads + !heads);
    shares = shares > tiles ? tiles : shares;
    int64_t share = shares ? (tiles + shares - 1) / shares * tile : 0, total = heads * shares;
    Sums *partial = a->sums ? calloc(turns * total + 1, sizeof(Sums)) : NULL;
    int failed = a->sums && !partial;
#pragma omp parallel num_threads(a->threads)
    {
        Space space;
        if (reserve(&space, a, 1)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        for (int64_t turn = 0; turn < turns; turn++) {
#pragma omp for schedule(static, 1) ordered
            for (int64_t index = 0; index < total; index++) {
                int64_t b = turn / head_turns + index % heads / key_heads;
                int64_t key_head = turn % head_turns + index % key_heads;
                int64_t start = index / heads * share;
                int64_t end = start + share < a->queries ? start + share : a->queries;
                double *sums = partial ? partial[turn * total + index].values : NULL;
                if (!failed) backward_share(&space, a, m, b, key_head, start, end, sums);
#pragma omp ordered
                if (!failed) add_share(&space, a, b, key_head);
            }
        }
        free(space.memory);
    }
    add_up(a->sums, partial, failed ? 0 : turns * total, (int)a->order);
    return failed;
}

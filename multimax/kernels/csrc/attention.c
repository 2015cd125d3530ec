/* Attention, out = dropout(SoftMax(sigma(query key^T))) value, forward and backward. No matrix of
   queries x keys is ever held: a tile of some queries is worked off in the cache, and the backward
   pass computes it again from two numbers per row, its highest y and 1 / sum.

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
    double *sums; /* gradients of the coefficients, or NULL */
} Attention;

LAYOUT(Attention, sums)

/* What a thread works with. Widths are padded to whole tiles of the matrix product. */
typedef struct {
    int64_t tile, width, dim, value_dim;
    int64_t packed;                      /* the (batch, key head) whose keys are here, or -1 */
    real *key, *key_T, *value, *value_T; /* (keys, dim), (dim, width); of the values likewise */
    real *query, *d_out, *result;        /* (tile, dim) */
    real *scores, *p, *d;                /* (tile, width) */
    real *d_key, *d_value;               /* (keys, dim) */
    real *memory;
} Space;

INLINE int64_t padded(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

INLINE int64_t tile_rows(const Attention *a) {
    int64_t rows = TILE_ENTRIES / (padded(a->keys) + 1) / 8 * 8;
    return rows < 8 ? 8 : rows > MOST_QUERIES ? MOST_QUERIES : rows;
}

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

INLINE Row row_of(const Attention *a, int64_t b, int64_t h, int64_t q) {
    Row row = {.limit = a->keys};
    if (a->causal) {
        int64_t limit = q + 1 + a->keys - a->queries;
        row.limit = limit < 0 ? 0 : limit > a->keys ? a->keys : limit;
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

/* Scores of some queries, up to the last key that one of them sees, whose number is returned. */
INLINE int64_t scores_of(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                         int64_t rows) {
    int64_t seen = row_of(a, b, h, q + rows - 1).limit;
    const real *query = at(a->query, a->query_strides, b, h, q);
    multiply(rows, padded(seen), a->dim, query, a->query_strides[2], 1, s->key_T, s->width,
             s->scores, s->width, 0);
    return seen;
}

static void forward_tile(Space *s, const Attention *a, Modulator m, int64_t b, int64_t h, int64_t q,
                         int64_t rows) {
    int64_t seen = scores_of(s, a, b, h, q, rows), first = (b * a->heads + h) * a->queries + q;
    for (int64_t i = 0; i < rows; i++) {
        real *p = s->scores + i * s->width;
        Row row = row_of(a, b, h, q + i);
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

/* Adds to d_key and d_value of the space and writes d_query. */
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
        Row row = row_of(a, b, h, q + i);
        recompute_row(row, m, order, s->scores + i * s->width, a->statistics + 2 * (first + i), p);
        const real *out = at(a->out, a->out_strides, b, h, q + i);
        real delta = (real)dot(s->d_out + i * s->value_dim, out, a->value_dim);
        subtract_mean_row(row, p, d, delta, d);
        drop_row(row, p);
        if (row.mask && !isfinite(delta)) {
            mask_row(row, p, p);
            mask_row(row, d, d);
        }
        memset(p + row.limit, 0, (seen - row.limit) * sizeof(real));
        memset(d + row.limit, 0, (s->width - row.limit) * sizeof(real));
    }
    pull_back(s->scores, s->d, rows * s->width, m, order, sums);
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

/* d_key and d_value must be zero. Few heads are split into shares of their queries, which are added
   up in a fixed order. */
int attention_backward(const Attention *a) {
    Modulator m = modulator(a->coefficients, (int)a->order);
    int64_t heads = a->batch * a->key_heads, tile = tile_rows(a);
    int64_t tiles = (a->queries + tile - 1) / tile,
            shares = (LEAST_SHARES + heads - 1) / (heads + !heads);
    shares = shares > tiles ? tiles : shares;
    int64_t share = shares ? (tiles + shares - 1) / shares * tile : 0, total = heads * shares;
    Sums *partial = a->sums ? calloc(total + 1, sizeof(Sums)) : NULL;
    int failed = a->sums && !partial;
#pragma omp parallel num_threads(a->threads)
    {
        Space space;
        if (reserve(&space, a, 1)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static, 1) ordered
        for (int64_t index = 0; index < total; index++) {
            int64_t head = index % heads, b = head / a->key_heads, start = index / heads * share;
            int64_t end = start + share < a->queries ? start + share : a->queries;
            double *sums = partial ? partial[index].values : NULL;
            if (!failed) backward_share(&space, a, m, b, head % a->key_heads, start, end, sums);
#pragma omp ordered
            if (!failed) {
                add_rows(space.d_key, space.dim, a->d_key + head * a->keys * a->dim, a->keys,
                         a->dim);
                add_rows(space.d_value, space.value_dim, a->d_value + head * a->keys * a->value_dim,
                         a->keys, a->value_dim);
            }
        }
        free(space.memory);
    }
    add_up(a->sums, partial, failed ? 0 : total, (int)a->order);
    return failed;
}

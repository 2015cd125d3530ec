/* Attention, forward and backward: see attention.h. */
#include "attention.h"

LAYOUT(Attention, d_logsumexp)

INLINE void forward_tile(Space *s, const Attention *a, Modulator m, int general, int64_t b,
                         int64_t h, int64_t q, int64_t rows) {
    int64_t seen = scores_of(s, a, general, b, h, q, rows),
            first = (b * a->heads + h) * a->queries + q;
    for (int64_t i = 0; i < rows; i++) {
        real *p = s->scores + i * s->width;
        Row row = row_of(s, a, general, b, h, q + i);
        real *statistics = a->statistics + 2 * (first + i);
        if (general) {
            real highest = logits_row(p, p, s->capped, row, m, a->order);
            normalize_row(row, m, a->order, highest, p, p, statistics);
        } else {
            BY_ORDER(a->order, forward_row(row, m, ORDER, p, p, statistics))
        }
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

/* Adds the gradients of the scores of a query, or of their logits, to those of the bias. */
static void add_to_d_bias(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                          const real *d, int64_t seen) {
    if (sums_queries(a))
        add_row(d, seen, s->d_bias + h % (a->heads / a->key_heads) * s->width, 1);
    else
        add_row(d, seen, (real *)at(a->d_bias, a->d_bias_strides, b, h, q), a->d_bias_strides[3]);
}

/* p of a row again, from its y and statistics. */
INLINE void recompute_row(Row row, const real *statistics, real *p) {
#pragma omp simd
    for (int64_t j = 0; j < row.limit; j++)
        p[j] = exponential(p[j] - statistics[0]) * statistics[1];
}

/* From the gradients of y to those of the scores. */
static void pull_back_tile(Space *s, const Attention *a, Modulator m, int64_t rows, double *sums){
    BY_ORDER(a -> order, pull_back(s->scores, s->d, rows * s->width, m, ORDER, sums))}

/* The same of what comes before the modulator: the factor, and then the bias. */
static void pull_back_before(Space *s, const Attention *a, int64_t b, int64_t h, int64_t q,
                             int64_t rows, int64_t seen) {
    for (int64_t i = 0; i < rows; i++) {
        real *d = s->d + i * s->width;
        if (a->factor && a->factor_first) {
            real factor = factor_of(a, b, h, q + i);
            double of_factor = pull_back_factor(s->scores + i * s->width, d, seen, factor);
            if (a->d_rows) a->d_rows[(b * a->heads + h) * a->queries + q + i] = of_factor;
        }
        if (a->d_bias && a->bias_before) add_to_d_bias(s, a, b, h, q + i, d, seen);
    }
}

/* Adds to d_key, d_value and d_bias of the space and writes d_query. */
INLINE void backward_tile(Space *s, const Attention *a, Modulator m, int order, int general,
                          int64_t b, int64_t h, int64_t q, int64_t rows, double *sums) {
    int64_t seen = scores_of(s, a, general, b, h, q, rows),
            first = (b * a->heads + h) * a->queries + q;
    const real *query = at(a->query, a->query_strides, b, h, q);
    const real *d_out = at(a->d_out, a->d_out_strides, b, h, q);
    copy_padded(query, a->query_strides[2], s->query, s->dim, rows, a->dim);
    copy_padded(d_out, a->d_out_strides[2], s->d_out, s->value_dim, rows, a->value_dim);
    multiply(rows, padded(seen), a->value_dim, s->d_out, s->value_dim, 1, s->value_T, s->width,
             s->d, s->width, 0);
    for (int64_t i = 0; i < rows; i++) {
        real *p = s->p + i * s->width, *d = s->d + i * s->width;
        Row row = row_of(s, a, general, b, h, q + i);
        const real *scores = s->scores + i * s->width,
                   *statistics = a->statistics + 2 * (first + i);
        if (general)
            logits_row(scores, p, s->capped, row, m, order);
        else
            modulate_row(scores, p, row, m, order);
        recompute_row(row, statistics, p);
        const real *out = at(a->out, a->out_strides, b, h, q + i);
        real delta = (real)dot(s->d_out + i * s->value_dim, out, a->value_dim);
        if (a->d_logsumexp) delta -= a->d_logsumexp[first + i];
        subtract_mean_row(row, p, d, delta, d);
        drop_row(row, p);
        if ((row.mask || general) && !isfinite(delta)) {
            hide_row(row, p);
            hide_row(row, d);
        }
        memset(p + row.limit, 0, (seen - row.limit) * sizeof(real));
        memset(d + row.limit, 0, (s->width - row.limit) * sizeof(real));
        if (general && a->d_bias && !a->bias_before) add_to_d_bias(s, a, b, h, q + i, d, seen);
        if (general && row.capped) {
            double of_factor = pull_back_cap(row, s->capped, d);
            if (a->d_rows) a->d_rows[first + i] = of_factor;
        }
    }
    pull_back_tile(s, a, m, rows, sums);
    if (general) pull_back_before(s, a, b, h, q, rows, seen);
    multiply(seen, s->value_dim, rows, s->p, 1, s->width, s->d_out, s->value_dim, s->d_value,
             s->value_dim, 1);
    multiply(seen, s->dim, rows, s->d, 1, s->width, s->query, s->dim, s->d_key, s->dim, 1);
    multiply(rows, s->dim, seen, s->d, s->width, 1, s->key, s->dim, s->result, s->dim, 0);
    for (int64_t i = 0; i < rows; i++)
        memcpy(a->d_query + (first + i) * a->dim, s->result + i * s->dim, a->dim * sizeof(real));
}

int attention_forward(const Attention *a) {
    Modulator m = modulator(a->coefficients, (int)a->order, (real)a->score_scale);
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
            if (a->bias || has_steps(a))
                forward_tile(&space, a, m, 1, b, h, q, rows);
            else
                forward_tile(&space, a, m, 0, b, h, q, rows);
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
            if (a->bias || has_steps(a))
                backward_tile(s, a, m, (int)a->order, 1, b, h, q, rows, sums);
            else
                BY_ORDER(a->order, backward_tile(s, a, m, ORDER, 0, b, h, q, rows, sums))
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

/* The gradients of the factor from those of each row, in a fixed order. */
static void add_up_factor(const Attention *a) {
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t q = 0; q < a->queries; q++) {
                const int64_t *step = a->d_factor_strides;
                a->d_factor[b * step[0] + h * step[1] + q * step[2]] +=
                    a->d_rows[(b * a->heads + h) * a->queries + q];
            }
}

/* d_key, d_value, d_bias and d_factor must be zero. Few heads are split into shares of their
   queries, which are added up in a fixed order. So are heads that have the same rows of the bias:
   they take turns. */
int attention_backward(const Attention *a) {
    Modulator m = modulator(a->coefficients, (int)a->order, (real)a->score_scale);
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
    if (a->d_factor && !failed) add_up_factor(a);
    return failed;
}

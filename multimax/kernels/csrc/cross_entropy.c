/* Cross-entropy of modulated scores, a row at a time: the loss, and its gradient in the place of
   the scores. Semantics of torch.nn.functional.cross_entropy on sigma(scores). */
#include "modulator.h"

typedef struct {
    const int64_t *target; /* class of each row, or NULL */
    const real *soft;      /* else the probabilities of its classes */
    const real *weight;    /* factor of each row's loss in the gradient, or NULL */
    double smoothing;      /* share of the target that is spread over all classes */
    int64_t ignored;       /* the class of rows that count for nothing */
    int64_t gradient;      /* whether the scores become their gradient */
} Target;

LAYOUT(Target, gradient)

INLINE double sum_row(const real *y, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) sum += y[j];
        total += sum;
    }
    return total;
}

/* The sum of soft * y; a class without probability counts for nothing, whatever its score. */
INLINE double expectation(const real *soft, const real *y, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < end; j++) sum += soft[j] * (soft[j] == 0 ? 0 : y[j]);
        total += sum;
    }
    return total;
}

/* Masked scores as 0, which adds nothing to the sums; with a modulator they get no gradient dy. */
RARE void clear_masked(real *x, real *dy, int64_t n, Modulator m, int order) {
    for (int64_t j = 0; j < n; j++)
        if (hides(x[j], m, order)) {
            x[j] = 0;
            if (order >= 1) dy[j] = 0;
        }
}

/* Loss of a row; `work` has room for the row. With y = sigma(x) and q the smoothed target,
   loss = (sum of q) log sum exp(y) - q y, and dy = (sum of q) p - q. */
INLINE double cross_entropy_row(real *x, real *work, int64_t n, int64_t i, Modulator m, int order,
                                const Target *t, double *sums) {
    const real *soft = t->soft ? t->soft + i * n : NULL;
    if (!soft && t->target[i] == t->ignored) {
        if (t->gradient) memset(x, 0, n * sizeof(real));
        return 0;
    }
    Row row = {.limit = n};
    real highest = modulate_row(x, work, row, m, order);
    if (highest == -INFINITY) highest = 0;
    double rest = t->smoothing / n, mass = soft ? sum_row(soft, n) : 1;
    double observed = (1 - t->smoothing) * (soft ? expectation(soft, work, n) : work[t->target[i]]);
    if (rest > 0) observed += rest * sum_row(work, n);
    double total = exponentiate_row(work, n, highest);
    mass = (1 - t->smoothing) * mass + t->smoothing;
    double loss = mass * (highest + log(total)) - observed;
    if (!t->gradient) return loss;
    int infinite = !isfinite(loss); /* a masked class has a share of the target, or there is NaN */
    double factor = t->weight ? t->weight[i] : 1;
    real of_p = (real)(factor * mass / total), spread = (real)(factor * rest);
    if (soft) {
        real of_target = (real)(factor * (1 - t->smoothing));
#pragma omp simd
        for (int64_t j = 0; j < n; j++) work[j] = work[j] * of_p - of_target * soft[j] - spread;
    } else {
        work[t->target[i]] -= (real)((1 - t->smoothing) * total / mass);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) work[j] = work[j] * of_p - spread;
    }
    if (infinite) clear_masked(x, work, n, m, order);
    pull_back(x, work, n, m, order, sums);
    memcpy(x, work, n * sizeof(real));
    return loss;
}

int cross_entropy(int64_t count, int64_t columns, int64_t threads, int order,
                  const real *coefficients, real *x, const Target *target, real *losses,
                  double *sums) {
    Modulator m = modulator(coefficients, order, 1);
    Sums *partial = sums ? calloc(count + 1, sizeof(Sums)) : NULL;
    int failed = sums && !partial;
#pragma omp parallel num_threads(threads)
    {
        real *work = malloc((columns + 1) * sizeof(real));
        if (!work) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            double *into = partial ? partial[i].values : NULL;
            if (!failed)
                BY_ORDER(order, losses[i] = (real)cross_entropy_row(x + i * columns, work, columns,
                                                                    i, m, ORDER, target, into))
        }
        free(work);
    }
    add_up(sums, failed ? NULL : partial, failed ? 0 : count, order);
    return failed;
}

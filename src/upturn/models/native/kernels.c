/* Element-wise work and the choice of a token, each in one pass over memory, on the threads of torch.
 *
 * Rows are contiguous. Where torch rounds to bfloat16 between two operations, so does this, hence results differ from
 * torch's only by the order of sums.
 */
#include "calls.h"
#include "vec.h"

/* One row's RMS norm times w. */
static inline void norm_row(int64_t d, const real *x, const real *w, float eps, real *out) {
    vec squares = {0};
    for (int64_t j = 0; j < d; j += LANES) {
        vec part = load_some(x + j, d - j);
        squares += part * part;
    }
    float scale = 1.0f / sqrtf(total(squares) / (float)d + eps);
    for (int64_t j = 0; j < d; j += LANES)
        store_some(out + j, load_some(w + j, d - j) * kept_vec(load_some(x + j, d - j) * scale), d - j);
}

/* x [n, d] (+ y, into sum) -> out = RMS norm times w. y may be NULL: then sum is not written. */
void norm(int64_t n, int64_t d, const real *x, const real *y, const real *w, float eps, real *sum, real *out) {
#pragma omp parallel for schedule(static) if (n * d > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *row = x + i * d;
        if (y) {
            const real *more = y + i * d;
            real *both = sum + i * d;
            for (int64_t j = 0; j < d; j += LANES)
                store_some(both + j, load_some(row + j, d - j) + load_some(more + j, d - j), d - j);
            row = both;
        }
        norm_row(d, row, w, eps, out + i * d);
    }
}

/* gate_up [n, 2 f] -> out [n, f] = silu(gate) * up */
void silu_mul(int64_t n, int64_t f, const real *gate_up, real *out) {
#pragma omp parallel for schedule(static) if (n * f > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *gate = gate_up + i * 2 * f, *up = gate + f;
        for (int64_t j = 0; j < f; j += LANES) {
            vec g = load_some(gate + j, f - j);
            vec silu = kept_vec(g * inverse(1.0f + exp_vec(-g)));
            store_some(out + i * f + j, silu * load_some(up + j, f - j), f - j);
        }
    }
}

/* The rotary embedding, in place: heads of width d at x + i * stride, by cos and sin [n, d]; with w, RMS norm first. */
void rope(int64_t n, int64_t heads, int64_t d, int64_t stride, real *x, const real *cos, const real *sin, const real *w,
          float eps) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *c = cos + i * d, *s = sin + i * d;
        for (int64_t h = 0; h < heads; h++) {
            real *low = x + i * stride + h * d, *high = low + half;
            if (w) norm_row(d, low, w, eps, low);
            for (int64_t j = 0; j < half; j += LANES) {
                int64_t some = half - j;
                vec a = load_some(low + j, some), b = load_some(high + j, some);
                vec first = kept_vec(a * load_some(c + j, some)) - kept_vec(b * load_some(s + j, some));
                vec second = kept_vec(b * load_some(c + half + j, some)) + kept_vec(a * load_some(s + half + j, some));
                store_some(low + j, first, some);
                store_some(high + j, second, some);
            }
        }
    }
}

enum { BLOCK = 256 };

/* The first place where the cumulative weight passes the mark, found by blocks of known mass. */
static int64_t invert(const real *row, int64_t size, const double *mass, int64_t blocks, double mark, float top,
                      float scale) {
    double before = 0;
    int64_t b = 0, found = -1;
    while (b < blocks - 1 && before + mass[b] <= mark) before += mass[b++];
    int64_t last = size - b * BLOCK < BLOCK ? size : (b + 1) * BLOCK;
    for (int64_t j = b * BLOCK; j < last; j++) {
        float weight = expf((load(row[j]) - top) * scale);
        if (weight > 0) found = j; /* rounding must not pick a zero */
        before += (double)weight;
        if (before > mark && found >= 0) break;
    }
    return found < 0 ? b * BLOCK : found;
}

/* The next token of each of n rows of logits [n, size], by inversion: the first whose cumulative share of
 * exp(logit / temperature) passes the row's uniform number; at 0 the first of the greatest. logprob: at temperature 1.
 * Returns 1 where memory is short. */
int sample(int64_t n, int64_t size, const real *logits, const float *uniform, float temperature, int64_t *chosen,
           float *logprob) {
    const float scale = temperature ? 1.0f / temperature : 0.0f;
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    int failed = 0;
#pragma omp parallel
    {
        double *mass = malloc((size_t)blocks * sizeof(double));
        if (!mass) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            if (!mass) continue;
            const real *row = logits + i * size;
            float top = load(row[0]);
            for (int64_t j = 1; j < size; j++) top = load(row[j]) > top ? load(row[j]) : top;
            double whole = 0, plain = 0;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t from = b * BLOCK, some = size - from < BLOCK ? size - from : BLOCK;
                vec sums = {0}, plains = {0};
                for (int64_t j = 0; j < some; j += LANES) {
                    vec x = load_below(row + from + j, some - j) - top;
                    if (scale) sums += exp_vec(x * scale);
                    if (scale != 1.0f) plains += exp_vec(x);
                }
                mass[b] = (double)total(sums);
                whole += mass[b];
                plain += scale != 1.0f ? (double)total(plains) : mass[b];
            }
            int64_t found = scale ? invert(row, size, mass, blocks, (double)uniform[i] * whole, top, scale) : 0;
            while (!scale && found < size - 1 && load(row[found]) < top) found++;
            chosen[i] = found;
            logprob[i] = load(row[found]) - top - (float)log(plain);
        }
        free(mass);
    }
    return failed;
}

/* What training adds: gradients of the element-wise work, softmax under a mask, gathers, and AdamW.
 *
 * Work is cut into parts that do not depend on the number of threads, and parts are added in their order, so results
 * repeat to the bit.
 */
#define _GNU_SOURCE /* memrchr */
#include "vec.h"

/* The first `some` sums get more. */
static inline void add_some(float *sums, vec more, int64_t some) {
    if (some >= LANES) {
        more += load_floats(sums);
        memcpy(sums, &more, sizeof more);
    } else {
        for (int64_t i = 0; i < some; i++) sums[i] += more[i];
    }
}

/* First row of part p of n rows in `parts` parts. */
static inline int64_t cut(int64_t n, int64_t p, int64_t parts) { return n * p / parts; }

/* The gradient of x [n, d] where out = norm(x) * w had the gradient g, plus `more`, which may be NULL. The gradient of
 * w is added into gw [parts, d]. Rows of x, g and gx are `heads` pieces of width d, strides apart. */
void norm_back(int64_t n, int64_t heads, int64_t d, int64_t x_stride, int64_t g_stride, const real *x, const real *w,
               float eps, const real *g, const real *more, real *gx, float *gw, int64_t parts) {
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t p = 0; p < parts; p++) {
        float *mine = gw + p * d;
        for (int64_t i = cut(n, p, parts) * heads; i < cut(n, p + 1, parts) * heads; i++) {
            int64_t at = i / heads * g_stride + i % heads * d;
            const real *row = x + i / heads * x_stride + i % heads * d, *came = g + at;
            real *to = gx + at;
            vec squares = {0}, products = {0};
            for (int64_t j = 0; j < d; j += LANES) {
                vec value = load_some(row + j, d - j);
                squares += value * value;
                products += kept_vec(load_some(came + j, d - j) * load_some(w + j, d - j)) * value;
            }
            float scale = 1.0f / sqrtf(total(squares) / (float)d + eps);
            float dot = total(products) * scale * scale * scale / (float)d;
            for (int64_t j = 0; j < d; j += LANES) {
                int64_t some = d - j;
                vec value = load_some(row + j, some), grad = load_some(came + j, some);
                add_some(mine + j, grad * kept_vec(value * scale), some);
                vec found = kept_vec(kept_vec(grad * load_some(w + j, some)) * scale - value * dot);
                store_some(to + j, more ? found + load_some(more + at + j, some) : found, some);
            }
        }
    }
}

/* gate_up [n, 2 f], g [n, f] the gradient of silu(gate) * up -> its gradient [n, 2 f], and the product again [n, f] */
void silu_mul_back(int64_t n, int64_t f, const real *gate_up, const real *g, real *back, real *product) {
#pragma omp parallel for schedule(static) if (n * f > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *gate = gate_up + i * 2 * f, *up = gate + f, *came = g + i * f;
        real *to_gate = back + i * 2 * f, *to_up = to_gate + f, *out = product + i * f;
        for (int64_t j = 0; j < f; j += LANES) {
            int64_t some = f - j;
            vec x = load_some(gate + j, some), u = load_some(up + j, some), c = load_some(came + j, some);
            vec s = inverse(1.0f + exp_vec(-x)), silu = kept_vec(x * s);
            store_some(out + j, silu * u, some);
            store_some(to_up + j, c * silu, some);
            store_some(to_gate + j, kept_vec(c * u) * (s * (1.0f + x * (1.0f - s))), some);
        }
    }
}

/* The gradient before the rotary embedding, in place of the one behind it: as `rope`. */
void rope_back(int64_t n, int64_t heads, int64_t d, int64_t stride, real *g, const real *cos, const real *sin) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *c = cos + i * d, *s = sin + i * d;
        for (int64_t h = 0; h < heads; h++) {
            real *head = g + i * stride + h * d;
            for (int64_t j = 0; j < half; j += LANES) {
                int64_t some = half - j;
                vec a = load_some(head + j, some), b = load_some(head + half + j, some);
                vec first = kept_vec(a * load_some(c + j, some)) + kept_vec(b * load_some(s + half + j, some));
                vec second = kept_vec(b * load_some(c + half + j, some)) - kept_vec(a * load_some(s + j, some));
                store_some(head + j, first, some);
                store_some(head + half + j, second, some);
            }
        }
    }
}

/* Heads of width d of the rows named by places [units, length] -> out [units, heads, length, d]; 0 where a place is -1 */
void spread(int64_t units, int64_t length, int64_t heads, int64_t d, int64_t stride, const real *x,
            const int64_t *places, real *out) {
#pragma omp parallel for schedule(static) if (units * length * heads * d > 4096)
    for (int64_t i = 0; i < units * heads; i++) {
        const int64_t *place = places + i / heads * length;
        for (int64_t t = 0; t < length; t++) {
            real *to = out + (i * length + t) * d;
            if (place[t] < 0)
                memset(to, 0, (size_t)d * sizeof(real));
            else
                memcpy(to, x + place[t] * stride + i % heads * d, (size_t)d * sizeof(real));
        }
    }
}

/* The inverse, where no place is named twice. */
void unspread(int64_t units, int64_t length, int64_t heads, int64_t d, int64_t stride, const real *x,
              const int64_t *places, real *out) {
#pragma omp parallel for schedule(static) if (units * length * heads * d > 4096)
    for (int64_t i = 0; i < units * heads; i++) {
        const int64_t *place = places + i / heads * length;
        for (int64_t t = 0; t < length; t++)
            if (place[t] >= 0)
                memcpy(out + place[t] * stride + i % heads * d, x + (i * length + t) * d, (size_t)d * sizeof(real));
    }
}

/* The sum over all that `spread` copied of a row: row i was copied to rows from[first[i]] .. from[first[i + 1] - 1] of x
 * (of head 0; that of head h is h * step[.] rows further). */
void collect(int64_t n, int64_t heads, int64_t d, int64_t stride, const real *x, const int64_t *first,
             const int64_t *from, const int64_t *step, real *out) {
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++) {
            float sum[512] = {0};
            real *to = out + i * stride + h * d;
            for (int64_t c = first[i]; c < first[i + 1]; c++) {
                const real *row = x + (from[c] + h * step[c]) * d;
                for (int64_t j = 0; j < d; j++) sum[j] += load(row[j]);
            }
            for (int64_t j = 0; j < d; j++) to[j] = store(sum[j]);
        }
}

/* scores [keys] (products) -> row, filled up to whole vectors, = softmax of those that are seen; some are. */
static inline void softmax(int64_t keys, const real *scores, const uint8_t *seen, float scale, float *row) {
    vec top = every(-3e38f), sum = {0};
    for (int64_t j = 0; j < keys; j += LANES) {
        vec x = where(not_zero(seen + j, keys - j), load_some(scores + j, keys - j) * scale, every(-3e38f));
        top = greater(x, top);
        memcpy(row + j, &x, sizeof x);
    }
    float most = greatest(top);
    for (int64_t j = 0; j < keys; j += LANES) {
        vec e = where(not_zero(seen + j, keys - j), exp_vec(load_floats(row + j) - most), every(0.0f));
        sum += e;
        memcpy(row + j, &e, sizeof e);
    }
    float over = 1.0f / total(sum);
    for (int64_t j = 0; j < keys; j++) row[j] *= over;
}

/* Scores [units, heads, queries, keys] become their softmax over what is seen [units, queries, keys], and, where g is there, the gradient g of the softmax becomes that of the scores.
 * Returns 1 where memory is short. */
int masked_softmax(int64_t units, int64_t heads, int64_t queries, int64_t keys, real *scores, const uint8_t *seen,
                   float scale, real *g) {
    int failed = 0;
#pragma omp parallel if (units * heads * queries * keys > 4096)
    {
        float *row = malloc((size_t)up(keys + 1, LANES) * sizeof(float));
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < units * heads * queries; i++) {
            if (!row) continue;
            real *mine = scores + i * keys;
            const uint8_t *visible = seen + (i / (heads * queries) * queries + i % queries) * keys;
            const uint8_t *final = memrchr(visible, 1, (size_t)keys); /* what follows is hidden: half of a causal mask */
            int64_t most = final ? final - visible + 1 : 1;
            softmax(most, mine, visible, scale, row);
            for (int64_t j = 0; j < most; j += LANES) store_some(mine + j, load_floats(row + j), most - j);
            memset(mine + most, 0, (size_t)(keys - most) * sizeof(real));
            if (!g) continue;
            real *back = g + i * keys;
            vec products = {0};
            for (int64_t j = 0; j < most; j += LANES) products += load_floats(row + j) * load_some(back + j, most - j);
            float dot = total(products);
            for (int64_t j = 0; j < most; j += LANES)
                store_some(back + j, load_floats(row + j) * (load_some(back + j, most - j) - dot) * scale, most - j);
            memset(back + most, 0, (size_t)(keys - most) * sizeof(real));
        }
        free(row);
    }
    return failed;
}

/* Logits of ids first .. first + width - 1, [n, width]: the largest so far, the sum of exponentials under it, and the
 * target's logit, one of each per row. */
void logits_seen(int64_t n, int64_t width, int64_t first, const real *logits, const int64_t *targets, float *top,
                 float *sum, float *picked) {
#pragma omp parallel for schedule(static) if (n * width > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *row = logits + i * width;
        vec highest = every(top[i]), more = {0};
        for (int64_t j = 0; j < width; j += LANES) highest = greater(load_below(row + j, width - j), highest);
        float high = greatest(highest);
        for (int64_t j = 0; j < width; j += LANES) more += exp_vec(load_below(row + j, width - j) - high);
        sum[i] = sum[i] * expf(top[i] - high) + total(more);
        top[i] = high;
        if (targets[i] >= first && targets[i] < first + width) picked[i] = load(row[targets[i] - first]);
    }
}

/* The same logits become the gradient of the target's log-prob times g. */
void logits_back(int64_t n, int64_t width, int64_t first, real *logits, const int64_t *targets, const float *log_total,
                 const float *g) {
#pragma omp parallel for schedule(static) if (n * width > 4096)
    for (int64_t i = 0; i < n; i++) {
        real *row = logits + i * width;
        int64_t at = targets[i] - first;
        float picked = at >= 0 && at < width ? load(row[at]) : 0.0f;
        float all = log_total[i], factor = g[i];
        for (int64_t j = 0; j < width; j += LANES)
            store_some(row + j, -factor * exp_vec(load_some(row + j, width - j) - all), width - j);
        if (at >= 0 && at < width) row[at] = store(factor * (1.0f - expf(picked - all)));
    }
}

/* sum += g, or sum = g when it is the first */
void add_gradient(int64_t n, const real *g, float *sum, int64_t is_first) {
#pragma omp parallel for schedule(static) if (n > 4096)
    for (int64_t i = 0; i < n; i++) sum[i] = (is_first ? 0.0f : sum[i]) + load(g[i]);
}

/* The sum of squares of each `piece` numbers of g, or of the sum where it is there. */
void squares(int64_t n, int64_t piece, const real *g, const float *sum, float *of_pieces) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < (n + piece - 1) / piece; p++) {
        int64_t last = (p + 1) * piece < n ? (p + 1) * piece : n;
        vec found = {0};
        for (int64_t i = p * piece; i < last; i += LANES) {
            vec x = sum ? load_some_floats(sum + i, last - i) : load_some(g + i, last - i);
            found += x * x;
        }
        of_pieces[p] = total(found);
    }
}

/* The float whose rounded upper half is a bfloat16 weight, from that and its own lower half; a float weight is itself. */
static inline float joined(real weight, uint16_t low) {
#ifdef BF16
    uint32_t bits = ((uint32_t)weight - (low > 0x8000u)) << 16 | low;
    float out;
    memcpy(&out, &bits, 4);
    return out;
#else
    return weight;
#endif
}

/* One number's update by AdamW in float, `first` being its first moment. */
static inline void update(int64_t i, real *weight, uint16_t *low, float grad, float first, float *v, float beta2, float eps,
                          float fix, float rate, float decay) {
    v[i] = v[i] * beta2 + grad * grad * (1.0f - beta2);
    float value = joined(weight[i], low ? low[i] : 0) * decay - rate * first / (sqrtf(v[i]) / fix + eps);
#ifdef BF16
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= (bits & 0xffffu) == 0x8000u; /* halfway, it would not show which way it was rounded */
    memcpy(&value, &bits, 4);
    low[i] = (uint16_t)bits;
#endif
    weight[i] = store(value);
}

#define UPDATE_ALL(GRADIENT, FIRST, STORE)                                                                             \
    _Pragma("omp parallel for simd schedule(static) if (n > 4096)") for (int64_t i = 0; i < n; i++) {                  \
        float grad = (GRADIENT) * factor, first = FIRST + (grad - FIRST) * (1.0f - beta1);                             \
        STORE;                                                                                                         \
        update(i, weight, low, grad, first, v, beta2, eps, fix, rate, decay);                                          \
    }

/* One update by AdamW of n numbers. Their gradient is g, or the sum where it is there, times `factor`, and the first moment
 * lies in short_m, or in m where it is there; `fix` is the root of the second moment's correction, `rate` the learning rate
 * over the first one's, `decay` what is left of the weight. */
void adamw(int64_t n, real *weight, uint16_t *low, const real *g, const float *sum, real *short_m, float *m, float *v,
           float factor, float beta1, float beta2, float eps, float fix, float rate, float decay) {
    if (sum && m)
        UPDATE_ALL(sum[i], m[i], m[i] = first)
    else if (m)
        UPDATE_ALL(load(g[i]), m[i], m[i] = first)
    else if (sum)
        UPDATE_ALL(sum[i], load(short_m[i]), short_m[i] = store(first))
    else
        UPDATE_ALL(load(g[i]), load(short_m[i]), short_m[i] = store(first))
}

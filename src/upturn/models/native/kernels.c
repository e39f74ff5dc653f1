/* Element-wise work and attention of few queries, each in one pass over memory, on the threads of torch.
 *
 * Rows are contiguous. Where torch rounds to bfloat16 between two operations, so does this, hence results differ from
 * torch's only by the order of sums.
 */
#include "real.h"

/* 16 numbers at once, on any machine: compilers split them where registers are shorter. */
enum { LANES = 16, MOST = 4, AHEAD = 32 };
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load_vec(const real *x) {
    vec out;
#ifndef BF16
    memcpy(&out, x, sizeof out);
#elif defined __AVX512F__ /* the compiler makes four instructions of the other way */
    out = (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#else
    for (int i = 0; i < LANES; i++) out[i] = load(x[i]);
#endif
    return out;
}

static inline void store_vec(real *to, vec x) {
#ifndef BF16
    memcpy(to, &x, sizeof x);
#elif defined __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    for (int i = 0; i < LANES; i++) to[i] = store(x[i]);
#endif
}

/* What is left of x after it was kept as a `real`. */
static inline vec kept_vec(vec x) {
#if defined BF16 && defined __AVX512BF16__
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    real bits[LANES];
    store_vec(bits, x);
    return load_vec(bits);
#endif
}

/* 1 / x to the last place; a division takes as long as all the rest of a SiLU. */
static inline vec inverse(vec x) {
#ifdef __AVX512F__
    vec guess = (vec)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

static inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline vec between(vec x, float least, float most) {
    typedef int32_t whole __attribute__((vector_size(4 * LANES)));
    vec low = (vec){0} + least, high = (vec){0} + most;
    whole under = x < low, over = x > high;
    return (vec)(((whole)low & under) | ((whole)high & over) | ((whole)x & ~(under | over)));
}

/* e^x to 2 units in the last place, as if x lay between -87 and 88. */
static inline vec exp_vec(vec x) {
    typedef int32_t whole __attribute__((vector_size(4 * LANES)));
    x = between(x, -87.0f, 88.0f);
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the nearest whole number */
    whole exponent = (whole)n - 0x4b400000;
    n -= 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = 1.3981999507e-3f + 1.9875691500e-4f * r;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((exponent + 127) << 23);
}

/* The first `some` numbers of a row that may end within a vector; what lies behind them is 0. */
static inline vec load_some(const real *x, int64_t some) {
    if (some >= LANES) return load_vec(x);
    real row[LANES] = {0};
    memcpy(row, x, (size_t)some * sizeof(real));
    return load_vec(row);
}

/* The same with the least of numbers behind them. */
static inline vec load_below(const real *x, int64_t some) {
    vec out = load_some(x, some);
    for (int64_t i = some; i < LANES; i++) out[i] = -3e38f;
    return out;
}

static inline void store_some(real *to, vec x, int64_t some) {
    if (some >= LANES) {
        store_vec(to, x);
        return;
    }
    real row[LANES];
    store_vec(row, x);
    memcpy(to, row, (size_t)some * sizeof(real));
}

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

/* New keys and values of n tokens, heads of width d at k + i * stride, into places of slots [slots, heads, length, d]. */
void keep(int64_t n, int64_t heads, int64_t d, int64_t stride, const real *k, const real *v, const int64_t *slot,
          const int64_t *place, int64_t length, real *keys, real *values) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = ((slot[i] * heads + h) * length + place[i]) * d;
            memcpy(keys + at, k + i * stride + h * d, (size_t)d * sizeof(real));
            memcpy(values + at, v + i * stride + h * d, (size_t)d * sizeof(real));
        }
}

/* Lane i of the result is the sum of all lanes of x[i]; x is spent. */
static inline vec sum_lanes(vec *x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            vec a = x[2 * i], b = x[2 * i + 1];
#ifdef __AVX512F__
            const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
            x[i] = (vec)_mm512_permutex2var_ps((__m512)a, even, (__m512)b) +
                   (vec)_mm512_permutex2var_ps((__m512)a, odd, (__m512)b);
#else
            for (int j = 0; j < LANES / 2; j++) {
                x[i][j] = a[2 * j] + a[2 * j + 1];
                x[i][j + LANES / 2] = b[2 * j] + b[2 * j + 1];
            }
#endif
        }
    return x[0];
}

/* Ask for a row early: rows of one head are too short for the machine to see what comes. */
static inline void ahead(const real *row, int d) {
    for (int at = 0; at < d * (int)sizeof(real); at += 64) __builtin_prefetch((const char *)row + at);
}

/* Products of a key with some query heads, lane by lane. */
static inline __attribute__((always_inline)) void products_of(const real *q, const int groups, const int d,
                                                              const real *key, vec *out) {
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) out[g] = (vec){0};
#if defined BF16 && defined __AVX512BF16__ /* two at a time, without widening them first */
#pragma GCC unroll 4
    for (int j = 0; j < d; j += 2 * LANES) {
        __m512bh part = (__m512bh)_mm512_loadu_si512(key + j);
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++)
            out[g] = (vec)_mm512_dpbf16_ps((__m512)out[g], (__m512bh)_mm512_loadu_si512(q + g * d + j), part);
    }
#else
#pragma GCC unroll 8
    for (int j = 0; j < d; j += LANES) {
        vec part = load_vec(key + j);
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) out[g] += load_vec(q + g * d + j) * part;
    }
#endif
}

/* One key head and `groups` query heads of width d, both known to the compiler. q, out [groups, d], scores
 * [groups, count rounded up to whole lanes]. */
static inline __attribute__((always_inline)) void attend_head(const real *q, const int groups, const int d,
                                                              const real *k, const real *v, int64_t count, float scale,
                                                              float *scores, real *out) {
    const int parts = d / LANES;
    int64_t width = (count + LANES - 1) / LANES * LANES;
    for (int64_t t = 0; t < width; t += LANES) {
        vec products[MOST][LANES];
        for (int i = 0; i < LANES; i++) {
            const real *key = k + (t + i < count ? t + i : count - 1) * d;
            ahead(t + i + AHEAD < count ? key + AHEAD * d : v + (t + i + AHEAD - count) * d, d);
            vec s[MOST];
            products_of(q, groups, d, key, s);
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) products[g][i] = s[g];
        }
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            vec sums = sum_lanes(products[g]) * scale;
            memcpy(scores + g * width + t, &sums, sizeof sums);
        }
    }
    float over[MOST];
    for (int g = 0; g < groups; g++) {
        float *row = scores + g * width, top = row[0];
        for (int64_t t = 1; t < width; t++) top = row[t] > top ? row[t] : top;
        vec all = {0};
        for (int64_t t = 0; t < width; t += LANES) {
            vec part;
            memcpy(&part, row + t, sizeof part);
            part = exp_vec(part - top);
            if (t + LANES > count)
                for (int i = 0; i < LANES; i++) part[i] = t + i < count ? part[i] : 0.0f;
            all += part;
            memcpy(row + t, &part, sizeof part);
        }
        over[g] = 1.0f / total(all);
    }
    vec sums[MOST * 8] = {0};
    for (int64_t t = 0; t < count; t++) {
        ahead(v + (t + AHEAD) * d, d);
#pragma GCC unroll 8
        for (int j = 0; j < parts; j++) {
            vec value = load_vec(v + t * d + j * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) sums[g * parts + j] += scores[g * width + t] * value;
        }
    }
    for (int g = 0; g < groups; g++) {
        const float *row = (const float *)(sums + g * parts);
        for (int j = 0; j < d; j++) out[g * d + j] = store(row[j] * over[g]);
    }
}

/* The same for any width. */
static void attend_any(const real *q, int64_t groups, int64_t d, const real *k, const real *v, int64_t count,
                       float scale, float *scores, float *sums, real *out) {
    for (int64_t g = 0; g < groups; g++) {
        float top = -3e38f, whole = 0;
        for (int64_t t = 0; t < count; t++) {
            float s = 0;
            for (int64_t j = 0; j < d; j++) s += load(q[g * d + j]) * load(k[t * d + j]);
            scores[t] = s * scale;
            top = scores[t] > top ? scores[t] : top;
        }
        for (int64_t j = 0; j < d; j++) sums[j] = 0;
        for (int64_t t = 0; t < count; t++) {
            float p = expf(scores[t] - top);
            whole += p;
            for (int64_t j = 0; j < d; j++) sums[j] += p * load(v[t * d + j]);
        }
        for (int64_t j = 0; j < d; j++) out[g * d + j] = store(sums[j] / whole);
    }
}

/* Attention of n queries, each over its slot up to its own place (and no further back than `window`, if not 0).
 *
 * q: heads of width d at q + i * stride for the i-th token of the step; which[] names the tokens that ask. out like q,
 * at i * heads * d. keys, values: [slots, kv_heads, length, d]. Returns 1 where memory is short. */
int attend(int64_t n, int64_t heads, int64_t kv_heads, int64_t d, int64_t stride, const real *q, const int64_t *which,
           const int64_t *slot, const int64_t *place, int64_t length, const real *keys, const real *values, float scale,
           int64_t window, real *out) {
    int64_t groups = heads / kv_heads;
    int failed = 0;
#pragma omp parallel
    {
        float *scratch = aligned_alloc(64, (size_t)(MOST * (length + LANES) + d + LANES) / LANES * LANES * 4);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        float *scores = scratch, *sums = scores + MOST * (length + LANES);
#pragma omp for schedule(dynamic, 1)
        for (int64_t pair = 0; pair < n * kv_heads; pair++) {
            if (!scratch) continue;
            int64_t i = which[pair / kv_heads], h = pair % kv_heads;
            int64_t first = window && place[i] + 1 > window ? place[i] + 1 - window : 0, count = place[i] + 1 - first;
            int64_t at = ((slot[i] * kv_heads + h) * length + first) * d;
            const real *k = keys + at, *v = values + at, *asked = q + i * stride + h * groups * d;
            real *to = out + (i * heads + h * groups) * d;
            if (d != 32 && d != 64 && d != 96 && d != 128) {
                attend_any(asked, groups, d, k, v, count, scale, scores, sums, to);
                continue;
            }
            for (int64_t g = 0; g < groups; g += MOST) {
                int64_t some = groups - g < MOST ? groups - g : MOST;
                const real *from = asked + g * d;
                real *part = to + g * d;
#define CASE(G, D)                                                                                                     \
    case G * 1000 + D:                                                                                                 \
        attend_head(from, G, D, k, v, count, scale, scores, part);                                                          \
        break;
                switch (some * 1000 + d) {
                    CASE(1, 32) CASE(2, 32) CASE(3, 32) CASE(4, 32)
                    CASE(1, 64) CASE(2, 64) CASE(3, 64) CASE(4, 64)
                    CASE(1, 96) CASE(2, 96) CASE(3, 96) CASE(4, 96)
                    CASE(1, 128) CASE(2, 128) CASE(3, 128) CASE(4, 128)
                }
            }
        }
        free(scratch);
    }
    return failed;
}

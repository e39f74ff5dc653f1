/* Element-wise work and attention of few queries, each in one pass over memory, on the threads of torch.
 *
 * Rows are contiguous. Where torch rounds to bfloat16 between two operations, so does this, hence results differ from
 * torch's only by the order of sums.
 */
#include "real.h"

/* x [n, d] (+ y, into sum) -> out = RMS norm times w. y may be NULL: then sum is not written. */
void norm(int64_t n, int64_t d, const real *x, const real *y, const real *w, float eps, real *sum, real *out) {
#pragma omp parallel for schedule(static) if (n * d > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *row = x + i * d;
        real *to = out + i * d;
        if (y) {
            const real *more = y + i * d;
            real *both = sum + i * d;
            for (int64_t j = 0; j < d; j++) both[j] = store(load(row[j]) + load(more[j]));
            row = both;
        }
        float squares = 0;
        for (int64_t j = 0; j < d; j++) squares += load(row[j]) * load(row[j]);
        float scale = 1.0f / sqrtf(squares / (float)d + eps);
        for (int64_t j = 0; j < d; j++) to[j] = store(load(w[j]) * kept(load(row[j]) * scale));
    }
}

/* gate_up [n, 2 f] -> out [n, f] = silu(gate) * up */
void silu_mul(int64_t n, int64_t f, const real *gate_up, real *out) {
#pragma omp parallel for schedule(static) if (n * f > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *gate = gate_up + i * 2 * f, *up = gate + f;
        real *to = out + i * f;
        for (int64_t j = 0; j < f; j++) {
            float g = load(gate[j]);
            to[j] = store(kept(g / (1.0f + exponential(-g))) * load(up[j]));
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
            real *head = x + i * stride + h * d;
            if (w) {
                float squares = 0;
                for (int64_t j = 0; j < d; j++) squares += load(head[j]) * load(head[j]);
                float scale = 1.0f / sqrtf(squares / (float)d + eps);
                for (int64_t j = 0; j < d; j++) head[j] = store(load(w[j]) * kept(load(head[j]) * scale));
            }
            for (int64_t j = 0; j < half; j++) {
                float a = load(head[j]), b = load(head[j + half]);
                head[j] = store(kept(a * load(c[j])) - kept(b * load(s[j])));
                head[j + half] = store(kept(b * load(c[j + half])) + kept(a * load(s[j + half])));
            }
        }
    }
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

/* One key head and `groups` query heads of width d, both known to the compiler. q [groups, d], out like it, scores
 * [groups, count rounded up to whole lanes]. */
static inline __attribute__((always_inline)) void attend_head(const float *q, const int groups, const int d,
                                                              const real *k, const real *v, int64_t count,
                                                              float *scores, real *out) {
    const int parts = d / LANES;
    int64_t width = (count + LANES - 1) / LANES * LANES;
    vec mine[MOST * 8];
    memcpy(mine, q, sizeof(float) * (size_t)(groups * d));
    for (int64_t t = 0; t < width; t += LANES) {
        vec products[MOST][LANES];
        for (int i = 0; i < LANES; i++) {
            const real *key = k + (t + i < count ? t + i : count - 1) * d;
            ahead(t + i + AHEAD < count ? key + AHEAD * d : v + (t + i + AHEAD - count) * d, d);
            vec s[MOST] = {0};
#pragma GCC unroll 8
            for (int j = 0; j < parts; j++) {
                vec part = load_vec(key + j * LANES);
#pragma GCC unroll 4
                for (int g = 0; g < groups; g++) s[g] += mine[g * parts + j] * part;
            }
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) products[g][i] = s[g];
        }
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            vec sums = sum_lanes(products[g]);
            memcpy(scores + g * width + t, &sums, sizeof sums);
        }
    }
    float over[MOST];
    for (int g = 0; g < groups; g++) {
        float *row = scores + g * width, top = row[0], total = 0;
        for (int64_t t = 1; t < count; t++) top = row[t] > top ? row[t] : top;
        for (int64_t t = 0; t < count; t++) row[t] = exponential(row[t] - top);
        for (int64_t t = 0; t < count; t++) total += row[t];
        over[g] = 1.0f / total;
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
static void attend_any(const float *q, int64_t groups, int64_t d, const real *k, const real *v, int64_t count,
                       float *scores, float *sums, real *out) {
    for (int64_t g = 0; g < groups; g++) {
        float top = -3e38f, total = 0;
        for (int64_t t = 0; t < count; t++) {
            float s = 0;
            for (int64_t j = 0; j < d; j++) s += q[g * d + j] * load(k[t * d + j]);
            scores[t] = s;
            top = s > top ? s : top;
        }
        for (int64_t j = 0; j < d; j++) sums[j] = 0;
        for (int64_t t = 0; t < count; t++) {
            float p = exponential(scores[t] - top);
            total += p;
            for (int64_t j = 0; j < d; j++) sums[j] += p * load(v[t * d + j]);
        }
        for (int64_t j = 0; j < d; j++) out[g * d + j] = store(sums[j] / total);
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
        float *scratch = aligned_alloc(64, (size_t)(MOST * (length + LANES) + groups * d + d + LANES) / LANES * LANES * 4);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
        float *scores = scratch, *mine = scores + MOST * (length + LANES), *sums = mine + groups * d;
#pragma omp for schedule(dynamic, 1)
        for (int64_t pair = 0; pair < n * kv_heads; pair++) {
            if (!scratch) continue;
            int64_t i = which[pair / kv_heads], h = pair % kv_heads;
            int64_t first = window && place[i] + 1 > window ? place[i] + 1 - window : 0, count = place[i] + 1 - first;
            int64_t at = ((slot[i] * kv_heads + h) * length + first) * d;
            const real *k = keys + at, *v = values + at, *asked = q + i * stride + h * groups * d;
            real *to = out + (i * heads + h * groups) * d;
            for (int64_t j = 0; j < groups * d; j++) mine[j] = load(asked[j]) * scale;
            if (d != 64 && d != 128) {
                attend_any(mine, groups, d, k, v, count, scores, sums, to);
                continue;
            }
            for (int64_t g = 0; g < groups; g += MOST) {
                int64_t some = groups - g < MOST ? groups - g : MOST;
                const float *from = mine + g * d;
                real *part = to + g * d;
#define CASE(G, D)                                                                                                     \
    case G * 1000 + D:                                                                                                 \
        attend_head(from, G, D, k, v, count, scores, part);                                                            \
        break;
                switch (some * 1000 + d) {
                    CASE(1, 64) CASE(2, 64) CASE(3, 64) CASE(4, 64)
                    CASE(1, 128) CASE(2, 128) CASE(3, 128) CASE(4, 128)
                }
            }
        }
        free(scratch);
    }
    return failed;
}

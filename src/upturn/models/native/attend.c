/* Keys and values of running drafts, and attention over them.
 *
 * A slot holds a text: its tokens at places 0, 1, ... of every head, in blocks that products take as they lie, of 16 keys
 * dimension by dimension, and of values place by place. Two bfloat16 numbers that are summed together lie together:
 *
 *     keys    [slots, heads, length / 16, width / PAIR, 16, PAIR]
 *     values  [slots, heads, length / PAIR, width, PAIR]
 *
 * `width` is that of a head, rounded up to 32 and filled with 0, and `length` a multiple of 32. What lies behind a
 * slot's text takes part with weight 0, so it must be finite.
 *
 * A token's result does not depend on the tokens that are computed with it: every sum runs over all places in one order.
 */
#include "calls.h"
#include "tiles.h"
#include "vec.h"

#ifdef BF16
enum { PAIR = 2 };
#else
enum { PAIR = 1 };
#endif
enum { LINE = LANES * PAIR, ROWS = 16, STEP = 32, AT_ONCE = 4 };

/* Keys and values of n tokens, heads of width d at k + i * stride, into their places. */
void keep(int64_t n, int64_t heads, int64_t d, int64_t stride, const real *k, const real *v, const int64_t *slot,
          const int64_t *place, int64_t length, int64_t width, real *keys, real *values) {
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t head = (slot[i] * heads + h) * length, at = place[i];
            const real *key = k + i * stride + h * d, *value = v + i * stride + h * d;
            real *to = keys + (head + at / LANES * LANES) * width + at % LANES * PAIR;
            for (int64_t j = 0; j < d; j++) to[j / PAIR * LINE + j % PAIR] = key[j];
            to = values + (head + at / PAIR * PAIR) * width + at % PAIR;
            for (int64_t j = 0; j < d; j++) to[j * PAIR] = value[j];
        }
}

/* Rows of queries [ROWS, width] that ask some keys of one head, and their place in the slot. */
typedef struct {
    int rows;
    int64_t width, first, last; /* places asked, multiples of STEP */
    real *q, *weights;          /* [ROWS, width], [ROWS, last - first] */
    float *scores, *sums;       /* the same */
} block;

/* sum += what a pair of numbers brings to each of 16 sums */
static inline vec with_pair(vec sum, const real *line, const real *pair) {
#ifndef BF16
    return sum + load_vec(line) * *pair;
#elif defined __AVX512BF16__
    int32_t both;
    memcpy(&both, pair, 4);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)_mm512_loadu_si512(line));
#else
    lanes bits;
    memcpy(&bits, line, sizeof bits);
    return sum + (vec)(bits << 16) * load(pair[0]) + (vec)(bits & (int32_t)0xffff0000) * load(pair[1]);
#endif
}

/* `rows`, known to the compiler, times `count` pairs of lines `step` apart, into up to AT_ONCE vectors of sums a row. */
static inline __attribute__((always_inline)) void rows_by_lines(const int rows, const real *x, int64_t x_stride,
                                                                int64_t count, const real *lines, int64_t step,
                                                                int vectors, float *out, int64_t out_stride) {
    vec sums[AT_ONCE][AT_ONCE] = {0};
    for (int64_t j = 0; j < count; j++)
        for (int c = 0; c < vectors; c++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[r][c] = with_pair(sums[r][c], lines + j * step + c * LINE, x + r * x_stride + j * PAIR);
    for (int r = 0; r < rows; r++) memcpy(out + r * out_stride, sums[r], (size_t)vectors * sizeof(vec));
}

static void product_of(int rows, const real *x, int64_t x_stride, int64_t count, const real *lines, int64_t step,
                       int vectors, float *out, int64_t out_stride) {
    for (int r = 0; r < rows; r += AT_ONCE) {
        const real *from = x + r * x_stride;
        float *to = out + r * out_stride;
#define CASE(R, V)                                                                                                     \
    case 10 * R + V:                                                                                                   \
        rows_by_lines(R, from, x_stride, count, lines, step, V, to, out_stride);                                       \
        break;
        switch (10 * (rows - r < AT_ONCE ? rows - r : AT_ONCE) + vectors) {
            CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2)
            CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4)
        }
    }
}

static void scores_of(const block *b, const real *keys) {
    int64_t span = b->last - b->first;
#ifdef TILES
    if (tiles_allowed()) {
        for (int64_t t = 0; t < span; t += SIDE) {
            begin_sums();
            for (int64_t j = 0; j < b->width; j += DEPTH) {
                _tile_loadd(1, b->q + j, b->width * 2);
                _tile_loadd(2, keys + t * b->width + j * SIDE, 64);
                _tile_dpbf16ps(0, 1, 2);
            }
            _tile_stored(0, b->scores + t, span * 4);
        }
        return;
    }
#endif
    for (int64_t t = 0; t < span; t += LANES)
        product_of(b->rows, b->q, b->width, b->width / PAIR, keys + t * b->width, LINE, 1, b->scores + t, span);
}

static void mix_of(const block *b, const real *values) {
    int64_t span = b->last - b->first, step = b->width * PAIR;
#ifdef TILES
    if (tiles_allowed()) {
        for (int64_t j = 0; j < b->width; j += 2 * SIDE) {
            begin_sums();
            for (int64_t t = 0; t < span; t += DEPTH) {
                _tile_loadd(2, b->weights + t, span * 2);
                _tile_loadd(3, values + t * b->width + j * PAIR, step * 2);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, values + t * b->width + (j + SIDE) * PAIR, step * 2);
                _tile_dpbf16ps(1, 2, 4);
            }
            _tile_stored(0, b->sums + j, b->width * 4);
            _tile_stored(1, b->sums + j + SIDE, b->width * 4);
        }
        return;
    }
#endif
    for (int64_t j = 0; j < b->width;) {
        int vectors = b->width - j >= 4 * LANES ? 4 : 2;
        product_of(b->rows, b->weights, span, span / PAIR, values + j * PAIR, step, vectors, b->sums + j, b->width);
        j += vectors * LANES;
    }
}

/* All ones in the lanes of places from `low` up to `high`, the first lane being place t. */
static inline lanes between_places(int64_t t, int64_t low, int64_t high) {
    lanes place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (place >= (int32_t)(low - t)) & (place < (int32_t)(high - t));
}

/* Scores of a row become weights: e^(score - greatest) of the places from `low` up to `high`, 0 elsewhere. Returns 1 by
 * their sum. */
static inline float weigh(float *scores, int64_t span, int64_t low, int64_t high, float scale, float cap, real *weights) {
    int64_t from = low / LANES * LANES, to = (high + LANES - 1) / LANES * LANES;
    vec top = (vec){0} - 3e38f, all = {0};
    for (int64_t t = from; t < to; t += LANES) {
        vec x = *(vec *)(scores + t) * scale;
        if (cap > 0)
            for (int i = 0; i < LANES; i++) x[i] = cap * tanhf(x[i] / cap);
        if (t < low || t + LANES > high) {
            lanes seen = between_places(t, low, high);
            x = chosen(seen, x, (vec){0} - 3e38f);
        }
        *(vec *)(scores + t) = x;
        top = chosen(x > top, x, top);
    }
    float most = top[0];
    for (int i = 1; i < LANES; i++) most = top[i] > most ? top[i] : most;
    memset(weights, 0, (size_t)from * sizeof(real));
    for (int64_t t = from; t < to; t += LANES) {
        vec e = exp_vec(*(vec *)(scores + t) - most);
        if (t < low || t + LANES > high) e = (vec)((lanes)e & between_places(t, low, high));
        all += e;
        store_vec(weights + t, e);
    }
    memset(weights + to, 0, (size_t)(span - to) * sizeof(real));
    return 1.0f / total(all);
}

/* Attention of new tokens, each over its slot up to its own place (and no further back than `window`, if not 0), scores
 * times `scale` and capped at `cap`, if not 0.
 *
 * q: heads of width d at q + i * stride for the i-th token of the step; out like q, at i * heads * d. Returns 1 where
 * memory is short. */
int attend(int64_t n, const run *runs, int64_t heads, int64_t kv_heads, int64_t d, int64_t stride, const real *q,
           int64_t length, int64_t width, const real *keys, const real *values, float scale, float cap, int64_t window,
           real *out) {
    int64_t groups = heads / kv_heads, tasks = 0, longest = 0;
    for (int64_t i = 0; i < n; i++) {
        tasks += (runs[i].count * groups + ROWS - 1) / ROWS;
        longest = runs[i].place + runs[i].count > longest ? runs[i].place + runs[i].count : longest;
    }
    int64_t(*task)[2] = malloc((size_t)tasks * sizeof *task), most = up(longest, STEP);
    int failed = !task;
    for (int64_t i = 0, at = 0; task && i < n; i++)
        for (int64_t row = 0; row < runs[i].count * groups; row += ROWS, at++) task[at][0] = i, task[at][1] = row;
#pragma omp parallel
    {
        float *scratch = aligned_alloc(64, (size_t)(ROWS * (most + width)) * (4 + sizeof(real)));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#ifdef TILES
        if (tiles_allowed()) take_tiles();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < tasks * kv_heads; part++) {
            if (failed || !scratch) continue;
            const run *of = runs + task[part / kv_heads][0];
            int64_t h = part % kv_heads, begin = task[part / kv_heads][1], left = of->count * groups - begin;
            block b = {.rows = left < ROWS ? (int)left : ROWS, .width = width};
            int64_t from = of->place + begin / groups + 1 - window;
            b.first = window && from > 0 ? from / STEP * STEP : 0;
            b.last = up(of->place + (begin + b.rows - 1) / groups + 1, STEP);
            int64_t span = b.last - b.first, head = (of->slot * kv_heads + h) * length + b.first;
            b.scores = scratch, b.sums = scratch + ROWS * most;
            b.q = (real *)(b.sums + ROWS * width), b.weights = b.q + ROWS * width;
            memset(b.q, 0, (size_t)(ROWS * width) * sizeof(real));
            for (int r = 0; r < b.rows; r++) {
                int64_t token = of->flat + (begin + r) / groups, g = (begin + r) % groups;
                memcpy(b.q + r * width, q + token * stride + (h * groups + g) * d, (size_t)d * sizeof(real));
            }
            scores_of(&b, keys + head * width);
            float share[ROWS];
            for (int r = 0; r < b.rows; r++) {
                int64_t high = of->place + (begin + r) / groups + 1, low = window && high > window ? high - window : 0;
                share[r] = weigh(b.scores + r * span, span, low - b.first, high - b.first, scale, cap, b.weights + r * span);
            }
            memset(b.weights + b.rows * span, 0, (size_t)((ROWS - b.rows) * span) * sizeof(real));
            mix_of(&b, values + head * width);
            for (int r = 0; r < b.rows; r++) {
                int64_t token = of->flat + (begin + r) / groups, g = (begin + r) % groups;
                real *to = out + (token * heads + h * groups + g) * d;
                for (int64_t j = 0; j < d; j++) to[j] = store(b.sums[r * width + j] * share[r]);
            }
        }
#ifdef TILES
        if (tiles_allowed()) _tile_release();
#endif
        free(scratch);
    }
    free(task);
    return failed;
}

/* Keys and values of running drafts, and attention over them.
 *
 * A slot holds a text: its tokens at places 0, 1, ... of every head, as products take them. Keys lie in blocks of places,
 * dimension by dimension, and values place by place; on tiles two numbers that are summed together lie together:
 *
 *     keys    [slots, heads, length / block, width / pair, block, pair]
 *     values  [slots, heads, length / pair, width, pair]
 *
 * `width` is that of a head, rounded up to 32 and filled with 0, and `length` a multiple of 32. What lies behind a
 * slot's text takes part with weight 0, so it must be finite.
 *
 * A token's result does not depend on the tokens that are computed with it: every sum runs over all places in one order.
 */
#include "calls.h"
#include "tiles.h"
#include "vectors.h"

enum { ROWS = 16, STEP = 32 };
_Static_assert(STEP % STRIP == 0, "blocks of keys end where slots may");

/* Keys and values of n tokens, heads of width d at k + i * stride, into their places. */
void keep(int64_t n, int64_t heads, int64_t d, int64_t stride, const real *k, const real *v, const int64_t *slot,
          const int64_t *place, int64_t length, int64_t width, real *keys, real *values) {
    const int64_t pair = tiles_allowed() ? 2 : 1, block = tiles_allowed() ? 16 : STRIP;
#pragma omp parallel for schedule(static) if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t head = (slot[i] * heads + h) * length, at = place[i];
            const real *key = k + i * stride + h * d, *value = v + i * stride + h * d;
            real *to = keys + (head + at / block * block) * width + at % block * pair;
            for (int64_t j = 0; j < d; j++) to[j / pair * block * pair + j % pair] = key[j];
            to = values + (head + at / pair * pair) * width + at % pair;
            for (int64_t j = 0; j < d; j++) to[j * pair] = value[j];
        }
}

/* Rows of queries [ROWS, width] that ask some keys of one head, and their place in the slot. */
typedef struct {
    int rows;
    int64_t width, first, last; /* places asked, multiples of STEP */
    float *scores, *sums;       /* [ROWS, last - first], [ROWS, width] */
    real *q, *weights;          /* [ROWS, width], [ROWS, last - first]: on tiles */
    float *wide;                /* q on vectors, where scores become weights in their place */
} block;

/* All rows of x [rows, depth] times a strip of columns; see `rows_by_strip`. */
static void by_strip(int rows, int64_t place, int64_t depth, const float *x, const real *strip, int64_t step, float *out,
                     int64_t stride) {
    for (int r = 0; r < rows; r += TALL)
        rows_by_strip(rows - r < TALL ? rows - r : TALL, place, depth, x + r * depth, depth, strip, step,
                      out + r * stride, stride);
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
    for (int64_t t = 0; t < span; t += STRIP)
        by_strip(b->rows, 0, b->width, b->wide, keys + t * b->width, STRIP, b->scores + t, span);
}

static void mix_of(const block *b, const real *values) {
    int64_t span = b->last - b->first;
#ifdef TILES
    if (tiles_allowed()) {
        for (int64_t j = 0; j < b->width; j += 2 * SIDE) {
            begin_sums();
            for (int64_t t = 0; t < span; t += DEPTH) {
                _tile_loadd(2, b->weights + t, span * 2);
                _tile_loadd(3, values + t * b->width + j * 2, b->width * 4);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, values + t * b->width + (j + SIDE) * 2, b->width * 4);
                _tile_dpbf16ps(1, 2, 4);
            }
            _tile_stored(0, b->sums + j, b->width * 4);
            _tile_stored(1, b->sums + j + SIDE, b->width * 4);
        }
        return;
    }
#endif
    for (int64_t j = 0; j < b->width; j += STRIP)
        by_strip(b->rows, b->first, span, b->scores, values + j, b->width, b->sums + j, b->width);
}

/* All ones in the lanes of places from `low` up to `high`, the first lane being place t. */
static inline lanes between_places(int64_t t, int64_t low, int64_t high) {
    static const int32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    lanes place;
    memcpy(&place, all, sizeof place);
    return (place >= (int32_t)(low - t)) & (place < (int32_t)(high - t));
}

/* Scores of a row become weights, on tiles in memory of their own: e^(score - greatest) of the places from `low` up to
 * `high`, 0 elsewhere. Returns 1 by their sum. */
static inline float weigh(float *scores, int64_t span, int64_t low, int64_t high, float scale, float cap, real *weights) {
    int64_t from = low / LANES * LANES, to = (high + LANES - 1) / LANES * LANES;
    vec top = every(-3e38f), all = {0};
    for (int64_t t = from; t < to; t += LANES) {
        vec x = load_floats(scores + t) * scale;
        if (cap > 0)
            for (int i = 0; i < LANES; i++) x[i] = cap * tanhf(x[i] / cap);
        if (t < low || t + LANES > high) {
            lanes seen = between_places(t, low, high);
            x = chosen(seen, x, every(-3e38f));
        }
        memcpy(scores + t, &x, sizeof x);
        top = greater(x, top);
    }
    float most = greatest(top);
    if (weights) {
        memset(weights, 0, (size_t)from * sizeof(real));
        memset(weights + to, 0, (size_t)(span - to) * sizeof(real));
    } else {
        memset(scores, 0, (size_t)from * sizeof(float));
        memset(scores + to, 0, (size_t)(span - to) * sizeof(float));
    }
    for (int64_t t = from; t < to; t += LANES) {
        vec e = exp_vec(load_floats(scores + t) - most);
        if (t < low || t + LANES > high) e = (vec)((lanes)e & between_places(t, low, high));
        all += e;
        if (weights)
            store_vec(weights + t, e);
        else
            memcpy(scores + t, &e, sizeof e);
    }
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
        float *scratch = aligned_alloc(64, (size_t)(2 * ROWS * (most + width)) * sizeof(float));
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
            int64_t back = of->place + begin / groups + 1 - window;
            b.first = window && back > 0 ? back / STEP * STEP : 0;
            b.last = up(of->place + (begin + b.rows - 1) / groups + 1, STEP);
            int64_t span = b.last - b.first, head = (of->slot * kv_heads + h) * length + b.first;
            b.scores = scratch, b.sums = scratch + ROWS * most;
            b.wide = b.sums + ROWS * width, b.q = (real *)b.wide;
            b.weights = tiles_allowed() ? b.q + ROWS * width : NULL;
            memset(b.wide, 0, (size_t)(ROWS * width) * sizeof(float));
            for (int r = 0; r < b.rows; r++) {
                int64_t token = of->flat + (begin + r) / groups, g = (begin + r) % groups;
                const real *from = q + token * stride + (h * groups + g) * d;
                if (b.weights)
                    memcpy(b.q + r * width, from, (size_t)d * sizeof(real));
                else
                    for (int64_t j = 0; j < d; j++) b.wide[r * width + j] = load(from[j]);
            }
            scores_of(&b, keys + head * width);
            float share[ROWS];
            for (int r = 0; r < b.rows; r++) {
                int64_t high = of->place + (begin + r) / groups + 1, low = window && high > window ? high - window : 0;
                real *weights = b.weights ? b.weights + r * span : NULL;
                share[r] = weigh(b.scores + r * span, span, low - b.first, high - b.first, scale, cap, weights);
            }
            if (b.weights) memset(b.weights + b.rows * span, 0, (size_t)((ROWS - b.rows) * span) * sizeof(real));
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

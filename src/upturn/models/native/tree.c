/* Attention over the units of a token tree, and its gradient, in products of 32 rows and columns (`blocks.h`).
 *
 * A unit is a few tokens that see the same earlier ones, and each other as far as `seen` says. The query heads of one
 * key head lie one under the other, as rows of one product. Nothing but queries, keys and values is kept for the
 * backward pass. Processors without bfloat16 get no such kernel: there plain products do it.
 */
#include "blocks.h"

#ifdef BLOCKS
/* Tokens of the flat step: those that ask, and those that may be seen. */
typedef struct {
    int64_t queries, keys; /* how many */
    const int64_t *query, *key;
    const uint8_t *seen; /* [queries, width] */
    int64_t width;       /* of a row of `seen`, and of the unit's part of the copies */
    int64_t start;       /* of the unit's keys in a list of all, `width` for each unit */
} unit;

/* [T, heads + 2 kv_heads, d] */
typedef struct {
    int64_t heads, kv_heads, d, stride;
    float scale;
} layout;

/* A unit and a key head: its rows in memory of their own, filled up with 0 to multiples of 32. */
typedef struct {
    int64_t rows, span, groups; /* rows: queries times groups */
    real *q, *k, *v, *g;        /* [rows, d], [span, d], [span, d], [rows, d] */
    real *right[5];             /* packed: k and v by their rows; the other ways around v or k, q, g */
    real *weights, *changes;    /* [rows, span] */
    real *left;                 /* some columns of these, packed */
    float *scores, *more, *sums; /* [32, span] twice, [32, d] */
} scratch;

/* x [n, d] -> per 16 rows d / 32 right tiles: products sum over d. */
static inline void pack_all_rows(int64_t n, int64_t d, const real *x, real *tiles) {
    for (int64_t r = 0; r < n; r += SIDE)
        for (int64_t t = 0; t < d; t += DEPTH, tiles += TILE) pack_rows(SIDE, d, x + r * d + t, tiles);
}

/* Some of 32 rows, `step` apart tile by tile, times `columns` packed columns of so many tiles -> out [32, columns]. */
static inline void rows_times(int64_t some, int64_t tiles, const real *x, const real *x2, int64_t step, int64_t stride,
                              const real *right, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c += PANEL) {
        const real *one = right + c / SIDE * tiles * TILE, *two = one + tiles * TILE;
        block_product(some, tiles, x, x2, step, stride, one, two, out + c, columns);
    }
}

/* Rows [n, d] of some tokens' heads: row r is token of[r % tokens], head r / tokens; the rest up to `most` is 0. */
static inline void gather(int64_t n, int64_t most, int64_t tokens, const int64_t *of, int64_t d, int64_t stride,
                          const real *x, real *rows) {
    for (int64_t r = 0; r < n; r++)
        memcpy(rows + r * d, x + of[r % tokens] * stride + r / tokens * d, (size_t)d * sizeof(real));
    memset(rows + n * d, 0, (size_t)((most - n) * d) * sizeof(real));
}

static inline __mmask16 seen_at(const unit *u, const uint8_t *seen, int64_t j) {
    int64_t left = u->keys - j;
    if (left <= 0) return 0;
    __mmask16 real_ones = left < LANES ? (1u << left) - 1 : 0xffff;
    __m128i bytes = _mm_maskz_loadu_epi8(real_ones, seen + j);
    return _mm_test_epi8_mask(bytes, bytes);
}

/* Products of a row become e^(product * scale - greatest) of what is seen, 0 elsewhere; returns 1 by their sum. */
static inline float weigh(const unit *u, const uint8_t *seen, int64_t span, float scale, float *row) {
    __m512 top = _mm512_set1_ps(-3e38f);
    for (int64_t j = 0; j < span; j += LANES)
        top = _mm512_mask_max_ps(top, seen_at(u, seen, j), top, _mm512_loadu_ps(row + j));
    float most = _mm512_reduce_max_ps(top) * scale;
    vec sum = {0};
    for (int64_t j = 0; j < span; j += LANES) {
        vec e = exp_vec((vec)_mm512_loadu_ps(row + j) * scale - most);
        e = (vec)_mm512_maskz_mov_ps(seen_at(u, seen, j), (__m512)e);
        _mm512_storeu_ps(row + j, (__m512)e);
        sum += e;
    }
    return 1.0f / total(sum);
}

/* Rows from `first` on, some of 32: products with all keys. */
static inline void products(const scratch *s, int64_t first, int64_t some, int64_t d, const real *x, const real *right,
                            float *out) {
    const real *at = x + first * d;
    rows_times(some, d / DEPTH, at, at + SIDE * d, DEPTH, d, right, s->span, out);
}

/* The weighted sums of some of 32 rows of weights -> sums [32, d] */
static inline void mixed(const scratch *s, int64_t some, const real *weights, int64_t d, const real *right, float *sums) {
    rows_times(some, s->span / DEPTH, weights, weights + SIDE * s->span, DEPTH, s->span, right, d, sums);
}

static inline void put(const float *from, float by, int64_t d, real *to) {
    for (int64_t j = 0; j < d; j += LANES) store_vec(to + j, (vec)_mm512_loadu_ps(from + j) * by);
}

/* Where a row's result lies in [T, ., d]. */
static inline real *place_of(const unit *u, int64_t row, int64_t head, int64_t d, int64_t stride, real *x) {
    return x + u->query[row % u->queries] * stride + (head + row / u->queries) * d;
}

static void forward(const unit *u, int64_t h, const layout *l, const scratch *s, real *out) {
    int64_t d = l->d, real_rows = u->queries * s->groups;
    pack_all_rows(s->span, d, s->k, s->right[0]);
    pack_right(s->span, d, s->v, d / SIDE, s->right[1]);
    for (int64_t first = 0; first < s->rows; first += PANEL) {
        int64_t some = real_rows - first < PANEL ? real_rows - first : PANEL;
        float share[PANEL];
        products(s, first, some, d, s->q, s->right[0], s->scores);
        for (int64_t r = 0; r < some; r++) {
            float *row = s->scores + r * s->span;
            share[r] = weigh(u, u->seen + (first + r) % u->queries * u->width, s->span, l->scale, row);
            put(row, 1.0f, s->span, s->weights + r * s->span);
        }
        memset(s->weights + some * s->span, 0, (size_t)((PANEL - some) * s->span) * sizeof(real));
        mixed(s, some, s->weights, d, s->right[1], s->sums);
        for (int64_t r = 0; r < some; r++)
            put(s->sums + r * d, share[r], d, place_of(u, first + r, h * s->groups, d, l->heads * d, out));
    }
}

/* A row's weights, unscaled, and the gradient of what it mixes: both as they are wanted, in bfloat16. */
static inline void change(int64_t span, float share, float scale, const float *row, const float *g, real *weights,
                          real *changes) {
    vec sum = {0};
    for (int64_t j = 0; j < span; j += LANES) sum += (vec)_mm512_loadu_ps(row + j) * (vec)_mm512_loadu_ps(g + j);
    float dot = total(sum) * share;
    for (int64_t j = 0; j < span; j += LANES) {
        vec weight = (vec)_mm512_loadu_ps(row + j) * share;
        store_vec(weights + j, weight);
        store_vec(changes + j, weight * ((vec)_mm512_loadu_ps(g + j) - dot) * scale);
    }
}

static void backward(const unit *u, int64_t h, const layout *l, const scratch *s, real *out, real *keys, real *values) {
    int64_t d = l->d, span = s->span, real_rows = u->queries * s->groups, depth = s->rows / DEPTH;
    pack_all_rows(span, d, s->k, s->right[0]);
    pack_all_rows(span, d, s->v, s->right[1]);
    pack_right(span, d, s->k, d / SIDE, s->right[2]);
    pack_right(s->rows, d, s->q, d / SIDE, s->right[3]);
    pack_right(s->rows, d, s->g, d / SIDE, s->right[4]);
    for (int64_t first = 0; first < s->rows; first += PANEL) {
        int64_t some = real_rows - first < PANEL ? real_rows - first : PANEL;
        real *weights = s->weights + first * span, *changes = s->changes + first * span;
        products(s, first, some, d, s->q, s->right[0], s->scores);
        products(s, first, some, d, s->g, s->right[1], s->more);
        for (int64_t r = 0; r < some; r++) {
            float *row = s->scores + r * span;
            float share = weigh(u, u->seen + (first + r) % u->queries * u->width, span, l->scale, row);
            change(span, share, l->scale, row, s->more + r * span, weights + r * span, changes + r * span);
        }
        memset(weights + some * span, 0, (size_t)((PANEL - some) * span) * sizeof(real));
        memset(changes + some * span, 0, (size_t)((PANEL - some) * span) * sizeof(real));
        mixed(s, some, changes, d, s->right[2], s->sums);
        for (int64_t r = 0; r < some; r++)
            put(s->sums + r * d, 1.0f, d, place_of(u, first + r, h * s->groups, d, l->stride, out));
    }
    int64_t row = l->kv_heads * u->start + h * u->width;
    for (int64_t first = 0; first < span; first += PANEL) {
        int64_t some = u->keys - first < PANEL ? u->keys - first : PANEL;
        real *both[2][3] = {{s->changes, s->right[3], keys}, {s->weights, s->right[4], values}};
        for (int i = 0; i < 2; i++) {
            pack_left(s->rows, span, both[i][0] + first, 2, s->left);
            rows_times(some, depth, s->left, s->left + depth * TILE, TILE, DEPTH, both[i][1], d, s->sums);
            for (int64_t r = 0; r < some; r++) put(s->sums + r * d, 1.0f, d, both[i][2] + (row + first + r) * d);
        }
    }
}

/* Cuts one piece of memory into what the largest unit needs; NULL asks how much that is. */
static int64_t cut(scratch *s, int64_t rows, int64_t span, int64_t d, int back, char *memory) {
    int64_t at = 0, held = back ? rows : PANEL;
    struct {
        void *part;
        int64_t bytes;
    } parts[] = {
        {&s->q, rows * d * 2},       {&s->k, span * d * 2},        {&s->v, span * d * 2},
        {&s->right[0], span * d * 2}, {&s->right[1], span * d * 2}, {&s->weights, held * span * 2},
        {&s->scores, PANEL * span * 4}, {&s->sums, PANEL * d * 4},
        {&s->g, back * rows * d * 2}, {&s->right[2], back * span * d * 2}, {&s->right[3], back * rows * d * 2},
        {&s->right[4], back * rows * d * 2}, {&s->changes, back * held * span * 2},
        {&s->left, back * rows * PANEL * 2}, {&s->more, back * PANEL * span * 4},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        void *where = memory + at;
        if (memory) memcpy(parts[i].part, &where, sizeof where);
        at += (parts[i].bytes + 63) / 64 * 64;
    }
    return at;
}

/* Attention of all units over x [T, heads + 2 kv_heads, d], rows `stride` apart, d a multiple of 32, into out
 * [T, heads, d]. Where g, the gradient of that, is there: the gradient of the queries into out, which lies like x then,
 * and of each unit's keys and values into copies [rows, d]. Returns 1 where memory is short. */
int tree_attend(int64_t n, const unit *units, int64_t heads, int64_t kv_heads, int64_t d, int64_t stride, const real *x,
                float scale, const real *g, real *out, real *keys, real *values) {
    layout l = {heads, kv_heads, d, stride, scale};
    int64_t groups = heads / kv_heads, most_rows = 0, most_span = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t rows = up(units[i].queries * groups, PANEL), span = up(units[i].keys, PANEL);
        most_rows = rows > most_rows ? rows : most_rows;
        most_span = span > most_span ? span : most_span;
    }
    int failed = 0;
#pragma omp parallel
    {
        scratch s = {.groups = groups};
        char *memory = aligned_alloc(64, (size_t)cut(&s, most_rows, most_span, d, g != NULL, NULL));
        if (memory) {
            cut(&s, most_rows, most_span, d, g != NULL, memory);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        begin_blocks();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < n * kv_heads; task++) {
            const unit *u = units + task / kv_heads;
            int64_t h = task % kv_heads, real_rows = u->queries * groups;
            if (!memory) continue;
            s.rows = up(real_rows, PANEL), s.span = up(u->keys, PANEL);
            gather(real_rows, s.rows, u->queries, u->query, d, stride, x + h * groups * d, s.q);
            gather(u->keys, s.span, u->keys, u->key, d, stride, x + (heads + h) * d, s.k);
            gather(u->keys, s.span, u->keys, u->key, d, stride, x + (heads + kv_heads + h) * d, s.v);
            if (!g) {
                forward(u, h, &l, &s, out);
                continue;
            }
            gather(real_rows, s.rows, u->queries, u->query, d, heads * d, g + h * groups * d, s.g);
            backward(u, h, &l, &s, out, keys, values);
        }
        end_blocks();
        free(memory);
    }
    return failed;
}

/* Whether `tree_attend` may be called. */
int has_tree_attend(void) {
#ifdef TILES
    return tiles_allowed();
#else
    return 1;
#endif
}
#else
int has_tree_attend(void) { return 0; }

int tree_attend(int64_t n, const void *units, int64_t heads, int64_t kv_heads, int64_t d, int64_t stride, const real *x,
                float scale, const real *g, real *out, real *keys, real *values) {
    return 1;
}
#endif

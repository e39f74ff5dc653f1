/* Attention over the units of a token tree, and its gradient, in products of some rows and columns (`blocks.h`).
 *
 * A unit is a few tokens that see the same earlier ones, and each other as far as `seen` says. The query heads of one
 * key head lie one under the other, as rows of one product. Nothing but queries, keys and values is kept for the
 * backward pass. Without AVX2, or where tiles are compiled for but not lent, plain products do it instead.
 */
#include "blocks.h"

#ifdef TREES
enum { TALLEST = BLOCK_ROWS > BLOCK_COLUMNS ? BLOCK_ROWS : BLOCK_COLUMNS };

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

/* A unit and a key head: its rows in memory of their own, filled up with 0 to whole blocks. */
typedef struct {
    int64_t rows, span, groups;   /* rows: queries times groups */
    real *q, *k, *v, *g;          /* [rows, d], [span, d], [span, d], [rows, d] */
    real *right[5];               /* packed: k and v by their rows; the other ways around v or k, q, g */
    factor *weights, *changes;    /* [rows, span], forward [BLOCK_ROWS, span] */
    factor *left;                 /* some rows of q or g, or columns of these, as they are wanted */
    float *scores, *more, *sums;  /* [BLOCK_ROWS, span] twice, [TALLEST, d] */
} scratch;

/* Rows [n, d] of some tokens' heads: row r is token of[r % tokens], head r / tokens; the rest up to `most` is 0. */
static inline void gather(int64_t n, int64_t most, int64_t tokens, const int64_t *of, int64_t d, int64_t stride,
                          const real *x, real *rows) {
    for (int64_t r = 0; r < n; r++)
        memcpy(rows + r * d, x + of[r % tokens] * stride + r / tokens * d, (size_t)d * sizeof(real));
    memset(rows + n * d, 0, (size_t)((most - n) * d) * sizeof(real));
}

/* Products of a row become e^(product * scale - greatest) of what is seen, 0 elsewhere; returns 1 by their sum. */
static inline float weigh(const unit *u, const uint8_t *seen, int64_t span, float scale, float *row) {
    vec top = every(-3e38f), sum = {0};
    for (int64_t j = 0; j < span; j += LANES)
        top = greater(where(not_zero(seen + j, u->keys - j), load_floats(row + j), top), top);
    float most = greatest(top) * scale;
    for (int64_t j = 0; j < span; j += LANES) {
        vec e = where(not_zero(seen + j, u->keys - j), exp_vec(load_floats(row + j) * scale - most), every(0.0f));
        put_sum(row + j, e, 0);
        sum += e;
    }
    return 1.0f / total(sum);
}

/* Rows from `first` on, some of a block: products with all keys. */
static inline void products(const scratch *s, int64_t first, int64_t some, int64_t d, const real *x, const real *right,
                            float *out) {
    rows_times(some, d, as_factors(some, d, x + first * d, s->left), d, right, s->span, out);
}

static inline void put(const float *from, float by, int64_t d, real *to) {
    for (int64_t j = 0; j < d; j += LANES) store_vec(to + j, load_floats(from + j) * by);
}

/* Where a row's result lies in [T, ., d]. */
static inline real *place_of(const unit *u, int64_t row, int64_t head, int64_t d, int64_t stride, real *x) {
    return x + u->query[row % u->queries] * stride + (head + row / u->queries) * d;
}

static void forward(const unit *u, int64_t h, const layout *l, const scratch *s, real *out) {
    int64_t d = l->d, real_rows = u->queries * s->groups;
    pack_all_rows(s->span, d, s->k, s->right[0]);
    pack_all_columns(s->span, d, s->v, s->right[1]);
    for (int64_t first = 0; first < real_rows; first += BLOCK_ROWS) {
        int64_t some = real_rows - first < BLOCK_ROWS ? real_rows - first : BLOCK_ROWS;
        float share[BLOCK_ROWS];
        products(s, first, some, d, s->q, s->right[0], s->scores);
        for (int64_t r = 0; r < some; r++) {
            float *row = s->scores + r * s->span;
            share[r] = weigh(u, u->seen + (first + r) % u->queries * u->width, s->span, l->scale, row);
            for (int64_t j = 0; j < s->span; j += LANES) put_factors(s->weights + r * s->span + j, load_floats(row + j));
        }
        memset(s->weights + some * s->span, 0, (size_t)((BLOCK_ROWS - some) * s->span) * sizeof(factor));
        rows_times(some, s->span, s->weights, s->span, s->right[1], d, s->sums);
        for (int64_t r = 0; r < some; r++)
            put(s->sums + r * d, share[r], d, place_of(u, first + r, h * s->groups, d, l->heads * d, out));
    }
}

/* A row's weights, unscaled, and the gradient of what it mixes. */
static inline void change(int64_t span, float share, float scale, const float *row, const float *g, factor *weights,
                          factor *changes) {
    vec sum = {0};
    for (int64_t j = 0; j < span; j += LANES) sum += load_floats(row + j) * load_floats(g + j);
    float dot = total(sum) * share;
    for (int64_t j = 0; j < span; j += LANES) {
        vec weight = load_floats(row + j) * share;
        put_factors(weights + j, weight);
        put_factors(changes + j, weight * (load_floats(g + j) - dot) * scale);
    }
}

static void backward(const unit *u, int64_t h, const layout *l, const scratch *s, real *out, real *keys, real *values) {
    int64_t d = l->d, span = s->span, real_rows = u->queries * s->groups;
    pack_all_rows(span, d, s->k, s->right[0]);
    pack_all_rows(span, d, s->v, s->right[1]);
    pack_all_columns(span, d, s->k, s->right[2]);
    pack_all_columns(s->rows, d, s->q, s->right[3]);
    pack_all_columns(s->rows, d, s->g, s->right[4]);
    for (int64_t first = 0; first < s->rows; first += BLOCK_ROWS) {
        int64_t some = real_rows - first < BLOCK_ROWS ? real_rows - first : BLOCK_ROWS;
        factor *weights = s->weights + first * span, *changes = s->changes + first * span;
        products(s, first, some, d, s->q, s->right[0], s->scores);
        products(s, first, some, d, s->g, s->right[1], s->more);
        for (int64_t r = 0; r < some; r++) {
            float *row = s->scores + r * span;
            float share = weigh(u, u->seen + (first + r) % u->queries * u->width, span, l->scale, row);
            change(span, share, l->scale, row, s->more + r * span, weights + r * span, changes + r * span);
        }
        memset(weights + some * span, 0, (size_t)((BLOCK_ROWS - some) * span) * sizeof(factor));
        memset(changes + some * span, 0, (size_t)((BLOCK_ROWS - some) * span) * sizeof(factor));
        rows_times(some, span, changes, span, s->right[2], d, s->sums);
        for (int64_t r = 0; r < some; r++)
            put(s->sums + r * d, 1.0f, d, place_of(u, first + r, h * s->groups, d, l->stride, out));
    }
    int64_t row = l->kv_heads * u->start + h * u->width;
    for (int64_t first = 0; first < span; first += BLOCK_COLUMNS) {
        int64_t some = u->keys - first < BLOCK_COLUMNS ? u->keys - first : BLOCK_COLUMNS;
        columns_times(some, s->rows, s->changes + first, span, s->left, s->right[3], d, s->sums);
        for (int64_t r = 0; r < some; r++) put(s->sums + r * d, 1.0f, d, keys + (row + first + r) * d);
        columns_times(some, s->rows, s->weights + first, span, s->left, s->right[4], d, s->sums);
        for (int64_t r = 0; r < some; r++) put(s->sums + r * d, 1.0f, d, values + (row + first + r) * d);
    }
}

/* Cuts one piece of memory into what the largest unit needs; NULL asks how much that is. */
static int64_t cut(scratch *s, int64_t rows, int64_t span, int64_t d, int back, char *memory) {
    int64_t at = 0, held = back ? rows : BLOCK_ROWS, size = sizeof(real), wide = sizeof(factor);
    int64_t left = back ? rows * BLOCK_COLUMNS : 0;
    struct {
        void *part;
        int64_t bytes;
    } parts[] = {
        {&s->q, rows * d * size}, {&s->k, span * d * size}, {&s->v, span * d * size},
        {&s->right[0], span * d * size}, {&s->right[1], span * d * size}, {&s->weights, held * span * wide},
        {&s->scores, BLOCK_ROWS * span * 4}, {&s->sums, TALLEST * d * 4},
        {&s->left, (left > BLOCK_ROWS * d ? left : BLOCK_ROWS * d) * wide},
        {&s->g, back * rows * d * size}, {&s->right[2], back * span * d * size},
        {&s->right[3], back * rows * d * size}, {&s->right[4], back * rows * d * size},
        {&s->changes, back * held * span * wide}, {&s->more, back * BLOCK_ROWS * span * 4},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        void *place = memory + at;
        if (memory) memcpy(parts[i].part, &place, sizeof place);
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
        int64_t rows = up(units[i].queries * groups, BLOCK_ROWS), span = up(units[i].keys, BLOCK_COLUMNS);
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
            s.rows = up(real_rows, BLOCK_ROWS), s.span = up(u->keys, BLOCK_COLUMNS);
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

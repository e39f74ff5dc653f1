/* x times the transpose of a weight that was packed once, for matrix tiles or else for vectors.
 *
 * Every number of the result is summed in the same order whatever the number of rows, so it does not depend on the
 * other rows of the batch. Any number of rows will do at once: oneDNN makes a new kernel for each.
 */
#include "calls.h"
#include "tiles.h"
#include "vectors.h"

#ifdef __AVX2__
#ifndef PAIR_TILES
enum { SIDE = 16, PANEL = 2 * SIDE };
#endif

/* A row of sums, and its place in the result, where `left` numbers of it are wanted: as it is, or SiLU of the first half
 * times the second. */
static inline void put_row(const float *sums, const float *bias, int gated, int64_t left, real *out) {
    vec x[PANEL / LANES];
    for (int i = 0; i < PANEL / LANES; i++) x[i] = load_floats(sums + i * LANES) + load_floats(bias + i * LANES);
    if (gated) {
        for (int i = 0; i < SIDE / LANES; i++) {
            vec gate = kept_vec(x[i]), silu = kept_vec(gate * inverse(1.0f + exp_vec(-gate)));
            store_vec(out + i * LANES, silu * kept_vec(x[i + SIDE / LANES]));
        }
#ifdef PAIRS
    } else if (left >= PANEL) {
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
#endif
    } else {
        for (int i = 0; i < PANEL / LANES && i * LANES < left; i++) store_some(out + i * LANES, x[i], left - i * LANES);
    }
}

/* The bias of a panel, of which `left` rows are there; 0 beyond, and where there is none. */
static inline void load_bias(const real *bias, int64_t left, float *to) {
    for (int j = 0; j < PANEL; j++) to[j] = bias && j < left ? load(bias[j]) : 0.0f;
}

#ifdef TILES
enum { TILES_HELD = 1 << 20, CACHE_LINE = 32 };

/* weight [rows, depth], a multiple of 32 -> panels of 32 rows: per 32 of the depth two right tiles. What lies beyond the
 * rows is 0. */
static void pack_on_tiles(int64_t rows, int64_t depth, const real *weight, real *panels) {
    int64_t tiles = depth / DEPTH;
#pragma omp parallel for schedule(static)
    for (int64_t half = 0; half < (rows + PANEL - 1) / PANEL * 2; half++)
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = half * SIDE;
            real *tile = panels + ((half / 2 * tiles + t) * 2 + half % 2) * TILE;
            pack_rows(rows - row, depth, weight + row * depth + t * DEPTH, tile);
        }
}

/* Rows of x times a panel -> sums [32, 32]; 32 rows are read if there are more than 16, else 16. Meanwhile some lines of
 * the next panel are asked for: weights come from far away. */
static inline void rows_by_panel(int64_t tiles, const real *x, int64_t stride, int more, const real *panel,
                                 const real *next, int64_t lines, float *sums) {
    const real *below = x + SIDE * stride;
    begin_sums();
    for (int64_t t = 0; t < tiles; t++) {
        for (int64_t l = 0; l < lines; l++, next += CACHE_LINE) _mm_prefetch(next, _MM_HINT_T1);
        _tile_loadd(4, x + t * DEPTH, stride * 2);
        _tile_loadd(6, panel + 2 * t * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + (2 * t + 1) * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!more) continue;
        _tile_loadd(5, below + t * DEPTH, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    if (more) {
        put_sums(sums, PANEL);
    } else {
        _tile_stored(0, sums, PANEL * 4);
        _tile_stored(1, sums + SIDE, PANEL * 4);
    }
}

static int product_on_tiles(int64_t n, int64_t rows, int64_t depth, const real *x, const real *panels, const real *bias,
                            int64_t gated, real *out) {
    if (!n) return 0;
    int64_t tiles = depth / DEPTH, size = depth * PANEL, count = (rows + PANEL - 1) / PANEL, full = n / PANEL * PANEL;
    int64_t width = gated ? rows / 2 : rows, step = gated ? SIDE : PANEL;
    int64_t most = n * depth * 2 / TILES_HELD + 1, held = ((n + most - 1) / most + PANEL - 1) / PANEL * PANEL;
    int64_t parts = (n + held - 1) / held; /* of so many rows each that they stay near */
    int failed = 0;
#pragma omp parallel
    {
        float sums[PANEL * PANEL] __attribute__((aligned(64)));
        real *rest = aligned_alloc(64, (size_t)(PANEL * depth) * sizeof(real)); /* the last rows, filled up */
        if (rest) {
            memcpy(rest, x + full * depth, (size_t)((n - full) * depth) * sizeof(real));
            memset(rest + (n - full) * depth, 0, (size_t)((PANEL - n + full) * depth) * sizeof(real));
        } else {
#pragma omp atomic write
            failed = 1;
        }
        take_tiles();
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < parts * count; task++) {
            int64_t first = task / count * held, last = first + held < n ? first + held : n, p = task % count;
            const real *more = bias ? bias + p * PANEL : NULL;
            int64_t left = rows - p * PANEL, blocks = (last - first + PANEL - 1) / PANEL, lines = (PANEL + blocks - 1) / blocks;
            float added[PANEL] __attribute__((aligned(64)));
            load_bias(more, left, added);
            for (int64_t i = first; rest && i < last; i += PANEL) {
                int64_t some = last - i < PANEL ? last - i : PANEL;
                const real *panel = panels + p * size, *next = panel + size + (i - first) / PANEL * tiles * lines * CACHE_LINE;
                rows_by_panel(tiles, i < full ? x + i * depth : rest, depth, some > SIDE, panel, next, lines, sums);
                for (int64_t r = 0; r < some; r++)
                    put_row(sums + r * PANEL, added, (int)gated, left, out + (i + r) * width + p * step);
            }
        }
        _tile_release();
        free(rest);
    }
    return failed;
}
#endif

enum { HELD = 1 << 18, FEW = 48 };

/* weight [rows, depth] -> panels of 32 rows, strip by strip. What lies beyond the rows is 0. */
static void pack_on_vectors(int64_t rows, int64_t depth, const real *weight, real *panels) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < up(rows, PANEL); first += STRIP)
        pack_strip(rows, depth, first, weight, 1, depth, panels + first * depth);
}

static int product_on_vectors(int64_t n, int64_t rows, int64_t depth, const real *x, const real *panels, const real *bias,
                              int64_t gated, real *out) {
    int64_t blocks = (n + TALL - 1) / TALL, count = (rows + PANEL - 1) / PANEL, size = up(depth, PAIR) * TALL;
    int64_t bytes = blocks * size * (int64_t)sizeof(factor), parts = bytes / HELD + 1;
    int64_t width = gated ? rows / 2 : rows, step = gated ? SIDE : PANEL;
    int64_t least = (blocks + NEAR_BLOCKS - 1) / NEAR_BLOCKS;
    parts = parts > least ? parts : least; /* of so many rows each that they and their sums stay near */
    parts = parts < blocks ? parts : blocks;
    /* Tasks that a thread takes: its whole share of short ones, less of long ones, since cores may differ in speed. */
    int64_t share = (parts * count - 1) / omp_get_max_threads() + 1, at_once = n < FEW ? share : share / 16 + 1;
    factor *left = aligned_alloc(64, (size_t)up(bytes + 1, 64));
    if (!left) return 1;
#pragma omp parallel if (n * rows * depth > 65536)
    {
        float sums[NEAR_BLOCKS * TALL * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) pack_block(n, depth, b * TALL, x, depth, 1, left + b * size);
#pragma omp for schedule(dynamic, at_once)
        for (int64_t task = 0; task < parts * count; task++) {
            int64_t part = task / count, p = task % count, rest = rows - p * PANEL;
            float added[PANEL] __attribute__((aligned(64)));
            load_bias(bias ? bias + p * PANEL : NULL, rest, added);
            int64_t b = part * blocks / parts, row = b * TALL, some = ((part + 1) * blocks / parts - b) * TALL;
            some = n - row < some ? n - row : some;
            for (int64_t s = 0; s < PANEL; s += STRIP)
                blocks_by_strip(some, depth, left + b * size, panels + (p * PANEL + s) * depth, 1, sums + s, PANEL);
            for (int64_t r = 0; r < some; r++)
                put_row(sums + r * PANEL, added, (int)gated, rest, out + (row + r) * width + p * step);
        }
    }
    free(left);
    return 0;
}

int has_product(void) { return 1; }

void pack(int64_t rows, int64_t depth, const real *weight, real *panels) {
#ifdef TILES
    if (tiles_allowed()) {
        pack_on_tiles(rows, depth, weight, panels);
        return;
    }
#endif
    pack_on_vectors(rows, depth, weight, panels);
}

/* x [n, depth] times the weight [rows, depth] that was packed, plus bias [rows] if there is one -> out [n, rows]. Gated:
 * of every 32 rows the first 16 are gates of the others, and out is [n, rows / 2]. Returns 1 where memory is short. */
int product(int64_t n, int64_t rows, int64_t depth, const real *x, const real *panels, const real *bias, int64_t gated,
            real *out) {
#ifdef TILES
    if (tiles_allowed()) return product_on_tiles(n, rows, depth, x, panels, bias, gated, out);
#endif
    return product_on_vectors(n, rows, depth, x, panels, bias, gated, out);
}
#else
int has_product(void) { return 0; }

void pack(int64_t rows, int64_t depth, const real *weight, real *panels) {}

int product(int64_t n, int64_t rows, int64_t depth, const real *x, const real *panels, const real *bias, int64_t gated,
            real *out) {
    return 1;
}
#endif

int has_tiles(void) { return tiles_allowed(); }

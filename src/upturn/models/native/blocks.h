/* Products of some rows and packed columns, for attention over trees: on matrix tiles, on vectors of pairs, or else on
 * plain vectors. Left factors are rows of `factor`s, BLOCK_ROWS of them at a time; right ones are packed, BLOCK_COLUMNS
 * columns at a time. TREES says whether any of this can be compiled for.
 */
#pragma once
#include "tiles.h"
#include "vectors.h"

#ifdef PAIR_TILES
#define TREES
enum { BLOCK_ROWS = PANEL, BLOCK_COLUMNS = PANEL };

/* Before a thread makes products, and when it is done. */
static inline void begin_blocks(void) {
#ifdef TILES
    take_tiles();
#endif
}

static inline void end_blocks(void) {
#ifdef TILES
    _tile_release();
#endif
}

/* Rows of numbers as a left factor. */
static inline const factor *as_factors(int64_t rows, int64_t d, const real *x, factor *room) { return x; }

static inline void put_factors(factor *to, vec x) { store_vec(to, x); }

/* x [n, d] as a right factor whose columns are these rows: per 16 of them d / 32 tiles. */
static inline void pack_all_rows(int64_t n, int64_t d, const real *x, real *tiles) {
    for (int64_t r = 0; r < n; r += SIDE)
        for (int64_t t = 0; t < d; t += DEPTH, tiles += TILE) pack_rows(SIDE, d, x + r * d + t, tiles);
}

/* x [n, d] as a right factor as it is. */
static inline void pack_all_columns(int64_t n, int64_t d, const real *x, real *tiles) {
    pack_right(n, d, x, d / SIDE, tiles);
}

#ifndef TILES
/* Eight rows of a left factor. */
static inline void eight_rows(int64_t tiles, const real *x, int64_t step, int64_t row, const real *strip,
                              const real *strip2, float *sums, int64_t stride) {
    const int adds = 0;
    FOR_8(BEGIN_SUMS)
    for (int64_t t = 0; t < tiles; t++) {
        const real *block = x + t * step;
        for (int64_t j = 0; j < SIDE; j++, strip += DEPTH, strip2 += DEPTH) {
            vec left = (vec)_mm512_loadu_ps(strip), right = (vec)_mm512_loadu_ps(strip2);
            HELD_IN_REGISTER(left);
            HELD_IN_REGISTER(right);
            FOR_8(ADD_PAIRS)
        }
    }
    FOR_8(PUT_SUMS)
}
#endif

/* 32 rows, in two times 16 with rows `row` and tiles `step` apart, times 32 packed columns in two strips -> out, rows
 * `columns` apart. Of the rows `some` are wanted. */
static inline void block_product(int64_t some, int64_t tiles, const real *x, const real *x2, int64_t step,
                                 int64_t row, const real *right, const real *right2, float *out, int64_t columns) {
#ifdef TILES
    sum_up(tiles, x, x2, step, row, right, right2);
    put_sums(out, columns);
#else
    for (int64_t r = 0; r < some; r += 8)
        eight_rows(tiles, (r < SIDE ? x : x2 - SIDE * row) + r * row, step, row, right, right2, out + r * columns, columns);
#endif
}

static inline void blocks_times(int64_t some, int64_t tiles, const real *x, const real *x2, int64_t step, int64_t stride,
                                const real *right, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c += PANEL) {
        const real *one = right + c / SIDE * tiles * TILE, *two = one + tiles * TILE;
        block_product(some, tiles, x, x2, step, stride, one, two, out + c, columns);
    }
}

/* Some of 32 rows of x [., depth], `stride` apart, times `columns` packed columns -> out [32, columns]. */
static inline void rows_times(int64_t some, int64_t depth, const factor *x, int64_t stride, const real *right,
                              int64_t columns, float *out) {
    blocks_times(some, depth / DEPTH, x, x + SIDE * stride, DEPTH, stride, right, columns, out);
}

/* The same of some of 32 columns of x [depth, .]. They are packed in `left`. */
static inline void columns_times(int64_t some, int64_t depth, const factor *x, int64_t stride, factor *left,
                                 const real *right, int64_t columns, float *out) {
    int64_t tiles = depth / DEPTH;
    pack_left(depth, stride, x, 2, left);
    blocks_times(some, tiles, left, left + tiles * TILE, TILE, DEPTH, right, columns, out);
}
#elif defined __AVX2__ && !defined PAIRS
#define TREES
enum { BLOCK_ROWS = 24, BLOCK_COLUMNS = 32 };

static inline void begin_blocks(void) {}

static inline void end_blocks(void) {}

static inline const factor *as_factors(int64_t rows, int64_t d, const real *x, factor *room) {
#ifdef BF16
    widen(rows * d, x, room);
    return room;
#else
    return x;
#endif
}

static inline void put_factors(factor *to, vec x) { put_sum(to, x, 0); }

static inline void pack_all_rows(int64_t n, int64_t d, const real *x, real *strips) {
    for (int64_t c = 0; c < n; c += STRIP) pack_strip(n, d, c, x, 1, d, strips + c * d);
}

static inline void pack_all_columns(int64_t n, int64_t d, const real *x, real *strips) {
    for (int64_t c = 0; c < d; c += STRIP) pack_strip(d, n, c, x, d, 1, strips + c * n);
}

static inline void rows_times(int64_t some, int64_t depth, const factor *x, int64_t stride, const real *right,
                              int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c += STRIP)
        for (int64_t r = 0; r < some; r += TALL) {
            int rows = some - r < TALL ? (int)(some - r) : TALL;
            rows_by_strip(rows, 0, depth, x + r * stride, stride, right + c * depth, STRIP, out + r * columns + c, columns);
        }
}

static inline void columns_times(int64_t some, int64_t depth, const factor *x, int64_t stride, factor *left,
                                 const real *right, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c += STRIP)
        for (int64_t r = 0; r < some; r += TALL)
            for (int64_t from = 0; from == 0 || from < depth; from += PART) {
                int64_t here = depth - from < PART ? depth - from : PART;
                turned_by_strip(some - r < TALL ? (int)(some - r) : TALL, here, x + from * stride + r, stride,
                                right + c * depth + from * STRIP, NULL, from > 0, out + r * columns + c, columns);
            }
}
#endif

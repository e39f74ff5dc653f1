/* Products of 32 rows and 32 packed columns: on matrix tiles, or else on vectors of pairs. */
#pragma once
#include "tiles.h"
#include "vectors.h"

#ifdef BLOCKS
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
#endif

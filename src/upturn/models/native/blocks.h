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
#define READ_TWO(I) (vec)_mm512_loadu_ps((I ? right2 : right) + j * DEPTH)
#define ADD_TWO(R)                                                                                                     \
    {                                                                                                                  \
        int32_t pair;                                                                                                  \
        memcpy(&pair, at + R * stride, sizeof pair);                                                                   \
        __m512i one = _mm512_set1_epi32(pair);                                                                         \
        low##R = add_pairs(low##R, one, left), high##R = add_pairs(high##R, one, other);                               \
    }

#define PUT_TWO(R) put_sum(sums + R * columns, low##R, 0), put_sum(sums + R * columns + LANES, high##R, 0);

/* Eight rows of a left factor. */
static inline void eight_rows(int64_t tiles, const real *x, int64_t step, int64_t stride, const real *right,
                              const real *right2, float *sums, int64_t columns) {
    FOR_8(BEGIN_SUMS)
    for (int64_t j = 0; j < tiles * SIDE; j++) {
        const real *at = x + j / SIDE * step + j % SIDE * PAIR;
        vec left = READ_TWO(0), other = READ_TWO(1);
        HELD_IN_REGISTER(left);
        HELD_IN_REGISTER(other);
        FOR_8(ADD_TWO)
    }
    FOR_8(PUT_TWO)
}
#endif

/* 32 rows, in two times 16 with rows `stride` and tiles `step` apart, times 32 packed columns in two strips -> out, rows
 * `columns` apart. Of the rows `some` are wanted. */
static inline void block_product(int64_t some, int64_t tiles, const real *x, const real *x2, int64_t step,
                                 int64_t stride, const real *right, const real *right2, float *out, int64_t columns) {
#ifdef TILES
    sum_up(tiles, x, x2, step, stride, right, right2);
    put_sums(out, columns);
#else
    for (int64_t r = 0; r < some; r += 8)
        eight_rows(tiles, (r < SIDE ? x : x2 - SIDE * stride) + r * stride, step, stride, right, right2,
                   out + r * columns, columns);
#endif
}
#endif

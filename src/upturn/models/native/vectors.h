/* Products of packed factors on plain vectors, near the peak of processors with AVX2 or AVX-512.
 *
 * A left factor is read as floats, number by number of the depth; a right one lies in strips of columns. Six rows times
 * two vectors of columns keep both multipliers busy: 12 sums, and 3 registers for what comes in.
 */
#pragma once
#include "vec.h"

enum { TALL = 6, STRIP = 2 * LANES, PART = 256 };

/* Rows `first` to `first` + 5 of x (number j of row i at i * row + j * column) -> block [depth, 6]; 0 beyond n. */
static inline void pack_block(int64_t n, int64_t depth, int64_t first, const real *x, int64_t row, int64_t column,
                              float *block) {
    int64_t some = n - first < TALL ? n - first : TALL;
    x += first * row;
    if (some < TALL) memset(block, 0, (size_t)(depth * TALL) * sizeof(float));
    if (row == 1) {
        for (int64_t j = 0; j < depth; j++)
            for (int64_t r = 0; r < some; r++) block[j * TALL + r] = load(x[j * column + r]);
    } else {
        for (int64_t r = 0; r < some; r++)
            for (int64_t j = 0; j < depth; j++) block[j * TALL + r] = load(x[r * row + j * column]);
    }
}

/* Columns `first` to `first` + STRIP - 1 of y (number j of column i at i * column + j * row) -> strip [depth, STRIP];
 * 0 beyond n. */
static inline void pack_strip(int64_t n, int64_t depth, int64_t first, const real *y, int64_t row, int64_t column,
                              real *strip) {
    enum { NEAR = 32 }; /* so that a few lines are read and written at a time */
    int64_t some = n - first < STRIP ? n - first : STRIP;
    if (some < 0) some = 0;
    y += first * column;
    if (some < STRIP) memset(strip, 0, (size_t)(depth * STRIP) * sizeof(real));
    if (column == 1) {
        for (int64_t j = 0; j < depth; j++) memcpy(strip + j * STRIP, y + j * row, (size_t)some * sizeof(real));
    } else {
        for (int64_t from = 0; from < depth; from += NEAR)
            for (int64_t c = 0; c < some; c++)
                for (int64_t j = from; j < depth && j < from + NEAR; j++) strip[j * STRIP + c] = y[c * column + j * row];
    }
}

/* A vector that was read, so that it is not read again in every product. */
#if defined __x86_64__
#define HELD_IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define HELD_IN_REGISTER(x)
#endif

/* A sum that begins, or goes on. */
static inline void put_sum(float *to, vec x, int64_t from) {
    if (from) x += load_floats(to);
    memcpy(to, &x, sizeof x);
}

/* Named sums and no arrays of them: these a compiler would keep in memory. */
#define FOR_1(DO) DO(0)
#define FOR_2(DO) FOR_1(DO) DO(1)
#define FOR_3(DO) FOR_2(DO) DO(2)
#define FOR_4(DO) FOR_3(DO) DO(3)
#define FOR_5(DO) FOR_4(DO) DO(4)
#define FOR_6(DO) FOR_5(DO) DO(5)
#define BEGIN_SUMS(R) vec low##R = {0}, high##R = {0};
#define ADD_TO_SUMS(R)                                                                                                 \
    {                                                                                                                  \
        vec one = every(x[R * row + j * column]);                                                                      \
        low##R += one * left, high##R += one * right;                                                                  \
    }
#define PUT_SUMS(R) put_sum(sums + R * stride, low##R, from), put_sum(sums + R * stride + LANES, high##R, from);
#define CASE_OF_ROWS(N)                                                                                                \
    case N: {                                                                                                          \
        FOR_##N(BEGIN_SUMS) for (int64_t j = from; j < to; j++) {                                                      \
            vec left = load_vec(strip + j * step), right = load_vec(strip + j * step + LANES);                         \
            HELD_IN_REGISTER(left);                                                                                    \
            HELD_IN_REGISTER(right);                                                                                   \
            FOR_##N(ADD_TO_SUMS)                                                                                       \
        }                                                                                                              \
        FOR_##N(PUT_SUMS)                                                                                              \
    } break;

/* Up to 6 rows of x (number j of row i at i * row + j * column) times a strip with lines `step` apart -> sums, rows
 * `stride` apart. Each is summed in one order, so no row depends on the others; in parts, since long sums round badly.
 * Parts end where `place`, that of the first number, says: so it does not matter where a sum begins with zeros. */
static inline __attribute__((always_inline)) void rows_by_strip(int rows, int64_t place, int64_t depth, const float *x,
                                                                int64_t row, int64_t column, const real *strip,
                                                                int64_t step, float *sums, int64_t stride) {
    int64_t from = 0, to;
    do {
        to = from + PART - (place + from) % PART;
        to = to < depth ? to : depth;
        switch (rows) {
            CASE_OF_ROWS(1)
            CASE_OF_ROWS(2)
            CASE_OF_ROWS(3)
            CASE_OF_ROWS(4)
            CASE_OF_ROWS(5)
            CASE_OF_ROWS(6)
        }
    } while ((from = to) < depth);
}

/* The first `rows` rows of a block times a packed strip. */
static inline void block_by_strip(int rows, int64_t depth, const float *block, const real *strip, float *sums,
                                  int64_t stride) {
    rows_by_strip(rows, 0, depth, block, 1, TALL, strip, STRIP, sums, stride);
}

/* Products of packed factors on plain vectors, near the peak of processors with AVX2 or AVX-512.
 *
 * A left factor lies in blocks of rows, a right one in strips of columns. Six rows times two vectors of columns keep all
 * multipliers busy, with 12 sums and 3 registers for what comes in; twelve rows, where there are so many registers, read a
 * strip half as often. Numbers become floats on the way, but where there are instructions for bfloat16 (PAIRS) two of the
 * depth are multiplied at once, and lie side by side.
 */
#pragma once
#include "vec.h"

#if defined BF16 && defined __AVX512BF16__
#define PAIRS
typedef real factor;
enum { PAIR = 2 };

static inline factor as_factor(real x) { return x; }
#else
typedef float factor;
enum { PAIR = 1 };

static inline factor as_factor(real x) { return load(x); }
#endif

#ifdef __AVX512F__
enum { TALL = 12 };
#else
enum { TALL = 6 };
#endif
/* NEAR_BLOCKS blocks keep their sums near; a strip that more than OFTEN of them read becomes floats first. */
enum { STRIP = 2 * LANES, PART = 256, NEAR_BLOCKS = 24, OFTEN = 3 };

/* Rows `first` to `first` + TALL - 1 of x (number j of row i at i * row + j * column) -> block: part by part of the depth,
 * in each number by number, or with PAIRS row by row, a multiple of PAIR long. What lies beyond n is not written. */
static inline void pack_block(int64_t n, int64_t depth, int64_t first, const real *x, int64_t row, int64_t column,
                              factor *block) {
    int64_t some = n - first < TALL ? n - first : TALL;
    x += first * row;
    for (int64_t from = 0; from < depth; from += PART, block += TALL * PART) {
        int64_t here = depth - from < PART ? depth - from : PART, wide = up(here, PAIR);
        const int64_t down = PAIR == 1 ? 1 : wide, along = PAIR == 1 ? TALL : 1; /* from row to row, from number to number */
        for (int64_t r = 0; here < wide && r < some; r++) block[r * down + here] = 0;
        if (row == 1) {
            for (int64_t j = 0; j < here; j++)
                for (int64_t r = 0; r < some; r++) block[r * down + j * along] = as_factor(x[(from + j) * column + r]);
        } else {
            for (int64_t r = 0; r < some; r++)
                for (int64_t j = 0; j < here; j++)
                    block[r * down + j * along] = as_factor(x[r * row + (from + j) * column]);
        }
    }
}

/* Columns `first` to `first` + STRIP - 1 of y (number j of column i at i * column + j * row) -> strip
 * [depth / PAIR, STRIP, PAIR]; 0 beyond n and the depth. */
static inline void pack_strip(int64_t n, int64_t depth, int64_t first, const real *y, int64_t row, int64_t column,
                              real *strip) {
    enum { NEAR = 32 }; /* so that a few lines are read and written at a time */
    int64_t some = n - first < STRIP ? n - first : STRIP;
    if (some < 0) some = 0;
    y += first * column;
    if (some < STRIP || depth % PAIR) memset(strip, 0, (size_t)(up(depth, PAIR) * STRIP) * sizeof(real));
    if (column == 1 && PAIR == 1) {
        for (int64_t j = 0; j < depth; j++) memcpy(strip + j * STRIP, y + j * row, (size_t)some * sizeof(real));
    } else {
        for (int64_t from = 0; from < depth; from += NEAR)
            for (int64_t c = 0; c < some; c++)
                for (int64_t j = from; j < depth && j < from + NEAR; j++)
                    strip[(j / PAIR * STRIP + c) * PAIR + j % PAIR] = y[c * column + j * row];
    }
}

/* A vector that was read, so that it is not read again in every product. */
#ifdef HELD_IN_REGISTER /* by who stands in for the instructions */
#elif defined __AVX512F__
#define HELD_IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined __x86_64__
#define HELD_IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define HELD_IN_REGISTER(x)
#endif

/* A sum that begins, or goes on. */
static inline void put_sum(float *to, vec x, int adds) {
    if (adds) x += load_floats(to);
    memcpy(to, &x, sizeof x);
}

#ifdef PAIRS
#define UNROLLED /* not measured */
#else
#define UNROLLED _Pragma("GCC unroll 4")
#endif

/* n numbers, a multiple of LANES, as floats. */
static inline void widen(int64_t n, const real *x, float *to) {
    for (int64_t j = 0; j < n; j += LANES) put_sum(to + j, load_vec(x + j), 0);
}

/* Named sums and no arrays of them: these a compiler would keep in memory. */
#define FOR_1(DO) DO(0)
#define FOR_2(DO) FOR_1(DO) DO(1)
#define FOR_3(DO) FOR_2(DO) DO(2)
#define FOR_4(DO) FOR_3(DO) DO(3)
#define FOR_5(DO) FOR_4(DO) DO(4)
#define FOR_6(DO) FOR_5(DO) DO(5)
#define FOR_7(DO) FOR_6(DO) DO(6)
#define FOR_8(DO) FOR_7(DO) DO(7)
#define FOR_9(DO) FOR_8(DO) DO(8)
#define FOR_10(DO) FOR_9(DO) DO(9)
#define FOR_11(DO) FOR_10(DO) DO(10)
#define FOR_12(DO) FOR_11(DO) DO(11)
#define BEGIN_SUMS(R) vec low##R = {0}, high##R = {0};
#define PUT_SUMS(R) put_sum(sums + R * stride, low##R, adds), put_sum(sums + R * stride + LANES, high##R, adds);
#define CASE_OF_ROWS(N, READ, ADD)                                                                                     \
    case N: {                                                                                                          \
        FOR_##N(BEGIN_SUMS) UNROLLED for (int64_t j = 0; j < depth; j++) {                                             \
            vec left = READ(0), right = READ(1);                                                                       \
            HELD_IN_REGISTER(left);                                                                                    \
            HELD_IN_REGISTER(right);                                                                                   \
            FOR_##N(ADD)                                                                                               \
        }                                                                                                              \
        FOR_##N(PUT_SUMS)                                                                                              \
    } break;
#define SIX_CASES(READ, ADD, A, B, C, D, E, F)                                                                          \
    CASE_OF_ROWS(A, READ, ADD)                                                                                         \
    CASE_OF_ROWS(B, READ, ADD)                                                                                         \
    CASE_OF_ROWS(C, READ, ADD)                                                                                         \
    CASE_OF_ROWS(D, READ, ADD)                                                                                         \
    CASE_OF_ROWS(E, READ, ADD)                                                                                         \
    CASE_OF_ROWS(F, READ, ADD)
#ifdef __AVX512F__
#define ALL_CASES(READ, ADD) SIX_CASES(READ, ADD, 1, 2, 3, 4, 5, 6) SIX_CASES(READ, ADD, 7, 8, 9, 10, 11, 12)
#else
#define ALL_CASES(READ, ADD) SIX_CASES(READ, ADD, 1, 2, 3, 4, 5, 6)
#endif
#define READ_VEC(I) load_vec(strip + j * step + I * LANES)
#define ADD_TO_SUMS(R)                                                                                                 \
    {                                                                                                                  \
        vec one = every(x[R * row + j]);                                                                               \
        low##R += one * left, high##R += one * right;                                                                  \
    }

/* Up to TALL rows of x, `row` apart, times a strip with lines `step` apart -> sums, rows `stride` apart; or added to them.
 */
static inline __attribute__((always_inline)) void part_by_strip(int rows, int64_t depth, const float *x, int64_t row,
                                                                const real *strip, int64_t step, int adds, float *sums,
                                                                int64_t stride) {
    switch (rows) { ALL_CASES(READ_VEC, ADD_TO_SUMS) }
}

/* The same for any depth. Each row is summed in one order, so none depends on the others; in parts, since long sums
 * round badly. Parts end where `place`, that of the first number, says: it does not matter where a sum begins with zeros.
 */
static inline void rows_by_strip(int rows, int64_t place, int64_t depth, const float *x, int64_t row, const real *strip,
                                 int64_t step, float *sums, int64_t stride) {
    int64_t from = 0, to;
    do {
        to = from + PART - (place + from) % PART;
        to = to < depth ? to : depth;
        part_by_strip(rows, to - from, x + from, row, strip + from * step, step, from > 0, sums, stride);
    } while ((from = to) < depth);
}

#ifdef PAIRS
static inline vec add_pairs(vec sums, __m512i one, vec other) {
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)one, (__m512bh)other);
}

#define READ_PAIRS(I) (vec)_mm512_loadu_ps(strip + (2 * j + I) * STRIP)
#define ADD_PAIRS(R)                                                                                                   \
    {                                                                                                                  \
        int32_t pair;                                                                                                  \
        memcpy(&pair, block + R * row + j * PAIR, sizeof pair);                                                        \
        __m512i one = _mm512_set1_epi32(pair);                                                                         \
        low##R = add_pairs(low##R, one, left), high##R = add_pairs(high##R, one, right);                               \
    }

/* One part of a block, `depth` pairs deep, times a packed strip. `row` is 2 * depth: told, since that is 5% faster. */
static inline void pairs_by_strip(int rows, int64_t depth, const factor *block, int64_t row, const real *strip,
                                  int adds, float *sums, int64_t stride) {
    switch (rows) { ALL_CASES(READ_PAIRS, ADD_PAIRS) }
}
#endif

#define READ_FLOATS(I) load_floats(floats + j * STRIP + I * LANES)
#define ADD_TURNED(R)                                                                                                  \
    {                                                                                                                  \
        vec one = every(x[j * row + R]);                                                                               \
        low##R += one * left, high##R += one * right;                                                                  \
    }

/* As `part_by_strip`, with columns of x [depth, row] for its rows, and a packed strip: that of `floats` where it is there. */
static inline __attribute__((always_inline)) void turned_by_strip(int rows, int64_t depth, const float *x, int64_t row,
                                                                  const real *strip, const float *floats, int adds,
                                                                  float *sums, int64_t stride) {
    enum { step = STRIP };
    if (floats) {
        switch (rows) { ALL_CASES(READ_FLOATS, ADD_TURNED) }
    } else {
        switch (rows) { ALL_CASES(READ_VEC, ADD_TURNED) }
    }
}

/* The first `rows` rows of blocks that lie one behind the other times a packed strip, each as in `rows_by_strip`. Where
 * strips come from far away, what lies behind a part is asked for meanwhile: it is wanted next. */
static inline void blocks_by_strip(int64_t rows, int64_t depth, const factor *blocks, const real *strip, int far,
                                   float *sums, int64_t stride) {
    int64_t size = up(depth, PAIR) * TALL;
#ifdef PAIRS
    for (int64_t r = 0; r < rows; r += TALL, blocks += size, sums += TALL * stride)
        for (int64_t from = 0; from == 0 || from < depth; from += PART) {
            int64_t here = depth - from < PART ? depth - from : PART, wide = up(here, PAIR);
            pairs_by_strip(rows - r < TALL ? (int)(rows - r) : TALL, wide / 2, blocks + from * TALL, wide,
                           strip + from * STRIP, from > 0, sums, stride);
        }
#else
    for (int64_t from = 0; from == 0 || from < depth; from += PART) {
        int64_t here = depth - from < PART ? depth - from : PART;
        const factor *block = blocks + from * TALL;
        const real *part = strip + from * STRIP;
        float floats[PART * STRIP] __attribute__((aligned(64)));
        int often = sizeof(real) < sizeof(float) && rows > OFTEN * TALL;
        if (often) widen(here * STRIP, part, floats);
        const char *next = (const char *)(part + PART * STRIP);
        int64_t lines = often && far ? PART * STRIP * (int64_t)sizeof(real) / 64 / (rows / TALL) + 1 : 0;
        for (int64_t r = 0; r < rows; r += TALL, block += size) {
            for (int64_t l = 0; l < lines; l++, next += 64) __builtin_prefetch(next, 0, 2);
            turned_by_strip(rows - r < TALL ? (int)(rows - r) : TALL, here, block, TALL, part, often ? floats : NULL,
                            from > 0, sums + r * stride, stride);
        }
    }
#endif
}

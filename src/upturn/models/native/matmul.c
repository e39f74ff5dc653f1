/* Products of a training in bfloat16 for processors that have no instruction for them (most with AVX2, or AVX-512 before
 * Zen 4 and Sapphire Rapids): torch takes two to ten times as long there.
 */
#include "vectors.h"

#if defined BF16 && defined __AVX2__
enum { HELD = 1 << 19, PACKED = 1 << 22, NEAR = 1 << 21 };

int has_matmul(void) { return 1; }

/* A row of sums, plus bias or what is there already, to its place. */
static inline void put(int64_t some, const float *sums, const real *bias, int adds, real *out) {
    for (int64_t j = 0; j < some; j += LANES) {
        vec x = load_floats(sums + j);
        if (bias) x += load_some(bias + j, some - j);
        if (adds) x += load_some(out + j, some - j);
        store_some(out + j, x, some - j);
    }
}

/* x [m, depth] times y [depth, n], plus bias [n] if there is one -> out [m, n], or added to it. Number j of row i of x
 * is at i * x_row + j * x_column, and so on; rows of out are `out_row` apart. Returns 1 where memory is short. */
int matmul(int64_t m, int64_t n, int64_t depth, const real *x, int64_t x_row, int64_t x_column, const real *y,
           int64_t y_row, int64_t y_column, const real *bias, int64_t adds, real *out, int64_t out_row) {
    int64_t blocks = (m + TALL - 1) / TALL, strips = (n + STRIP - 1) / STRIP;
    int64_t size = up(depth, PAIR) * TALL, strip = up(depth, PAIR) * STRIP, bytes = size * (int64_t)sizeof(factor);
    int64_t most = PACKED / (bytes + 1) + 1; /* blocks that are packed at a time */
    most = most < blocks ? most : blocks;
    int far = strips * strip * (int64_t)sizeof(real) > NEAR; /* of near ones it would be lost labour */
    factor *left = aligned_alloc(64, (size_t)up(most * bytes + 1, 64));
    real *right = aligned_alloc(64, (size_t)up(strips * strip * (int64_t)sizeof(real) + 1, 64));
    if (left && right) {
#pragma omp parallel if (m * n * depth > 65536)
        {
            float sums[NEAR_BLOCKS * TALL * STRIP] __attribute__((aligned(64)));
#pragma omp for schedule(static)
            for (int64_t s = 0; s < strips; s++)
                pack_strip(n, depth, s * STRIP, y, y_row, y_column, right + s * strip);
            for (int64_t first = 0; first < blocks; first += most) {
                int64_t here = blocks - first < most ? blocks - first : most;
                int64_t parts = here * bytes / HELD + 1, least = (here + NEAR_BLOCKS - 1) / NEAR_BLOCKS;
                parts = parts > least ? parts : least; /* of so many rows each that they and their sums stay near */
                parts = parts < here ? parts : here;
#pragma omp for schedule(static)
                for (int64_t b = 0; b < here; b++)
                    pack_block(m, depth, (first + b) * TALL, x, x_row, x_column, left + b * size);
#pragma omp for schedule(dynamic, 2)
                for (int64_t task = 0; task < parts * strips; task++) {
                    int64_t p = task / strips, s = task % strips, some = n - s * STRIP < STRIP ? n - s * STRIP : STRIP;
                    int64_t b = p * here / parts, row = (first + b) * TALL, rows = ((p + 1) * here / parts - b) * TALL;
                    rows = m - row < rows ? m - row : rows;
                    blocks_by_strip(rows, depth, left + b * size, right + s * strip, far, sums, STRIP);
                    for (int64_t r = 0; r < rows; r++)
                        put(some, sums + r * STRIP, bias ? bias + s * STRIP : NULL, (int)adds,
                            out + (row + r) * out_row + s * STRIP);
                }
            }
        }
    }
    int failed = !left || !right;
    free(left);
    free(right);
    return failed;
}
#else
int has_matmul(void) { return 0; }

int matmul(int64_t m, int64_t n, int64_t depth, const real *x, int64_t x_row, int64_t x_column, const real *y,
           int64_t y_row, int64_t y_column, const real *bias, int64_t adds, real *out, int64_t out_row) {
    return 1;
}
#endif

/* The gradient of a weight, g^T x in bfloat16 with float sums, on the matrix tiles of a processor with AMX.
 *
 * Both factors lie the wrong way for any matrix product: their sums run over rows. A general one turns them around at
 * less than half its speed; here they are packed into tiles once. Other processors get 1 back, and use the general one.
 */
#include "tiles.h"

#ifdef TILES
enum { HELD = 1 << 19 };

/* 32 x 32 numbers of the result from two panels of tiles each way. */
static inline void block(int64_t depth, const real *left, const real *right, float *sums, int64_t stride, real *out) {
    sum_up(depth, left, left + depth * TILE, TILE, DEPTH, right, right + depth * TILE);
    put_sums(sums, 32);
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 32; j++) out[i * stride + j] = store(sums[i * 32 + j]);
}

/* g [n, o], x [n, i], rows strides apart -> out [o, i]; o and i are multiples of 32. Returns 1 where it cannot. */
int columns_product(int64_t n, int64_t o, int64_t i, int64_t g_stride, int64_t x_stride, const real *g, const real *x,
                    real *out) {
    if (!tiles_allowed() || o % 32 || i % 32 || !n) return 1;
    int64_t depth = (n + DEPTH - 1) / DEPTH, strip = depth * TILE, blocks = o / 32;
    int64_t held = HELD / (2 * strip) + 1, threads = omp_get_max_threads(), parts = (blocks + held - 1) / held;
    parts = (parts + threads - 1) / threads * threads; /* all threads end together */
    real *right = aligned_alloc(64, (size_t)(strip * (i / SIDE)) * sizeof(real));
    if (!right) return 1;
    int failed = 0;
#pragma omp parallel
    {
        real *left = aligned_alloc(64, (size_t)(2 * (held + 1) * strip) * sizeof(real));
        float sums[32 * 32] __attribute__((aligned(64)));
        if (!left) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < i / 32; c++) pack_right(n, x_stride, x + c * 32, 2, right + 2 * c * strip);
        take_tiles();
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            int64_t first = part * blocks / parts, last = (part + 1) * blocks / parts;
            for (int64_t r = first; left && r < last; r++)
                pack_left(n, g_stride, g + r * 32, 2, left + 2 * (r - first) * strip);
            for (int64_t c = 0; left && c < i / 32; c++)
                for (int64_t r = first; r < last; r++) {
                    const real *rows = left + 2 * (r - first) * strip, *columns = right + 2 * c * strip;
                    block(depth, rows, columns, sums, i, out + r * 32 * i + c * 32);
                }
        }
        _tile_release();
        free(left);
    }
    free(right);
    return failed;
}
#else
int columns_product(int64_t n, int64_t o, int64_t i, int64_t g_stride, int64_t x_stride, const real *g, const real *x,
                    real *out) {
    return 1;
}
#endif

/* Matrix tiles of processors with AMX: 16 rows of 64 bytes, eight of them. TILES says whether they can be compiled for.
 *
 * A product of tiles is left [16, 32] times right [32, 16] (`pairs.h`), sums [16, 16] in float.
 */
#pragma once
#include "pairs.h"

#if defined PAIR_TILES && defined __AMX_BF16__ && defined __linux__
#define TILES
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_layout;

/* Linux lends tiles to a process on demand. */
static inline int tiles_allowed(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = !syscall(SYS_arch_prctl, 0x1023, 18);
    return allowed;
}

/* Before a thread uses tiles; _tile_release() when it is done. */
static inline void take_tiles(void) {
    /* static: some compilers believe that the instruction reads its first eight bytes only */
    static const tile_layout shape = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}

/* Four sums of tiles, 32 rows by 32 columns, begin at 0. What was written before must be there for the loads that
 * follow: for some compilers these do not read memory. */
static inline void begin_sums(void) {
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* To 32 rows of numbers. */
static inline void put_sums(float *out, int64_t columns) {
    _tile_stored(0, out, columns * 4);
    _tile_stored(1, out + SIDE, columns * 4);
    _tile_stored(2, out + SIDE * columns, columns * 4);
    _tile_stored(3, out + SIDE * columns + SIDE, columns * 4);
}

/* 32 rows, in two times 16 with rows `stride` and tiles `step` apart, times 32 packed columns in two strips. */
static inline void sum_up(int64_t tiles, const real *x, const real *x2, int64_t step, int64_t stride, const real *right,
                          const real *right2) {
    begin_sums();
    for (int64_t t = 0; t < tiles; t++) {
        _tile_loadd(4, x + t * step, stride * 2);
        _tile_loadd(6, right + t * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right2 + t * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x2 + t * step, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
#else
static inline int tiles_allowed(void) { return 0; }
#endif

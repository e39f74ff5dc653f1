/* Matrix tiles of processors with AMX: 16 rows of 64 bytes, eight of them. TILES says whether they can be compiled for.
 *
 * A product of tiles is left [16, 32] times right [32, 16], sums [16, 16] in float. The right one lies with pairs of
 * rows interleaved: 16 rows of 16 pairs.
 */
#pragma once
#include "real.h"

#if defined BF16 && defined __AMX_BF16__ && defined __AVX512BF16__ && defined __AVX512BW__ && defined __AVX512VL__ &&     \
    defined __linux__
#define TILES
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, PANEL = 2 * SIDE, DEPTH = 32, TILE = SIDE * DEPTH };

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

/* 16 rows of 16 pairs become columns. */
static inline void transpose(__m512i *a) {
    __m512i b[SIDE];
    for (int r = 0; r < SIDE; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < SIDE; r += 4)
        for (int i = 0; i < 2; i++) {
            a[r + 2 * i] = _mm512_unpacklo_epi64(b[r + i], b[r + i + 2]);
            a[r + 2 * i + 1] = _mm512_unpackhi_epi64(b[r + i], b[r + i + 2]);
        }
    for (int r = 0; r < SIDE; r += 8)
        for (int i = 0; i < 4; i++) {
            b[r + i] = _mm512_shuffle_i32x4(a[r + i], a[r + i + 4], 0x88);
            b[r + i + 4] = _mm512_shuffle_i32x4(a[r + i], a[r + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    }
}

/* 16 rows of x by 32 columns as the right factor of a product that sums over the columns; what lies beyond `rows` is 0. */
static inline void pack_rows(int64_t rows, int64_t stride, const real *x, real *tile) {
    __m512i pairs[SIDE];
    for (int64_t r = 0; r < SIDE; r++)
        pairs[r] = r < rows ? _mm512_loadu_si512(x + r * stride) : _mm512_setzero_si512();
    transpose(pairs);
    for (int r = 0; r < SIDE; r++) _mm512_store_si512(tile + r * DEPTH, pairs[r]);
}

/* Two rows of 16 numbers, side by side pair by pair. */
static inline __m512i pairs(const real *x, int64_t stride, int64_t rows, int64_t r) {
    __m512i low = _mm512_setzero_si512(), high = low;
    if (r < rows) low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + r * stride)));
    if (r + 1 < rows) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + (r + 1) * stride)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* `count` strips of x [n, .], 16 columns each, as right factors of a product that sums over the rows: per strip n / 32
 * tiles, pairs of rows interleaved, and the next strip behind them. */
static inline void pack_right(int64_t n, int64_t stride, const real *x, int64_t count, real *tiles) {
    int64_t strip = up(n, DEPTH) * SIDE;
    for (int64_t t = 0; t < n; t += DEPTH, tiles += TILE)
        for (int r = 0; r < SIDE; r++)
            for (int64_t s = 0; s < count; s++)
                _mm512_store_si512(tiles + s * strip + r * DEPTH, pairs(x + s * SIDE, stride, n, t + 2 * r));
}

/* The same columns as left factors, transposed. */
static inline void pack_left(int64_t n, int64_t stride, const real *x, int64_t count, real *tiles) {
    int64_t strip = up(n, DEPTH) * SIDE;
    for (int64_t t = 0; t < n; t += DEPTH, tiles += TILE)
        for (int64_t s = 0; s < count; s++) {
            __m512i rows[SIDE];
            for (int r = 0; r < SIDE; r++) rows[r] = pairs(x + s * SIDE, stride, n, t + 2 * r);
            transpose(rows);
            for (int r = 0; r < SIDE; r++) _mm512_store_si512(tiles + s * strip + r * DEPTH, rows[r]);
        }
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
#endif

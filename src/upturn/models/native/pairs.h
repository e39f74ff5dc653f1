/* Factors of products that sum two numbers of bfloat16 at a time, packed: what matrix tiles take, and what vectors of pairs
 * read in one line after the other. PAIR_TILES says whether the processor has such instructions.
 *
 * A tile is left [16, 32] or right [32, 16]. The right one lies with pairs of rows interleaved: 16 rows of 16 pairs.
 */
#pragma once
#include "real.h"

#if defined BF16 && defined __AVX512BF16__ && defined __AVX512BW__ && defined __AVX512VL__
#define PAIR_TILES

enum { SIDE = 16, PANEL = 2 * SIDE, DEPTH = 32, TILE = SIDE * DEPTH };

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
#endif

/* Numbers of both types: what the kernels share.
 *
 * Compiled once for float and once for bfloat16 (-DBF16); sums are float in both.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef BF16
typedef uint16_t real;

static inline float load(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline real store(float x) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (real)0x7fc0 : (real)rounded;
}
#else
typedef float real;

static inline float load(real x) { return x; }

static inline real store(float x) { return x; }
#endif

int omp_get_max_threads(void); /* not every compiler comes with omp.h */

/* To a multiple of `step`. */
static inline int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

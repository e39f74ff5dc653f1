/* As many numbers at once as a register holds, of both types: loads, stores, and the exponential. */
#pragma once
#include "real.h"

/* Longer vectors than registers would do anywhere, but compilers keep them in memory. */
#ifdef __AVX512F__
enum { LANES = 16 };
#elif defined __AVX2__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* The lanes of `one` where `which` is all ones, else those of `other`. */
static inline vec chosen(lanes which, vec one, vec other) {
    return (vec)(((lanes)one & which) | ((lanes)other & ~which));
}

/* Some of the lanes, as the processor names them, and a choice by that. */
#if defined __AVX512BW__ && defined __AVX512VL__
typedef __mmask16 some_lanes;

static inline vec where(some_lanes which, vec one, vec other) {
    return (vec)_mm512_mask_mov_ps((__m512)other, which, (__m512)one);
}

/* Those whose byte is not 0, of the first `some`. */
static inline some_lanes not_zero(const uint8_t *bytes, int64_t some) {
    if (some <= 0) return 0;
    __m128i found = _mm_maskz_loadu_epi8(some < LANES ? (1u << some) - 1 : 0xffff, bytes);
    return _mm_test_epi8_mask(found, found);
}
#else
typedef lanes some_lanes;

static inline vec where(some_lanes which, vec one, vec other) { return chosen(which, one, other); }

static inline some_lanes not_zero(const uint8_t *bytes, int64_t some) {
    lanes out = {0};
#if defined __AVX2__ && !defined __AVX512F__
    if (some >= LANES)
        return (lanes)_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)), (__m256i)out);
#endif
    for (int64_t i = 0; i < LANES && i < some; i++) out[i] = -(int32_t)(bytes[i] != 0);
    return out;
}
#endif

/* x in every lane. */
static inline vec every(float x) {
#ifdef __AVX512F__
    return (vec)_mm512_set1_ps(x);
#elif defined __AVX2__
    return (vec)_mm256_set1_ps(x);
#else
    return (vec){x, x, x, x};
#endif
}

static inline vec load_vec(const real *x) {
    vec out;
#ifndef BF16
    memcpy(&out, x, sizeof out);
#elif defined __AVX512F__ /* the compiler makes four instructions of the other way */
    out = (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#elif defined __AVX2__
    out = (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#else
    for (int i = 0; i < LANES; i++) out[i] = load(x[i]);
#endif
    return out;
}

static inline vec load_floats(const float *x) {
    vec out;
    memcpy(&out, x, sizeof out);
    return out;
}

#ifdef BF16
/* Bits of the nearest bfloat16 in the lower half of each lane, as `store` rounds. */
static inline lanes nearest(vec x) {
    lanes bits = (lanes)x, rounded = bits + (0x7fff + ((bits >> 16) & 1)), is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return (lanes)chosen(is_nan, (vec)((lanes){0} + 0x7fc0), (vec)((rounded >> 16) & 0xffff));
}
#endif

static inline void store_vec(real *to, vec x) {
#ifndef BF16
    memcpy(to, &x, sizeof x);
#elif defined __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)nearest(x)));
#elif defined __AVX2__
    __m256i halves = _mm256_packus_epi32((__m256i)nearest(x), (__m256i)nearest(x));
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xd8)));
#else
    for (int i = 0; i < LANES; i++) to[i] = store(x[i]);
#endif
}

/* What is left of x after it was kept as a `real`. */
static inline vec kept_vec(vec x) {
#ifndef BF16
    return x;
#elif defined __AVX512BF16__
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    return (vec)(nearest(x) << 16);
#endif
}

/* 1 / x to the last place; a division takes as long as all the rest of a SiLU. */
static inline vec inverse(vec x) {
#ifdef __AVX512F__
    vec guess = (vec)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

static inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline float greatest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static inline vec greater(vec x, vec y) { return chosen(x > y, x, y); }

static inline vec between(vec x, float least, float most) {
    vec low = every(least), high = every(most);
    return chosen(x < low, low, chosen(x > high, high, x));
}

/* e^x to 2 units in the last place, as if x lay between -87 and 88. */
static inline vec exp_vec(vec x) {
    x = between(x, -87.0f, 88.0f);
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the nearest whole number */
    lanes exponent = (lanes)n - 0x4b400000;
    n -= 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = 1.3981999507e-3f + 1.9875691500e-4f * r;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((exponent + 127) << 23);
}

/* The first `some` numbers of a row that may end within a vector; what lies behind them is 0. */
static inline vec load_some(const real *x, int64_t some) {
    if (some >= LANES) return load_vec(x);
    real row[LANES] = {0};
    memcpy(row, x, (size_t)some * sizeof(real));
    return load_vec(row);
}

static inline vec load_some_floats(const float *x, int64_t some) {
    if (some >= LANES) return load_floats(x);
    vec out = {0};
    for (int64_t i = 0; i < some; i++) out[i] = x[i];
    return out;
}

/* The first numbers of a row, and the least of numbers behind them. */
static inline vec load_below(const real *x, int64_t some) {
    vec out = load_some(x, some);
    for (int64_t i = some; i < LANES; i++) out[i] = -3e38f;
    return out;
}

static inline void store_some(real *to, vec x, int64_t some) {
    if (some >= LANES) {
        store_vec(to, x);
        return;
    }
    real row[LANES];
    store_vec(row, x);
    memcpy(to, row, (size_t)some * sizeof(real));
}

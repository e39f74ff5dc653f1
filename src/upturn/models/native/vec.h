/* Sixteen numbers at once, of both types: loads, stores, and the exponential. */
#pragma once
#include "real.h"

/* 16 numbers at once, on any machine: compilers split them where registers are shorter. */
enum { LANES = 16 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* The lanes of `one` where `which` is all ones, else those of `other`. */
static inline vec chosen(lanes which, vec one, vec other) {
    return (vec)(((lanes)one & which) | ((lanes)other & ~which));
}

static inline vec load_vec(const real *x) {
    vec out;
#ifndef BF16
    memcpy(&out, x, sizeof out);
#elif defined __AVX512F__ /* the compiler makes four instructions of the other way */
    out = (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#else
    for (int i = 0; i < LANES; i++) out[i] = load(x[i]);
#endif
    return out;
}

static inline void store_vec(real *to, vec x) {
#ifndef BF16
    memcpy(to, &x, sizeof x);
#elif defined __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    for (int i = 0; i < LANES; i++) to[i] = store(x[i]);
#endif
}

/* What is left of x after it was kept as a `real`. */
static inline vec kept_vec(vec x) {
#if defined BF16 && defined __AVX512BF16__
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    real bits[LANES];
    store_vec(bits, x);
    return load_vec(bits);
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

static inline vec between(vec x, float least, float most) {
    vec low = (vec){0} + least, high = (vec){0} + most;
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

static inline void store_some(real *to, vec x, int64_t some) {
    if (some >= LANES) {
        store_vec(to, x);
        return;
    }
    real row[LANES];
    store_vec(row, x);
    memcpy(to, row, (size_t)some * sizeof(real));
}

/* What the kernels use of AVX-512 and its bfloat16, one number at a time, so that their code runs on any processor. */
#pragma once
#include <stdint.h>
#include <string.h>
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef long long __m128i __attribute__((vector_size(16), may_alias));
typedef uint16_t __mmask16;
#define INLINE static inline __attribute__((always_inline))
typedef union {
    __m512 f;
    __m512i i;
    __m512bh h;
    float fs[16];
    int32_t is[16];
    uint32_t us[16];
    int64_t ls[8];
    uint16_t ss[32];
} parts512;
typedef union {
    __m256i i;
    __m256bh h;
    uint16_t ss[16];
} parts256;
typedef union {
    __m128i i;
    uint8_t bs[16];
} parts128;
INLINE __m512 _mm512_loadu_ps(const void *p) {
    parts512 u;
    memcpy(&u, p, 64);
    return u.f;
}
INLINE __m512i _mm512_loadu_si512(const void *p) {
    parts512 u;
    memcpy(&u, p, 64);
    return u.i;
}
INLINE void _mm512_storeu_si512(void *p, __m512i x) { memcpy(p, &x, 64); }
INLINE void _mm512_store_si512(void *p, __m512i x) {
    if ((uintptr_t)p % 64) __builtin_trap();
    memcpy(p, &x, 64);
}
INLINE __m256i _mm256_loadu_si256(const __m256i *p) {
    __m256i x;
    memcpy(&x, p, 32);
    return x;
}
INLINE void _mm256_storeu_si256(__m256i *p, __m256i x) { memcpy(p, &x, 32); }
INLINE __m512 _mm512_set1_ps(float x) {
    parts512 u;
    for (int i = 0; i < 16; i++) u.fs[i] = x;
    return u.f;
}
INLINE __m512i _mm512_set1_epi32(int x) {
    parts512 u;
    for (int i = 0; i < 16; i++) u.is[i] = x;
    return u.i;
}
INLINE __m512i _mm512_setzero_si512(void) {
    parts512 u;
    memset(&u, 0, 64);
    return u.i;
}
INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
INLINE __m512i _mm512_slli_epi32(__m512i a, int n) {
    parts512 u = {.i = a};
    for (int i = 0; i < 16; i++) u.us[i] <<= n;
    return u.i;
}
INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
    parts256 v = {.i = a};
    parts512 u;
    for (int i = 0; i < 16; i++) u.us[i] = v.ss[i];
    return u.i;
}
INLINE __m256i _mm512_cvtepi32_epi16(__m512i a) {
    parts512 u = {.i = a};
    parts256 v;
    for (int i = 0; i < 16; i++) v.ss[i] = (uint16_t)u.us[i];
    return v.i;
}
INLINE uint16_t round_(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    if (!(b & 0x7f800000)) return (b >> 16) & 0x8000;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
INLINE __m256bh _mm512_cvtneps_pbh(__m512 a) {
    parts512 u = {.f = a};
    parts256 v;
    for (int i = 0; i < 16; i++) v.ss[i] = round_(u.fs[i]);
    return v.h;
}
INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 hi, __m512 lo) {
    parts512 a = {.f = lo}, b = {.f = hi}, u;
    for (int i = 0; i < 16; i++) {
        u.ss[i] = round_(a.fs[i]);
        u.ss[16 + i] = round_(b.fs[i]);
    }
    return u.h;
}
INLINE float wide_(uint16_t x) {
    uint32_t b = (uint32_t)x << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
}
INLINE __m512 _mm512_dpbf16_ps(__m512 s, __m512bh a, __m512bh b) {
    parts512 u = {.f = s}, x = {.h = a}, y = {.h = b};
    for (int i = 0; i < 16; i++) {
        u.fs[i] += wide_(x.ss[2 * i + 1]) * wide_(y.ss[2 * i + 1]);
        u.fs[i] += wide_(x.ss[2 * i]) * wide_(y.ss[2 * i]);
    }
    return u.f;
}
INLINE __m512 _mm512_mask_mov_ps(__m512 o, __mmask16 m, __m512 a) {
    parts512 u = {.f = o}, x = {.f = a};
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) u.fs[i] = x.fs[i];
    return u.f;
}
INLINE __m512 _mm512_rcp14_ps(__m512 a) {
    parts512 u = {.f = a};
    for (int i = 0; i < 16; i++) u.fs[i] = 1.0f / u.fs[i] * (1 + 5e-5f);
    return u.f;
}
INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int c) {
    parts512 x = {.i = a}, y = {.i = b}, u;
    for (int k = 0; k < 4; k++) {
        parts512 *s = k < 2 ? &x : &y;
        int from = c >> (2 * k) & 3;
        for (int i = 0; i < 4; i++) u.us[4 * k + i] = s->us[4 * from + i];
    }
    return u.i;
}
/* Two numbers of each four, or one of each two, of both by turns: from the `first` on. */
INLINE __m512i unpacked32(__m512i a, __m512i b, int first) {
    parts512 x = {.i = a}, y = {.i = b}, u;
    for (int i = 0; i < 16; i++) u.us[i] = (i % 2 ? y : x).us[i / 4 * 4 + first + i % 4 / 2];
    return u.i;
}
INLINE __m512i unpacked64(__m512i a, __m512i b, int first) {
    parts512 x = {.i = a}, y = {.i = b}, u;
    for (int i = 0; i < 8; i++) u.ls[i] = (i % 2 ? y : x).ls[i / 2 * 2 + first];
    return u.i;
}
INLINE __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked32(a, b, 0); }
INLINE __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked32(a, b, 2); }
INLINE __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked64(a, b, 0); }
INLINE __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked64(a, b, 1); }
INLINE __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void *p) {
    parts128 w;
    memset(&w, 0, 16);
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) w.bs[i] = ((const uint8_t *)p)[i];
    return w.i;
}
INLINE __mmask16 _mm_test_epi8_mask(__m128i a, __m128i b) {
    parts128 x = {.i = a}, y = {.i = b};
    __mmask16 m = 0;
    for (int i = 0; i < 16; i++) m |= (__mmask16)((x.bs[i] & y.bs[i]) != 0) << i;
    return m;
}
#define _MM_HINT_T1 2
#define _mm_prefetch(p, h) __builtin_prefetch(p)

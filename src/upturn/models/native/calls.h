/* Kernels that are called from other files than their own, where they are explained. */
#pragma once
#include "real.h"

/* New tokens of one slot: `count` of them from place `place` on, in the step from `flat` on. */
typedef struct {
    int64_t slot, flat, place, count;
} run;

void norm(int64_t n, int64_t d, const real *x, const real *y, const real *w, float eps, real *sum, real *out);

void rope(int64_t n, int64_t heads, int64_t d, int64_t stride, real *x, const real *cos, const real *sin, const real *w,
          float eps);

int product(int64_t n, int64_t rows, int64_t depth, const real *x, const real *panels, const real *bias, int64_t gated,
            real *out);

void keep(int64_t n, int64_t heads, int64_t d, int64_t stride, const real *k, const real *v, const int64_t *slot,
          const int64_t *place, int64_t length, int64_t width, real *keys, real *values);

int attend(int64_t n, const run *runs, int64_t heads, int64_t kv_heads, int64_t d, int64_t stride, const real *q,
           int64_t length, int64_t width, const real *keys, const real *values, float scale, float cap, int64_t window,
           real *out);

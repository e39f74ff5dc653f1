/* A decoder layer of generation in one call, from packed weights: with few rows, to call its kernels one by
 * one from outside takes as long as some of them.
 */
#include "calls.h"

/* What does not change: sizes, weights (packed where they are matrices, NULL where there is none), how it attends. */
typedef struct {
    int64_t width, heads, kv_heads, d, wide, window; /* wide: of gate and up together */
    const real *before, *join, *join_bias, *q_norm, *k_norm, *out, *out_bias;
    const real *after, *widen, *widen_bias, *narrow, *narrow_bias;
    float before_eps, after_eps, q_eps, k_eps, scale, cap;
} layer;

/* New tokens: where each goes, their runs as `attend` takes them, and the cache of one layer as `keep` lays it. */
typedef struct {
    int64_t tokens, runs, length, slot_width;
    const int64_t *slot, *place;
    const run *run;
} step;

/* x [tokens, width] -> out, the same; cos and sin [tokens, d]. Returns 1 where memory is short. */
int decoder_layer(const layer *l, const step *s, const real *x, const real *cos, const real *sin, real *keys,
                  real *values, real *out) {
    int64_t n = s->tokens, d = l->d, stride = (l->heads + 2 * l->kv_heads) * d, w = l->width;
    real *scratch = malloc((size_t)(n * (3 * w + stride + l->heads * d + l->wide / 2)) * sizeof(real));
    if (!scratch) return 1;
    real *h = scratch, *added = h + n * w, *middle = added + n * w, *joined = middle + n * w;
    real *attended = joined + n * stride, *wide = attended + n * l->heads * d;
    real *k = joined + l->heads * d, *v = k + l->kv_heads * d;
    norm(n, w, x, NULL, l->before, l->before_eps, NULL, h);
    int failed = product(n, stride, w, h, l->join, l->join_bias, 0, joined);
    rope(n, l->heads, d, stride, joined, cos, sin, l->q_norm, l->q_eps);
    rope(n, l->kv_heads, d, stride, k, cos, sin, l->k_norm, l->k_eps);
    keep(n, l->kv_heads, d, stride, k, v, s->slot, s->place, s->length, s->slot_width, keys, values);
    failed |= attend(s->runs, s->run, l->heads, l->kv_heads, d, stride, joined, s->length, s->slot_width, keys, values,
                     l->scale, l->cap, l->window, attended);
    failed |= product(n, w, l->heads * d, attended, l->out, l->out_bias, 0, added);
    norm(n, w, x, added, l->after, l->after_eps, middle, h);
    failed |= product(n, l->wide, w, h, l->widen, l->widen_bias, 1, wide);
    failed |= product(n, w, l->wide / 2, wide, l->narrow, l->narrow_bias, 0, added);
#pragma omp parallel for simd schedule(static) if (n * w > 16384)
    for (int64_t i = 0; i < n * w; i++) out[i] = store(load(middle[i]) + load(added[i]));
    free(scratch);
    return failed;
}

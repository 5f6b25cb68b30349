/* Row-wise operations on one row: what rows.c does to many and block.c in passing. bf16 in and out, fp32 inside. */
#pragma once
#include <math.h>

#include "tile.h"

INLINE __m512 all(float x) { return _mm512_set1_ps(x); }

/* y = x / rms * w; returns 1 / rms. w is fp32 and holds the offset already. */
INLINE float rms_row(const bf16 *x, long d, const float *w, float eps, bf16 *y) {
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < d; j += 16) {
        const __m512 v = load_bf16(x + j);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const float inverse = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)d + eps);
    for (long j = 0; j < d; j += 16)
        store_bf16(y + j, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + j), all(inverse)), _mm512_loadu_ps(w + j)));
    return inverse;
}

/* The pair (i, i + half) of each head turned by the row's angles, the rest as it is. y may be x. */
INLINE void rotary_row(const bf16 *x, long heads, long d, long half, const float *cosines, const float *sines, float sign, bf16 *y) {
    for (long h = 0; h < heads; h++, x += d, y += d) {
        for (long j = 0; j < half; j += 16) {
            const __m512 a = load_bf16(x + j), b = load_bf16(x + half + j), c = _mm512_loadu_ps(cosines + j);
            const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(sines + j), all(sign));
            store_bf16(y + j, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
            store_bf16(y + half + j, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
        }
        memmove(y + 2 * half, x + 2 * half, (size_t)(d - 2 * half) * 2);
    }
}

/* x sigmoid(k x + e x^3) and its slope: SiLU is k = 1, e = 0; GELU's tanh form is k = 2 sqrt(2/pi), e = 0.044715 k. */
INLINE __m512 smooth(__m512 x, float k, float e, __m512 *slope) {
    const __m512 square = _mm512_mul_ps(x, x), inner = _mm512_fmadd_ps(square, all(e), all(k));
    const __m512 power = exp2_16(_mm512_mul_ps(_mm512_mul_ps(x, inner), all(-LOG2E)));
    const __m512 s = _mm512_div_ps(all(1), _mm512_add_ps(all(1), power));
    const __m512 steep = _mm512_mul_ps(x, _mm512_fmadd_ps(square, all(3 * e), all(k)));
    *slope = _mm512_mul_ps(s, _mm512_fmadd_ps(steep, _mm512_sub_ps(all(1), s), all(1)));
    return _mm512_mul_ps(x, s);
}

/* y = act(gate) * up; the f gates lie before the f ups. */
INLINE void gated_row(const bf16 *gate_up, long f, float k, float e, bf16 *y) {
    for (long j = 0; j < f; j += 16) {
        __m512 slope;
        const __m512 gate = smooth(load_bf16(gate_up + j), k, e, &slope);
        store_bf16(y + j, _mm512_mul_ps(gate, load_bf16(gate_up + f + j)));
    }
}

/* y += x */
INLINE void add_row(bf16 *y, const bf16 *x, long d) {
    for (long j = 0; j < d; j += 16) store_bf16(y + j, _mm512_add_ps(load_bf16(y + j), load_bf16(x + j)));
}

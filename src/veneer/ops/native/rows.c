/* Row-wise work in one pass over memory: RMSNorm, rotary, gated activations, cross-entropy, NF4. bf16 in and out, fp32 inside.
 *
 * Plain torch makes several passes and fp32 copies for each; on a CPU these passes are the cost. Widths are multiples of 16.
 * Rows are shared out evenly among threads; a row is never split, so results do not depend on the number of threads.
 */
#include <math.h>

#include "tile.h"

#define LOG2E 1.4426950408889634f

INLINE __m512 all(float x) { return _mm512_set1_ps(x); }

/* y = x / rms * w; inverse[r] = 1 / rms. w is fp32 and holds the offset already. */
void rms_forward(const bf16 *x, long row, long rows, long d, const float *w, float eps, bf16 *y, float *inverse, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const bf16 *in = x + r * row;
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < d; j += 16) {
            const __m512 v = load_bf16(in + j);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        inverse[r] = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)d + eps);
        const __m512 by = all(inverse[r]);
        for (long j = 0; j < d; j += 16)
            store_bf16(y + r * d + j, _mm512_mul_ps(_mm512_mul_ps(load_bf16(in + j), by), _mm512_loadu_ps(w + j)));
    }
}

/* dx = (g - n mean(g n)) / rms, n = x / rms, g = dy w. */
void rms_backward(const bf16 *x, long row, const bf16 *dy, long rows, long d, const float *w, const float *inverse, bf16 *dx,
                  int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const bf16 *in = x + r * row, *up = dy + r * d;
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < d; j += 16)
            sum = _mm512_fmadd_ps(_mm512_mul_ps(load_bf16(up + j), _mm512_loadu_ps(w + j)), load_bf16(in + j), sum);
        const float s = inverse[r];
        const __m512 by = all(s), pull = all(_mm512_reduce_add_ps(sum) / (float)d * s * s * s);
        for (long j = 0; j < d; j += 16) {
            const __m512 g = _mm512_mul_ps(load_bf16(up + j), _mm512_loadu_ps(w + j));
            store_bf16(dx + r * d + j, _mm512_fnmadd_ps(load_bf16(in + j), pull, _mm512_mul_ps(g, by)));
        }
    }
}

/* The pair (i, i + half) of each head turned by the row's angles; sign -1 turns back. y is contiguous. */
void rotary(const bf16 *x, long row, long rows, long heads, long d, long half, const float *cosines, const float *sines, float sign,
            bf16 *y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const bf16 *in = x + r * row + h * d;
            bf16 *out = y + (r * heads + h) * d;
            for (long j = 0; j < half; j += 16) {
                const __m512 a = load_bf16(in + j), b = load_bf16(in + half + j), c = _mm512_loadu_ps(cosines + r * half + j);
                const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(sines + r * half + j), all(sign));
                store_bf16(out + j, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
                store_bf16(out + half + j, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
            }
            memcpy(out + 2 * half, in + 2 * half, (size_t)(d - 2 * half) * 2);
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

void gated_forward(const bf16 *gate_up, long rows, long f, float k, float e, bf16 *y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < f; j += 16) {
            const bf16 *gate = gate_up + 2 * r * f + j;
            __m512 slope;
            store_bf16(y + r * f + j, _mm512_mul_ps(smooth(load_bf16(gate), k, e, &slope), load_bf16(gate + f)));
        }
}

void gated_backward(const bf16 *gate_up, const bf16 *dy, long rows, long f, float k, float e, bf16 *d_gate_up, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < f; j += 16) {
            const bf16 *gate = gate_up + 2 * r * f + j;
            bf16 *out = d_gate_up + 2 * r * f + j;
            __m512 slope;
            const __m512 value = smooth(load_bf16(gate), k, e, &slope), up = load_bf16(dy + r * f + j);
            store_bf16(out, _mm512_mul_ps(_mm512_mul_ps(up, load_bf16(gate + f)), slope));
            store_bf16(out + f, _mm512_mul_ps(up, value));
        }
}

/* nll[r] = logsumexp(row) - row[label]; with `weights`, the row becomes the gradient: weights[r] (softmax - onehot). */
void cross_entropy(bf16 *logits, long rows, long v, const int64_t *labels, const float *weights, float *nll, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        bf16 *row = logits + r * v;
        __m512 high = all(-INFINITY), sum = _mm512_setzero_ps();
        for (long j = 0; j < v; j += 16) high = _mm512_max_ps(high, load_bf16(row + j));
        const float top = _mm512_reduce_max_ps(high);
        const __m512 factor = all(LOG2E), shift = all(top * LOG2E);
        for (long j = 0; j < v; j += 16) sum = _mm512_add_ps(sum, exp2_16(_mm512_fmsub_ps(load_bf16(row + j), factor, shift)));
        const float total = _mm512_reduce_add_ps(sum);
        uint32_t word = (uint32_t)row[labels[r]] << 16;
        float ours;
        memcpy(&ours, &word, 4);
        nll[r] = top - ours + logf(total);
        if (!weights) continue;
        const __m512 by = all(weights[r] / total);
        for (long j = 0; j < v; j += 16)
            store_bf16(row + j, _mm512_mul_ps(exp2_16(_mm512_fmsub_ps(load_bf16(row + j), factor, shift)), by));
        const __m512 minus = all(weights[r] * (exp2f((ours - top) * LOG2E) / total - 1));
        bf16 narrowed[16];
        store_bf16(narrowed, minus);
        row[labels[r]] = narrowed[0];
    }
}

/* One pass for the backward of y = x * scale: dx = dy * scale, and per chunk of SHARE rows the column sums of dy * y.
 * Chunks are fixed, so their sum does not depend on threads. sums is [chunks][d]. */
#define SHARE 128

void scale_backward(const bf16 *dy, long dy_row, const bf16 *y, long rows, long d, const bf16 *scale, bf16 *dx, float *sums,
                    int threads) {
#pragma omp parallel for num_threads(threads)
    for (long c = 0; c < (rows + SHARE - 1) / SHARE; c++) {
        float *sum = sums + c * d;
        memset(sum, 0, (size_t)d * 4);
        for (long r = c * SHARE; r < rows && r < (c + 1) * SHARE; r++)
            for (long j = 0; j < d; j += 16) {
                const __m512 slope = load_bf16(dy + r * dy_row + j);
                _mm512_storeu_ps(sum + j, _mm512_fmadd_ps(slope, load_bf16(y + r * d + j), _mm512_loadu_ps(sum + j)));
                store_bf16(dx + r * d + j, _mm512_mul_ps(slope, load_bf16(scale + j)));
            }
    }
}

/* Two codes a byte, the first in the high half; blocks of `block` values, a multiple of 32, share a scale. */
void dequantise_four_bit(const uint8_t *packed, const float *scales, long blocks, long block, const float *levels, bf16 *out, int threads) {
    const __m512 table = _mm512_loadu_ps(levels);
#pragma omp parallel for num_threads(threads)
    for (long b = 0; b < blocks; b++)
        for (long j = 0; j < block; j += 32) {
            const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + (b * block + j) / 2)));
            const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
            const __m512 second = _mm512_permutexvar_ps(byte, table); /* the low 4 bits choose */
            const __m512 scale = all(scales[b]);
            _mm512_storeu_si512(out + b * block + j, pair(_mm512_mul_ps(first, scale), _mm512_mul_ps(second, scale)));
        }
}

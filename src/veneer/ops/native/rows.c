/* Row-wise work in one pass over memory: RMSNorm, rotary, gated activations, cross-entropy, NF4, int8. bf16 in and out, fp32 inside.
 *
 * Plain torch makes several passes and fp32 copies for each; on a CPU these passes are the cost. Widths are multiples of 16.
 * Rows are shared out evenly among threads; a row is never split, so results do not depend on the number of threads.
 */
#include "rows.h"

/* inverse[r] = 1 / rms. */
void rms_forward(const bf16 *x, long row, long rows, long d, const float *w, float eps, bf16 *y, float *inverse, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) inverse[r] = rms_row(x + r * row, d, w, eps, y + r * d);
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

/* sign -1 turns back. y is contiguous. */
void rotary(const bf16 *x, long row, long rows, long heads, long d, long half, const float *cosines, const float *sines, float sign,
            bf16 *y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        rotary_row(x + r * row, heads, d, half, cosines + r * half, sines + r * half, sign, y + r * heads * d);
}

void gated_forward(const bf16 *gate_up, long rows, long f, float k, float e, bf16 *y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) gated_row(gate_up + 2 * r * f, f, k, e, y + r * f);
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

/* codes [rows][columns] times the scale of their row. columns is a multiple of 16. */
void dequantise_int8(const int8_t *codes, const float *scales, long rows, long columns, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < columns; j += 16) {
            const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + r * columns + j)));
            store_bf16(out + r * columns + j, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), all(scales[r])));
        }
}

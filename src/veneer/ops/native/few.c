/* Decoding: a handful of rows, so everything is as fast as memory. Each weight, key and value is read once, where it lies.
 *
 * Libraries copy the weight into a layout of their own first, or keep such a copy. For up to 16 rows that is not needed: both
 * operands run along k, so a register of 32 products is summed at the end of each row of W.
 */
#include <math.h>

#include "tile.h"

#define LOG2E 1.4426950408889634f
#define CHUNK 128
#define WIDEST 256
#define LANES 16
#define AHEAD 8192 /* bytes of W asked for before they are needed */

enum { SET, ADD, WIDE }; /* what becomes of a product: y = bf16, y += bf16, y = fp32 as it was summed */

/* Two rows of W against `n` rows of x. y_row counts elements of y. */
INLINE void two_rows(const int n, const bf16 *x, long x_row, const bf16 *w, long k, void *out, long y_row, int both, const int how) {
    __m512 a[8], b[8];
    for (int i = 0; i < n; i++) a[i] = b[i] = _mm512_setzero_ps();
    for (long j = 0; j < k; j += 32) {
        _mm_prefetch((const char *)(w + j) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k + j) + AHEAD, _MM_HINT_T0);
        const __m512i first = _mm512_loadu_si512(w + j), second = _mm512_loadu_si512(w + (both ? k : 0) + j);
        for (int i = 0; i < n; i++) {
            const __m512i v = _mm512_loadu_si512(x + i * x_row + j);
            a[i] = dot(a[i], first, v);
            b[i] = dot(b[i], second, v);
        }
    }
    if (how == WIDE) {
        for (int i = 0; i < n; i++) {
            float *to = (float *)out + i * y_row;
            to[0] = _mm512_reduce_add_ps(a[i]);
            if (both) to[1] = _mm512_reduce_add_ps(b[i]);
        }
        return;
    }
    bf16 *y = out;
    for (int i = 0; i < n; i++) {
        bf16 narrowed[16] = {0};
        __m512 sum = _mm512_mask_blend_ps(1, _mm512_set1_ps(_mm512_reduce_add_ps(b[i])), _mm512_set1_ps(_mm512_reduce_add_ps(a[i])));
        if (how == ADD) {
            memcpy(narrowed, y + i * y_row, both ? 4 : 2);
            sum = _mm512_add_ps(sum, load_bf16(narrowed));
        }
        store_bf16(narrowed, sum);
        memcpy(y + i * y_row, narrowed, both ? 4 : 2);
    }
}

INLINE void rows_of(long n, const bf16 *x, long x_row, const bf16 *w, long k, void *y, long y_row, int both, const int how) {
    switch (n) {
    case 1: two_rows(1, x, x_row, w, k, y, y_row, both, how); break;
    case 2: two_rows(2, x, x_row, w, k, y, y_row, both, how); break;
    case 3: two_rows(3, x, x_row, w, k, y, y_row, both, how); break;
    case 4: two_rows(4, x, x_row, w, k, y, y_row, both, how); break;
    case 5: two_rows(5, x, x_row, w, k, y, y_row, both, how); break;
    case 6: two_rows(6, x, x_row, w, k, y, y_row, both, how); break;
    case 7: two_rows(7, x, x_row, w, k, y, y_row, both, how); break;
    default: two_rows(8, x, x_row, w, k, y, y_row, both, how);
    }
}

/* y[n][m] = x[n][k] w[m][k]^T, or += with `add`; k is a multiple of 32. */
void few_rows(const bf16 *x, long x_row, const bf16 *w, long n, long m, long k, bf16 *y, long y_row, int add, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < m; r += 2)
        for (long i = 0; i < n; i += 8)
            if (add) rows_of(n - i < 8 ? n - i : 8, x + i * x_row, x_row, w + r * k, k, y + i * y_row + r, y_row, r + 1 < m, ADD);
            else rows_of(n - i < 8 ? n - i : 8, x + i * x_row, x_row, w + r * k, k, y + i * y_row + r, y_row, r + 1 < m, SET);
}

/* The same product with its sums unrounded: scores over a vocabulary, where two of them may differ by less than bf16 can say. */
void few_scores(const bf16 *x, long x_row, const bf16 *w, long n, long m, long k, float *y, long y_row, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < m; r += 2)
        for (long i = 0; i < n; i += 8)
            rows_of(n - i < 8 ? n - i : 8, x + i * x_row, x_row, w + r * k, k, y + i * y_row + r, y_row, r + 1 < m, WIDE);
}

/* The queries of one group of heads, a column each, against one sequence's keys [begin, end). */
static void decode_group(const bf16 *q, const bf16 *k, const bf16 *v, long k_row, long v_row, long begin, long end, long group, long d,
                         float scale, bf16 *out) {
    float S[CHUNK * LANES] __attribute__((aligned(64))), O[LANES * WIDEST] __attribute__((aligned(64)));
    uint32_t qt[WIDEST / 2 * LANES] __attribute__((aligned(64))), pairs[CHUNK / 2 * LANES] __attribute__((aligned(64)));
    uint32_t P[LANES * CHUNK / 2] __attribute__((aligned(64))), values[CHUNK / 2 * WIDEST] __attribute__((aligned(64)));
    float fades[LANES], sums[LANES];
    memset(qt, 0, sizeof qt);
    for (long h = 0; h < group; h++)
        for (long j = 0; j < d / 2; j++) memcpy(qt + j * LANES + h, q + h * d + 2 * j, 4);
    memset(O, 0, sizeof O);
    const __m512 factor = _mm512_set1_ps(scale * LOG2E);
    __m512 top = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
    for (long j = begin; j < end; j += CHUNK) {
        const long keys = end - j < CHUNK ? end - j : CHUNK, padded = (keys + 31) / 32 * 32;
        product(keys, 1, d / 2, k + j * k_row, k_row, qt, LANES, S, LANES, 0);
        __m512 high = top;
        for (long r = 0; r < keys; r++) high = _mm512_max_ps(high, _mm512_load_ps(S + r * LANES));
        for (long r = keys; r < padded; r++) _mm512_store_ps(S + r * LANES, _mm512_set1_ps(-INFINITY));
        const __m512 shift = _mm512_mul_ps(high, factor), fade = exp2_16(_mm512_fmsub_ps(top, factor, shift));
        top = high;
        sum = _mm512_mul_ps(sum, fade);
        for (long r = 0; r < padded; r += 2) {
            const __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(S + r * LANES), factor, shift));
            const __m512 b = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(S + (r + 1) * LANES), factor, shift));
            sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
            _mm512_store_si512(pairs + r / 2 * LANES, pair(a, b));
        }
        for (long r = 0; r < padded / 2; r += 16) transpose16(pairs + r * LANES, LANES, 16, P + r, CHUNK / 2);
        pair_rows(v + j * v_row, v_row, keys, padded, d, values);
        _mm512_storeu_ps(fades, fade);
        for (long h = 0; h < group; h++)
            for (long i = 0; i < d; i += 16)
                _mm512_store_ps(O + h * d + i, _mm512_mul_ps(_mm512_load_ps(O + h * d + i), _mm512_set1_ps(fades[h])));
        product(group, d / 16, padded / 2, (const bf16 *)P, CHUNK, values, d, O, d, 1);
    }
    _mm512_storeu_ps(sums, sum);
    for (long h = 0; h < group; h++)
        for (long i = 0; i < d; i += 16)
            store_bf16(out + h * d + i, _mm512_div_ps(_mm512_load_ps(O + h * d + i), _mm512_set1_ps(sums[h])));
}

/* One query for each of b sequences; sequence s has lengths[s] keys at k + s * k_batch. q and out are contiguous [b][heads][d]. */
void decode_attention(const bf16 *q, const bf16 *k, const bf16 *v, long k_batch, long v_batch, long k_row, long v_row,
                      const int64_t *lengths, long b, long heads, long kv, long d, long window, float scale, bf16 *out, int threads) {
    const long group = heads / kv;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long s = 0; s < b; s++)
        for (long g = 0; g < kv; g++) {
            const long end = lengths[s], begin = window > 0 && end > window ? end - window : 0, at = (s * heads + g * group) * d;
            decode_group(q + at, k + s * k_batch + g * d, v + s * v_batch + g * d, k_row, v_row, begin, end, group, d, scale, out + at);
        }
}

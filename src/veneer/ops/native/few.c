/* Products of a few rows and one query a sequence, each as a call of its own. */
#include "few.h"

/* y[n][m] = x[n][k] w[m][k]^T, or += with `add`; k is a multiple of 32. */
void few_rows(const bf16 *x, long x_row, const char *w, long n, long m, long k, bf16 *y, long y_row, int add, int threads) {
    const Weight weight = {w, NULL, NULL, NULL, NULL, NULL};
    Share shares[threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    if (add) share_rows(BF16, x, x_row, &weight, n, m, k, y, y_row, ADD, shares);
    else share_rows(BF16, x, x_row, &weight, n, m, k, y, y_row, SET, shares);
}

/* The same for weights that are not stored as bf16; of TWELVE k is a multiple of 64. */
void few_stored_rows(const bf16 *x, long x_row, const Weight *w, int kind, long n, long m, long k, bf16 *y, long y_row, int threads) {
    Share shares[threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    if (kind == TWELVE) share_rows(TWELVE, x, x_row, w, n, m, k, y, y_row, SET, shares);
    else share_rows(INT8, x, x_row, w, n, m, k, y, y_row, SET, shares);
}

/* TWELVE as bf16 [m][k]. */
void plain_rows(const Weight *w, long m, long k, bf16 *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < m; r++) plain_row(w, r, k, out + r * k);
}

/* The product with its sums unrounded: scores over a vocabulary, where two of them may differ by less than bf16 can say. */
void few_scores(const bf16 *x, long x_row, const char *w, long n, long m, long k, float *y, long y_row, int threads) {
    const Weight weight = {w, NULL, NULL, NULL, NULL, NULL};
    Share shares[threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    share_rows(BF16, x, x_row, &weight, n, m, k, y, y_row, WIDE, shares);
}

/* One query for each of b sequences; sequence s has lengths[s] keys at k + s * k_batch. q and out are contiguous [b][heads][d]. */
void decode_attention(const bf16 *q, const bf16 *k, const bf16 *v, long k_batch, long v_batch, long k_row, long v_row,
                      const int64_t *lengths, long b, long heads, long kv, long d, long window, float scale, bf16 *out, int threads) {
    const long group = heads / kv;
#pragma omp parallel for collapse(2) schedule(static, 1) num_threads(threads)
    for (long s = 0; s < b; s++)
        for (long g = 0; g < kv; g++) {
            const long end = lengths[s], begin = window > 0 && end > window ? end - window : 0, at = (s * heads + g * group) * d;
            decode_group(q + at, k + s * k_batch + g * d, v + s * v_batch + g * d, k_row, v_row, begin, end, group, d, scale, out + at);
        }
}

/* Row rows[i] of q, k and v reads a token at places[i]: its key and value are stored, then it attends over all of its sequence. The
 * heads of a row lie side by side. */
void attend_in_place(const bf16 *q, const bf16 *k, const bf16 *v, long q_row, long k_row, long v_row, const int64_t *rows,
                     const Place *places, long n, long layer, long heads, long kv, long d, long window, float scale, bf16 *out,
                     long out_row, int threads) {
    for (long i = 0; i < n; i++) {
        bf16 *key = key_of(places + i, layer);
        memcpy(key, k + rows[i] * k_row, (size_t)(kv * d) * 2);
        memcpy(key + places[i].value_step, v + rows[i] * v_row, (size_t)(kv * d) * 2);
    }
    Share shares[threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    share_places(q, q_row, rows, places, n, layer, kv, heads / kv, d, window, scale, out, out_row, shares);
}

/* Stores the keys and values of runs of rows: run i is rows[2i + 1] of them from rows[2i] on, at places[i] and the positions after it. */
void store_runs(const bf16 *k, const bf16 *v, long k_row, long v_row, const int64_t *rows, const Place *places, long runs, long layer,
                long wide, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < runs; i++) {
        bf16 *key = key_of(places + i, layer);
        const long first = rows[2 * i], step = places[i].position_step, value_step = places[i].value_step;
#pragma omp for schedule(static) nowait
        for (long r = 0; r < rows[2 * i + 1]; r++) {
            memcpy(key + r * step, k + (first + r) * k_row, (size_t)wide * 2);
            memcpy(key + r * step + value_step, v + (first + r) * v_row, (size_t)wide * 2);
        }
    }
}

/* Where the first of the largest numbers of each row of y [n][m] is, and that number; a row with a NaN has it as its largest. */
void largest(const float *y, long n, long m, int64_t *places, float *values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r++) {
        const float *row = y + r * m;
        __m512 tops[4];
        __mmask16 unordered = 0;
        float top = -INFINITY;
        long j = 0;
        for (int i = 0; i < 4; i++) tops[i] = _mm512_set1_ps(-INFINITY);
        for (; j + 64 <= m; j += 64)
            for (int i = 0; i < 4; i++) {
                const __m512 v = _mm512_loadu_ps(row + j + 16 * i);
                unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
                tops[i] = _mm512_max_ps(v, tops[i]); /* of a NaN and a number this is the second */
            }
        for (int i = 0; i < 4; i++) top = fmaxf(top, _mm512_reduce_max_ps(tops[i]));
        for (; j < m; j++) top = row[j] > top ? row[j] : top, unordered |= row[j] != row[j];
        for (j = 0; unordered ? row[j] == row[j] : row[j] != top;) j++;
        places[r] = j, values[r] = row[j];
    }
}

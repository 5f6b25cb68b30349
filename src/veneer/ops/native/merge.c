/* A low-rank update merged into a bf16 matrix in one pass: value = round(W + L R), and what the rounding lost.
 *
 * Plain torch passes over each block seven times, in fp32. Here a weight is read once and written once; four rows share what is loaded
 * of R. Sums of squares are kept by row, so that they do not depend on threads.
 */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "tile.h"

#define BLOCK_BYTES 262144

/* `n` rows from i on, 16 * vectors columns from j on. */
INLINE void merge_tile(const int n, const int vectors, const bf16 *stored, long row, const float *left, const float *right, long i, long j,
                       long k, long rank, bf16 *value, double *lost, double *weight) {
    __m512 update[4][4], losses[4], weights[4];
    for (int m = 0; m < n; m++) {
        losses[m] = weights[m] = _mm512_setzero_ps();
        for (int v = 0; v < vectors; v++) update[m][v] = _mm512_setzero_ps();
    }
    for (long r = 0; r < rank; r++)
        for (int v = 0; v < vectors; v++) {
            const __m512 b = _mm512_loadu_ps(right + r * k + j + 16 * v);
            for (int m = 0; m < n; m++) update[m][v] = _mm512_fmadd_ps(_mm512_set1_ps(left[(i + m) * rank + r]), b, update[m][v]);
        }
    for (int m = 0; m < n; m++) {
        for (int v = 0; v < vectors; v++) {
            const __m512 w = load_bf16(stored + (i + m) * row + j + 16 * v), exact = _mm512_add_ps(w, update[m][v]);
            bf16 *to = value + (i + m) * k + j + 16 * v;
            _mm256_storeu_si256((__m256i *)to, nearest(exact));
            const __m512 difference = _mm512_sub_ps(exact, load_bf16(to));
            losses[m] = _mm512_fmadd_ps(difference, difference, losses[m]);
            weights[m] = _mm512_fmadd_ps(w, w, weights[m]);
        }
        lost[i + m] += _mm512_reduce_add_ps(losses[m]);
        weight[i + m] += _mm512_reduce_add_ps(weights[m]);
    }
}

/* Rows [first, last). A strip of R, 64 columns wide, stays in the L1 cache while all the rows pass. */
static void merge_rows(const bf16 *stored, long row, const float *left, const float *right, long first, long last, long k, long rank, bf16 *value,
                       double *lost, double *weight) {
    for (long j = 0; j < k; j += 64)
        for (long i = first; i < last; i += 4) {
            if (i + 4 <= last && j + 64 <= k) {
                merge_tile(4, 4, stored, row, left, right, i, j, k, rank, value, lost, weight);
                continue;
            }
            for (long m = i; m < last && m < i + 4; m++)
                for (long c = j; c < k && c < j + 64; c += 16)
                    merge_tile(1, 1, stored, row, left, right, m, c, k, rank, value, lost, weight);
        }
}

/* Rows that are worked on at a time: they stay in the L2 cache from the first pass to the last. */
INLINE long block_rows(long k) { return k * 8 < BLOCK_BYTES ? BLOCK_BYTES / (k * 8) * 4 : 4; }

/* stored [n][k] with rows `row` apart, left [n][rank], right [rank][k], value [n][k]; lost and weight [n] start at 0. k is a multiple of 16. */
void merge_low_rank(const bf16 *stored, long row, const float *left, const float *right, long n, long k, long rank, bf16 *value, double *lost,
                    double *weight, int threads) {
    const long step = block_rows(k);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i += step)
        merge_rows(stored, row, left, right, i, i + step < n ? i + step : n, k, rank, value, lost, weight);
}

/* All of `count` bytes, or an errno; ENODATA where the file ends before. */
static int read_all(int file, char *to, size_t count, int64_t at) {
    while (count) {
        const ssize_t done = pread(file, to, count, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done ? errno : ENODATA;
        to += done, at += done, count -= (size_t)done;
    }
    return 0;
}

static int write_all(int file, const char *from, size_t count, int64_t at) {
    while (count) {
        const ssize_t done = pwrite(file, from, count, at);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        from += done, at += done, count -= (size_t)done;
    }
    return 0;
}

/* The same from file to file: stored [n][k] lies at `from` in `source` and value goes to `to` in `target`. What is read, changed and
 * written at a time fits the cache, so that memory sees each weight twice, as in a copy. Returns 0 or an errno. */
int merge_low_rank_file(int source, int64_t from, int target, int64_t to, const float *left, const float *right, long n, long k, long rank,
                        double *lost, double *weight) {
    const long step = block_rows(k);
    bf16 *rows = aligned_alloc(64, (size_t)(step * k) * sizeof *rows);
    if (!rows) return ENOMEM;
    int problem = 0;
    for (long i = 0; i < n && !problem; i += step) {
        const long count = i + step < n ? step : n - i;
        const size_t bytes = (size_t)(count * k) * sizeof *rows;
        const int64_t at = (int64_t)i * k * (int64_t)sizeof *rows;
        problem = read_all(source, (char *)rows, bytes, from + at);
        if (problem) break;
        merge_rows(rows, k, left + i * rank, right, 0, count, k, rank, rows, lost + i, weight + i);
        problem = write_all(target, (const char *)rows, bytes, to + at);
    }
    free(rows);
    return problem;
}

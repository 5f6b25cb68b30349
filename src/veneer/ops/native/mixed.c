/* Low-rank updates of single rows that belong to different adapters: y[i] += B (A x[i]).
 *
 * Every adapter is read once, where it lies, and only for its own rows: no copies side by side when the mix changes, no products
 * that are thrown away. A job is a run of rows with one adapter on one part of the projection.
 *   A   [rank][k]      both operands of the shrink run along k
 *   Bt  [rank][out]    two of its rows make the pairs that vdpbf16ps wants, sixteen columns at a time
 */
#include <stdlib.h>

#include "tile.h"

#define AHEAD 4096 /* bytes of A and B asked for before they are needed */
#define NEXT 64    /* columns ahead of those in work */
#define RUN 8      /* rows of a job */
#define BLOCK 256  /* columns that one thread takes at a time: long enough for the CPU to see sixteen streams */

typedef struct {
    const bf16 *a, *bt;
    int64_t row, rows, rank, column, out;
    int64_t first_unit, first_block; /* where this job begins in the count over all jobs; a unit is four ranks */
} Job;

/* `four` rows of A at once: their sums do not wait for each other. */
INLINE void shrink_by(const int four, const Job *job, long r, const bf16 *x, long x_row, long k, bf16 *h, long h_row) {
    const bf16 *a = job->a + r * k;
    for (int i = 0; i < job->rows; i++) {
        const bf16 *row = x + (job->row + i) * x_row;
        __m512 sums[4];
        for (int q = 0; q < four; q++) sums[q] = _mm512_setzero_ps();
        for (long j = 0; j < k; j += 32) {
            const __m512i v = _mm512_loadu_si512(row + j);
            for (int q = 0; q < four; q++) {
                _mm_prefetch((const char *)(a + q * k + j) + AHEAD, _MM_HINT_T0);
                sums[q] = dot(sums[q], _mm512_loadu_si512(a + q * k + j), v);
            }
        }
        for (int q = 0; q < four; q++) {
            bf16 narrowed[16];
            store_bf16(narrowed, _mm512_set1_ps(_mm512_reduce_add_ps(sums[q])));
            h[i * h_row + r + q] = narrowed[0];
        }
    }
}

static void shrink(const Job *job, long r, const bf16 *x, long x_row, long k, bf16 *h, long h_row) {
    if (r + 4 <= job->rank) shrink_by(4, job, r, x, x_row, k, h, h_row);
    else
        for (; r < job->rank; r++) shrink_by(1, job, r, x, x_row, k, h, h_row);
}

INLINE __m512i pairs_of(const bf16 *even, const bf16 *odd, __mmask16 mask, int both) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
    if (!both) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd)), 16));
}

/* 16 * vectors columns of one row; `mask` is for the last vector. */
INLINE void expand_by(const int vectors, __mmask16 mask, const Job *job, long column, const bf16 *h, bf16 *to) {
    __m512 sums[4];
    for (int v = 0; v < vectors; v++) {
        const __m256i old = _mm256_maskz_loadu_epi16(v + 1 < vectors ? 0xffff : mask, to + 16 * v);
        sums[v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
    }
    for (long r = 0; r < job->rank; r += 2) {
        const bf16 *even = job->bt + r * job->out + column, *odd = even + job->out;
        uint32_t word;
        memcpy(&word, h + r, 4);
        const __m512i both = _mm512_set1_epi32((int)word);
        _mm_prefetch((const char *)(even + NEXT), _MM_HINT_T0);
        _mm_prefetch((const char *)(even + NEXT + 32), _MM_HINT_T0);
        _mm_prefetch((const char *)(odd + NEXT), _MM_HINT_T0);
        _mm_prefetch((const char *)(odd + NEXT + 32), _MM_HINT_T0);
        for (int v = 0; v < vectors; v++)
            sums[v] = dot(sums[v], pairs_of(even + 16 * v, odd + 16 * v, v + 1 < vectors ? 0xffff : mask, r + 1 < job->rank), both);
    }
    for (int v = 0; v < vectors; v++)
        _mm256_mask_storeu_epi16(to + 16 * v, v + 1 < vectors ? 0xffff : mask, (__m256i)_mm512_cvtneps_pbh(sums[v]));
}

static void expand(const Job *job, long column, long columns, const bf16 *h, long h_row, bf16 *y, long y_row) {
    for (int i = 0; i < job->rows; i++) {
        bf16 *to = y + (job->row + i) * y_row + job->column + column;
        if (columns == 64) {
            expand_by(4, 0xffff, job, column, h + i * h_row, to);
            continue;
        }
        for (long c = 0; c < columns; c += 16) {
            const long left = columns - c < 16 ? columns - c : 16;
            expand_by(1, (__mmask16)((1u << left) - 1), job, column + c, h + i * h_row, to + c);
        }
    }
}

/* `owner` and `block` say which job a unit of ranks and a block of columns belong to. k is a multiple of 32. Returns 0 without memory. */
int low_rank_rows(const Job *jobs, const int32_t *owner, long units, const int32_t *block, long blocks, const bf16 *x,
                  long x_row, long k, bf16 *y, long y_row, int threads) {
    /* The ranks of a job lie side by side, padded to pairs with zeros, one line for each of its rows. */
    bf16 *h = calloc((size_t)units * 4 * RUN, sizeof(bf16));
    if (!h) return 0;
#define LINE(job) (h + (job)->first_unit * 4 * RUN)
#define WIDTH(job) (((job)->rank + 1) / 2 * 2)
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < units; t++) {
            const Job *job = jobs + owner[t];
            shrink(job, (t - job->first_unit) * 4, x, x_row, k, LINE(job), WIDTH(job));
        }
#pragma omp for schedule(static)
        for (long t = 0; t < blocks; t++) {
            const Job *job = jobs + block[t];
            const long from = (t - job->first_block) * BLOCK, to = from + BLOCK < job->out ? from + BLOCK : job->out;
            for (long column = from; column < to; column += 64)
                expand(job, column, to - column < 64 ? to - column : 64, LINE(job), WIDTH(job), y, y_row);
        }
    }
    free(h);
    return 1;
}

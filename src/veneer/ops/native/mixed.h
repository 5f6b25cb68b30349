/* Low-rank updates of short runs of rows that belong to different adapters: y[i] += B (A x[i]).
 *
 * Every adapter is read once, where it lies, and only for its own rows: no copies side by side when the mix changes, no products
 * that are thrown away. A job is a run of rows with one adapter on one part of the projection.
 *   A   [rank][k]      both operands of the shrink run along k
 *   Bt  [rank][out]    two of its rows make the pairs that vdpbf16ps wants, sixteen columns at a time
 * Up to four rows go together, so that a prompt's rows share what is loaded; each is summed as it would be alone.
 */
#pragma once
#include "tile.h"

#define SOON 4096 /* bytes of A asked for before they are needed */
#define NEXT 128  /* columns of B ahead of those in work */
#define BLOCK 256 /* columns that one thread takes at a time: long enough for the CPU to see sixteen streams */

typedef struct {
    const bf16 *a, *bt;
    int64_t row, rows, rank, column, out;
    int64_t first_unit, first_block; /* where this job begins in the count over all jobs; a unit is four ranks */
    int64_t line;                    /* where its ranks lie in the scratch, an even number for each row */
} Job;

INLINE long width(const Job *job) { return (job->rank + 1) / 2 * 2; }

/* `q` ranks from r on of `n` rows from i on: no sum waits for another. */
INLINE void shrink_by(const int q, const int n, const Job *job, long r, long i, const bf16 *x, long x_row, long k, bf16 *h) {
    const bf16 *a = job->a + r * k, *row = x + (job->row + i) * x_row;
    __m512 sums[4][4];
    for (int m = 0; m < n; m++)
        for (int p = 0; p < q; p++) sums[m][p] = _mm512_setzero_ps();
    for (long j = 0; j < k; j += 32) {
        __m512i ranks[4];
        for (int p = 0; p < q; p++) {
            _mm_prefetch((const char *)(a + p * k + j) + SOON, _MM_HINT_T1);
            ranks[p] = _mm512_loadu_si512(a + p * k + j);
        }
        for (int m = 0; m < n; m++) {
            const __m512i v = _mm512_loadu_si512(row + m * x_row + j);
            for (int p = 0; p < q; p++) sums[m][p] = dot(sums[m][p], ranks[p], v);
        }
    }
    for (int m = 0; m < n; m++)
        for (int p = 0; p < q; p++) {
            bf16 narrowed[16];
            store_bf16(narrowed, _mm512_set1_ps(_mm512_reduce_add_ps(sums[m][p])));
            h[(i + m) * width(job) + r + p] = narrowed[0];
        }
}

/* Up to four ranks from r on, of all rows; an odd rank is made a pair with a zero. */
static inline void shrink(const Job *job, long r, const bf16 *x, long x_row, long k, bf16 *h) {
    const int all_four = r + 4 <= job->rank;
    long i = 0;
    for (; all_four && i + 4 <= job->rows; i += 4) shrink_by(4, 4, job, r, i, x, x_row, k, h);
    for (; i < job->rows; i++) {
        if (all_four) shrink_by(4, 1, job, r, i, x, x_row, k, h);
        else
            for (long p = r; p < job->rank; p++) shrink_by(1, 1, job, p, i, x, x_row, k, h);
        if (!all_four && job->rank % 2) h[i * width(job) + job->rank] = 0;
    }
}

INLINE __m512i pairs_of(const bf16 *even, const bf16 *odd, __mmask16 mask, int both) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
    if (!both) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd)), 16));
}

/* 16 * vectors columns of `n` rows; `mask` is for the last vector. */
INLINE void expand_by(const int vectors, const int n, __mmask16 mask, const Job *job, long column, const bf16 *h, bf16 *to, long y_row) {
    __m512 sums[4][4];
    for (int m = 0; m < n; m++)
        for (int v = 0; v < vectors; v++) {
            const __m256i old = _mm256_maskz_loadu_epi16(v + 1 < vectors ? 0xffff : mask, to + m * y_row + 16 * v);
            sums[m][v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
        }
    for (long r = 0; r < job->rank; r += 2) {
        const bf16 *even = job->bt + r * job->out + column, *odd = even + job->out;
        __m512i ranks[4];
        for (int m = 0; m < n; m++) {
            uint32_t word;
            memcpy(&word, h + m * width(job) + r, 4);
            ranks[m] = _mm512_set1_epi32((int)word);
        }
        _mm_prefetch((const char *)(even + NEXT), _MM_HINT_T1);
        _mm_prefetch((const char *)(even + NEXT + 32), _MM_HINT_T1);
        _mm_prefetch((const char *)(odd + NEXT), _MM_HINT_T1);
        _mm_prefetch((const char *)(odd + NEXT + 32), _MM_HINT_T1);
        for (int v = 0; v < vectors; v++) {
            const __m512i b = pairs_of(even + 16 * v, odd + 16 * v, v + 1 < vectors ? 0xffff : mask, r + 1 < job->rank);
            for (int m = 0; m < n; m++) sums[m][v] = dot(sums[m][v], b, ranks[m]);
        }
    }
    for (int m = 0; m < n; m++)
        for (int v = 0; v < vectors; v++)
            _mm256_mask_storeu_epi16(to + m * y_row + 16 * v, v + 1 < vectors ? 0xffff : mask, (__m256i)_mm512_cvtneps_pbh(sums[m][v]));
}

INLINE void expand_rows(const int n, const Job *job, long column, long columns, const bf16 *h, bf16 *to, long y_row) {
    if (columns == 64) {
        expand_by(4, n, 0xffff, job, column, h, to, y_row);
        return;
    }
    for (long c = 0; c < columns; c += 16) {
        const long left = columns - c < 16 ? columns - c : 16;
        expand_by(1, n, (__mmask16)((1u << left) - 1), job, column + c, h, to + c, y_row);
    }
}

static inline void expand(const Job *job, long column, long columns, const bf16 *h, bf16 *y, long y_row) {
    bf16 *to = y + job->row * y_row + job->column + column;
    long i = 0;
    for (; i + 4 <= job->rows; i += 4) expand_rows(4, job, column, columns, h + i * width(job), to + i * y_row, y_row);
    for (; i < job->rows; i++) expand_rows(1, job, column, columns, h + i * width(job), to + i * y_row, y_row);
}

/* All low-rank updates of one projection: `owner` and `block` say which job a unit of ranks and a block of columns belong to;
 * `scratch` counts the elements of the ranks of all jobs. */
typedef struct {
    const Job *jobs;
    const int32_t *owner, *block;
    int64_t units, blocks, scratch;
} Updates;

/* Inside a parallel region, with no barrier at the end: h = A x. k is a multiple of 32. */
INLINE void share_shrinks(const Updates *u, const bf16 *x, long x_row, long k, bf16 *h) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < u->units; t++) {
        const Job *job = u->jobs + u->owner[t];
        shrink(job, (t - job->first_unit) * 4, x, x_row, k, h + job->line);
    }
}

/* The same: y += B h. */
INLINE void share_expands(const Updates *u, const bf16 *h, bf16 *y, long y_row) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < u->blocks; t++) {
        const Job *job = u->jobs + u->block[t];
        const long from = (t - job->first_block) * BLOCK, to = from + BLOCK < job->out ? from + BLOCK : job->out;
        for (long column = from; column < to; column += 64)
            expand(job, column, to - column < 64 ? to - column : 64, h + job->line, y, y_row);
    }
}

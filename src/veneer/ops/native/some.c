/* Products of some dozens of rows, a prompt beside rows that decode: y[n][m] = x[n][k] w[m][k]^T.
 *
 * Too many rows to sum along k (few.h), too few for a library, which lays the weight out anew at each call. Here x is laid out, once:
 * its rows become columns, so that a lane of a register is a row of x. W is read where it lies, a pair of its neighbours going to all lanes.
 * Each sum runs along k in order, so a row's result does not depend on the rows beside it.
 */
#include <stdlib.h>

#include "share.h"
#include "tile.h"

#define ACROSS 64 /* rows of x at a time: four registers */
#define TALL 32   /* rows of W at a time */
#define DEEP 128  /* pairs along k at a time: with ACROSS columns they fill most of the L1 cache */

INLINE void columns_of(const int rows, long vectors, long pairs, const bf16 *w, long k, const uint32_t *x, long x_row, float *C, int add) {
    switch (vectors) {
    case 1: tile(rows, 1, pairs, w, k, x, x_row, C, ACROSS, add); break;
    case 2: tile(rows, 2, pairs, w, k, x, x_row, C, ACROSS, add); break;
    case 3: tile(rows, 3, pairs, w, k, x, x_row, C, ACROSS, add); break;
    default: tile(rows, 4, pairs, w, k, x, x_row, C, ACROSS, add);
    }
}

/* Up to TALL rows of W and ACROSS rows of x. The TALL rows that follow are asked for meanwhile, a few lines before each tile. */
static void block_of(const uint32_t *x, long x_row, long n, const bf16 *w, long rows, long left, long k, bf16 *y, long y_row) {
    float C[TALL * ACROSS];
    uint32_t turned[16 * 16];
    const long vectors = (n + 15) / 16, bytes = (left < TALL ? left : TALL) * k * 2, tiles = (rows + ROWS - 1) / ROWS;
    const long share = bytes / (((k / 2 + DEEP - 1) / DEEP) * tiles) + 64;
    const char *next = (const char *)(w + rows * k), *stop = next + bytes;
    for (long p = 0; p < k / 2; p += DEEP) {
        const long pairs = k / 2 - p < DEEP ? k / 2 - p : DEEP;
        for (long r = 0; r < rows; r += ROWS) {
            for (const char *end = next + share; next < end && next < stop; next += 64) _mm_prefetch(next, _MM_HINT_T1);
            if (r + ROWS <= rows) columns_of(ROWS, vectors, pairs, w + r * k + 2 * p, k, x + p * x_row, x_row, C + r * ACROSS, p > 0);
            else
                for (long i = r; i < rows; i++) columns_of(1, vectors, pairs, w + i * k + 2 * p, k, x + p * x_row, x_row, C + i * ACROSS, p > 0);
        }
    }
    for (long r = 0; r < rows; r += 16)
        for (long i = 0; i < n; i += 16) {
            const long high = rows - r < 16 ? rows - r : 16, wide = n - i < 16 ? n - i : 16;
            transpose16((const uint32_t *)C + r * ACROSS + i, ACROSS, high, turned, 16);
            for (long j = 0; j < wide; j++) {
                const __m256i narrowed = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps((const float *)turned + 16 * j));
                _mm256_mask_storeu_epi16(y + (i + j) * y_row + r, (__mmask16)((1u << high) - 1), narrowed);
            }
        }
}

/* Rows of x lie x_row apart, an even number; k is a multiple of 32. Returns 0 without memory. */
int some_rows(const bf16 *x, long x_row, const bf16 *w, long n, long m, long k, bf16 *y, long y_row, int threads) {
    const long wide = (n + 15) / 16 * 16;
    uint32_t *columns = aligned_alloc(64, (size_t)(wide * k / 2) * sizeof *columns);
    if (!columns) return 0;
    Share shares[threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < k / 2; p += 16)
            for (long i = 0; i < n; i += 16)
                transpose16((const uint32_t *)(x + i * x_row) + p, x_row / 2, n - i < 16 ? n - i : 16, columns + p * wide + i, wide);
        Turns t = turns(shares, m, TALL);
        for (long r; (r = next_turn(&t)) >= 0;) {
            const long rows = m - r < TALL ? m - r : TALL;
            for (long i = 0; i < n; i += ACROSS)
                block_of(columns + i, wide, n - i < ACROSS ? n - i : ACROSS, w + r * k, rows, i + ACROSS < n ? 0 : m - r - rows, k, y + i * y_row + r, y_row);
        }
    }
    free(columns);
    return 1;
}

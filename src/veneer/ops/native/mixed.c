/* Low-rank updates of short runs of rows as a call of their own. */
#include <stdlib.h>

#include "mixed.h"

/* Returns 0 without memory. */
int low_rank_rows(const Updates *u, const bf16 *x, long x_row, long k, bf16 *y, long y_row, int threads) {
    bf16 *h = malloc((size_t)u->scratch * sizeof(bf16));
    if (!h) return 0;
#pragma omp parallel num_threads(threads)
    {
        share_shrinks(u, x, x_row, k, h);
#pragma omp barrier
        share_expands(u, h, y, y_row);
    }
    free(h);
    return 1;
}

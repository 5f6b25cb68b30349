/* Causal attention over packed sequences, forward and backward, for bf16 on CPUs with AVX512-BF16.
 *
 * The scores of a block are kept transposed, S^T[key][query]: 64 queries are four vectors, so maxima, sums and exponentials
 * run down the columns and no horizontal operation is left. Products take their operands as tile.h wants them:
 *   S^T  = K  Q^T        K as stored,   Q^T paired
 *   O^T += V^T P^T       V^T packed once for all heads of a group,   P^T paired as it is made
 *   dP^T = V  dO^T       V as stored,   dO^T paired
 *   dV  += P^T  dO       P^T row-major, dO paired
 *   dK  += dS^T Q        dS^T row-major, Q paired
 *   dQ^T+= K^T dS^T      K^T packed once,  dS^T paired
 * The forward pass goes over keys in chunks with a running maximum (arXiv 1805.02867); the backward pass makes P again from the
 * log-sum-exp. Sums are fp32. Work is cut by sequence, head and block, never inside a sum, so results do not depend on timing.
 */
#include <math.h>
#include <stdlib.h>

#include "tile.h"

#define Q 64        /* queries a block */
#define CHUNK 128   /* keys a chunk, forward */
#define STEP 64     /* keys a chunk, backward */
#define WIDEST 256  /* head dimension */

/* One sequence: queries [q0, q0 + n), keys [k0, k0 + t), both ending at the same position; packed: its place in a packed
 * transpose, in keys. */
typedef struct {
    long q0, n, k0, t, packed;
} piece;

typedef struct {
    const bf16 *q, *k, *v;
    long q_row, k_row, v_row; /* elements from one token to the next; heads are side by side */
    const piece *pieces;
    long count, heads, kv, d, window; /* window 0: none */
    float scale;
    long padded; /* keys of all packed transposes */
    int threads;
} problem;

static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }
static long up(long x, long unit) { return (x + unit - 1) / unit * unit; }

/* Which of the 16 queries from position i on may see key j. */
INLINE __mmask16 seen(long j, long i, long window) {
    long first = j - i;
    __mmask16 mask = first <= 0 ? 0xffff : first >= 16 ? 0 : (__mmask16)(0xffff << first);
    if (window > 0) {
        long past = j + window - i; /* queries from here on are too far */
        mask &= past <= 0 ? 0 : past >= 16 ? 0xffff : (__mmask16)((1 << past) - 1);
    }
    return mask;
}

/* out[kv head][d][padded keys]: the transpose of keys or values of every sequence, zero where there is no key. */
static void pack_transposes(const problem *p, const bf16 *from, long row, bf16 *out) {
    const long d = p->d;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(p->threads)
    for (long s = 0; s < p->count; s++)
        for (long h = 0; h < p->kv; h++) {
            const piece *z = p->pieces + s;
            uint32_t *to = (uint32_t *)(out + h * d * p->padded + z->packed);
            for (long j = 0; j < z->t; j += 32) {
                uint32_t words[16 * WIDEST];
                pair_rows(from + (z->k0 + j) * row + h * d, row, least(32, z->t - j), 32, d, words);
                for (long i = 0; i < d; i += 16) transpose16(words + i, d, 16, to + i * (p->padded / 2) + j / 2, p->padded / 2);
            }
        }
}

/* Rows [0, rows) of `from`, `d` wide, transposed and paired along d: to[d / 2][Q]. */
static void pack_columns(const bf16 *from, long row, long rows, long d, uint32_t *to) {
    for (long c = 0; c < up(rows, 16); c += 16)
        for (long j = 0; j < d; j += 32) {
            uint32_t words[16 * 16];
            if (d - j >= 32) {
                transpose16((const uint32_t *)(from + c * row + j), row / 2, rows - c, to + j / 2 * Q + c, Q);
            } else { /* the last 16 dimensions: 8 words a row */
                memset(words, 0, sizeof words);
                for (long i = 0; i < least(16, rows - c); i++) memcpy(words + 16 * i, from + (c + i) * row + j, 32);
                uint32_t turned[16 * 16];
                transpose16(words, 16, 16, turned, 16);
                for (long i = 0; i < 8; i++) memcpy(to + (j / 2 + i) * Q + c, turned + 16 * i, 64);
            }
        }
}

/* to[query][d] = from[d][query] * by[query], as bf16. */
static void unpack_columns(const float *from, const float *by, long rows, long d, bf16 *to, long row) {
    for (long c = 0; c < rows; c += 16)
        for (long j = 0; j < d; j += 16) {
            float block[16 * 16];
            transpose16((const uint32_t *)(from + j * Q + c), Q, 16, (uint32_t *)block, 16);
            for (long i = 0; i < least(16, rows - c); i++)
                store_bf16(to + (c + i) * row + j, _mm512_mul_ps(_mm512_loadu_ps(block + 16 * i), _mm512_set1_ps(by[c + i])));
        }
}

/* One block of queries of one head: out rows and their log-sum-exp. */
static void forward_block(const problem *p, const piece *z, long h, long start, const bf16 *vt, bf16 *out, float *lse) {
    const long d = p->d, g = h / (p->heads / p->kv), rows = least(Q, z->n - start), vectors = (rows + 15) / 16;
    const long first = z->t - z->n + start, end = first + rows;
    const long begin = p->window > 0 ? most(0, first - p->window + 1) & ~1L : 0;
    const float c = p->scale * LOG2E;
    float S[CHUNK * Q] __attribute__((aligned(64))), O[WIDEST * Q] __attribute__((aligned(64)));
    uint32_t qt[WIDEST / 2 * Q] __attribute__((aligned(64))), pairs[CHUNK / 2 * Q] __attribute__((aligned(64)));
    float top[Q], sum[Q];
    pack_columns(p->q + (z->q0 + start) * p->q_row + h * d, p->q_row, rows, d, qt);
    memset(O, 0, (size_t)d * Q * 4);
    for (int i = 0; i < Q; i++) top[i] = -1e30f, sum[i] = 0;

    for (long j = begin; j < end; j += CHUNK) {
        const long keys = least(CHUNK, end - j), even = keys + (keys & 1);
        const int mask = j + keys - 1 > first || (p->window > 0 && j <= end - 1 - p->window);
        product(keys, vectors, d / 2, p->k + (z->k0 + j) * p->k_row + g * d, p->k_row, qt, Q, S, Q, 0);
        for (long n = 0; n < vectors; n++) {
            float *s = S + 16 * n;
            __m512 old = _mm512_loadu_ps(top + 16 * n), high = old, total = _mm512_setzero_ps();
            for (long r = 0; r < keys; r++) {
                __m512 x = _mm512_load_ps(s + r * Q);
                if (mask) {
                    x = _mm512_mask_blend_ps(seen(j + r, first + 16 * n, p->window), _mm512_set1_ps(-INFINITY), x);
                    _mm512_store_ps(s + r * Q, x);
                }
                high = _mm512_max_ps(high, x);
            }
            const __m512 factor = _mm512_set1_ps(c), shift = _mm512_mul_ps(high, factor);
            const __m512 fade = exp2_16(_mm512_fmsub_ps(old, factor, shift));
            for (long r = 0; r < even; r += 2) {
                __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(s + r * Q), factor, shift)), b = _mm512_setzero_ps();
                if (r + 1 < keys) b = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(s + (r + 1) * Q), factor, shift));
                total = _mm512_add_ps(total, _mm512_add_ps(a, b));
                _mm512_store_si512(pairs + r / 2 * Q + 16 * n, pair(a, b));
            }
            _mm512_storeu_ps(sum + 16 * n, _mm512_fmadd_ps(_mm512_loadu_ps(sum + 16 * n), fade, total));
            _mm512_storeu_ps(top + 16 * n, high);
            if (j > begin)
                for (long r = 0; r < d; r++)
                    _mm512_store_ps(O + r * Q + 16 * n, _mm512_mul_ps(_mm512_load_ps(O + r * Q + 16 * n), fade));
        }
        product(d, vectors, even / 2, vt + g * d * p->padded + z->packed + j, p->padded, pairs, Q, O, Q, 1);
    }
    float by[Q];
    for (long i = 0; i < rows; i++) {
        by[i] = 1.0f / sum[i];
        lse[(z->q0 + start + i) * p->heads + h] = top[i] * p->scale + logf(sum[i]);
    }
    unpack_columns(O, by, rows, d, out + (z->q0 + start) * p->heads * d + h * d, p->heads * d);
}

/* out and lse are contiguous [tokens][heads](d); vt holds kv * d * padded bf16. */
void attention_forward(const problem *p, bf16 *vt, bf16 *out, float *lse) {
    pack_transposes(p, p->v, p->v_row, vt);
    long longest = 0;
    for (long s = 0; s < p->count; s++) longest = most(longest, p->pieces[s].n);
    const long blocks = (longest + Q - 1) / Q;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(p->threads)
    for (long b = 0; b < blocks; b++) /* late blocks see most keys: they go first */
        for (long s = 0; s < p->count; s++)
            for (long h = 0; h < p->heads; h++) {
                const long start = (blocks - 1 - b) * Q;
                if (start < p->pieces[s].n) forward_block(p, p->pieces + s, h, start, vt, out, lse);
            }
}

/* What a block of queries brings to the backward pass, in every form its products want. */
typedef struct {
    uint32_t qt[WIDEST / 2 * Q], dot[WIDEST / 2 * Q], qp[Q / 2 * WIDEST], dop[Q / 2 * WIDEST];
    float S[STEP * Q], dP[STEP * Q], dQ[WIDEST * Q], lse[Q], inner[Q];
    bf16 P[STEP * Q], dS[STEP * Q];
    uint32_t pairs[STEP / 2 * Q];
} __attribute__((aligned(64))) work;

/* P and dS of one chunk from S and dP, in the forms that the products want. */
static void slopes(const problem *p, work *w, long keys, long vectors, long j, long first, int mask) {
    const long even = keys + (keys & 1);
    const __m512 factor = _mm512_set1_ps(p->scale * LOG2E), scale = _mm512_set1_ps(p->scale);
    for (long n = 0; n < vectors; n++) {
        const __m512 lse = _mm512_loadu_ps(w->lse + 16 * n), inner = _mm512_loadu_ps(w->inner + 16 * n);
        for (long r = 0; r < even; r += 2) {
            __m512 ds[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (long e = 0; e < 2 && r + e < keys; e++) {
                const long at = (r + e) * Q + 16 * n;
                __m512 x = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(w->S + at), factor, lse));
                if (mask) x = _mm512_maskz_mov_ps(seen(j + r + e, first + 16 * n, p->window), x);
                ds[e] = _mm512_mul_ps(_mm512_mul_ps(x, scale), _mm512_sub_ps(_mm512_load_ps(w->dP + at), inner));
                store_bf16(w->P + at, x);
                store_bf16(w->dS + at, ds[e]);
            }
            _mm512_store_si512(w->pairs + r / 2 * Q + 16 * n, pair(ds[0], ds[1]));
        }
    }
}

static void backward_block(const problem *p, const piece *z, long h, long start, const bf16 *d_out, const float *lse,
                           const float *inner, const bf16 *kt, bf16 *dq, float *dk, float *dv, work *w) {
    const long d = p->d, g = h / (p->heads / p->kv), rows = least(Q, z->n - start), vectors = (rows + 15) / 16;
    const long first = z->t - z->n + start, end = first + rows, wide = p->heads * d, cells = 16 * vectors;
    const long begin = p->window > 0 ? most(0, first - p->window + 1) & ~1L : 0;
    const bf16 *q = p->q + (z->q0 + start) * p->q_row + h * d, *ours = d_out + (z->q0 + start) * wide + h * d;
    pack_columns(q, p->q_row, rows, d, w->qt);
    pack_columns(ours, wide, rows, d, w->dot);
    pair_rows(q, p->q_row, rows, cells, d, w->qp);
    pair_rows(ours, wide, rows, cells, d, w->dop);
    for (long i = 0; i < Q; i++) { /* columns without a query: P = 0 */
        const long at = (z->q0 + start + i) * p->heads + h;
        w->lse[i] = i < rows ? lse[at] * LOG2E : 1e30f;
        w->inner[i] = i < rows ? inner[at] : 0;
    }
    memset(w->dQ, 0, (size_t)d * Q * 4);
    for (long j = begin; j < end; j += STEP) {
        const long keys = least(STEP, end - j), even = keys + (keys & 1);
        const int mask = j + keys - 1 > first || (p->window > 0 && j <= end - 1 - p->window);
        product(keys, vectors, d / 2, p->k + (z->k0 + j) * p->k_row + g * d, p->k_row, w->qt, Q, w->S, Q, 0);
        product(keys, vectors, d / 2, p->v + (z->k0 + j) * p->v_row + g * d, p->v_row, w->dot, Q, w->dP, Q, 0);
        slopes(p, w, keys, vectors, j, first, mask);
        product(keys, d / 16, cells / 2, w->P, Q, w->dop, d, dv + j * d, d, 1);
        product(keys, d / 16, cells / 2, w->dS, Q, w->qp, d, dk + j * d, d, 1);
        product(d, vectors, even / 2, kt + g * d * p->padded + z->packed + j, p->padded, w->pairs, Q, w->dQ, Q, 1);
    }
    float ones[Q];
    for (int i = 0; i < Q; i++) ones[i] = 1;
    unpack_columns(w->dQ, ones, rows, d, dq + (z->q0 + start) * wide + h * d, wide);
}

/* The sum over d of d_out * out, for each row and head. */
static void inner_products(const problem *p, long tokens, const bf16 *d_out, const bf16 *out, float *inner) {
#pragma omp parallel for num_threads(p->threads)
    for (long r = 0; r < tokens * p->heads; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < p->d; j += 16)
            sum = _mm512_fmadd_ps(load_bf16(d_out + r * p->d + j), load_bf16(out + r * p->d + j), sum);
        inner[r] = _mm512_reduce_add_ps(sum);
    }
}

/* d_out, out, dq contiguous [tokens][heads][d], lse and inner [tokens][heads]; dk, dv contiguous [keys][kv][d].
 * kt holds kv * d * padded bf16; sums holds 2 * splits * kv * d * padded floats. The heads of a group are shared out among
 * `splits` workers, which divides them. Returns 0, or 1 without memory. */
int attention_backward(const problem *p, long tokens, const bf16 *d_out, const bf16 *out, const float *lse, float *inner, bf16 *kt,
                       float *sums, long splits, bf16 *dq, bf16 *dk, bf16 *dv) {
    const long d = p->d, group = p->heads / p->kv, share = group / splits;
    int failed = 0;
    inner_products(p, tokens, d_out, out, inner);
    pack_transposes(p, p->k, p->k_row, kt);
#pragma omp parallel num_threads(p->threads)
    {
        work *w = aligned_alloc(64, up(sizeof(work), 64));
        if (!w) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for collapse(3) schedule(dynamic)
        for (long s = 0; s < p->count; s++)
            for (long g = 0; g < p->kv; g++)
                for (long part = 0; part < splits; part++) {
                    const piece *z = p->pieces + s;
                    float *dks = sums + (((part * p->kv) + g) * p->padded + z->packed) * 2 * d, *dvs = dks + z->t * d;
                    if (!w) continue;
                    memset(dks, 0, (size_t)z->t * d * 8);
                    for (long h = g * group + part * share; h < g * group + (part + 1) * share; h++)
                        for (long start = 0; start < z->n; start += Q)
                            backward_block(p, z, h, start, d_out, lse, inner, kt, dq, dks, dvs, w);
                }
        free(w);
#pragma omp for collapse(2) schedule(static)
        for (long s = 0; s < p->count; s++)
            for (long g = 0; g < p->kv; g++) {
                const piece *z = p->pieces + s;
                for (long which = 0; which < 2; which++)
                    for (long j = 0; j < z->t; j++)
                        for (long i = 0; i < d; i += 16) {
                            __m512 total = _mm512_setzero_ps();
                            for (long part = 0; part < splits; part++)
                                total = _mm512_add_ps(
                                    total, _mm512_loadu_ps(sums + (((part * p->kv) + g) * p->padded + z->packed) * 2 * d +
                                                           which * z->t * d + j * d + i));
                            store_bf16((which ? dv : dk) + (z->k0 + j) * p->kv * d + g * d + i, total);
                        }
            }
    }
    return failed;
}

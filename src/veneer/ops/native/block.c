/* The blocks of a decoder for a handful of rows that read one token each, in one call and one parallel region.
 *
 *     a = h + o(attention(rotary(qkv(norm(h)))))        y = a + down(act(gate) * up),  gate | up = up(norm(a))
 *
 * with norms on what is added, or on q and k, where the model has them.
 * Nothing here is new: these are the functions of few.c, rows.c and mixed.c, in their order and with their roundings, so the result
 * is theirs bit for bit. What goes is the way back to Python after each, a dozen times a block, which took half as long as the weights.
 */
#include <stdlib.h>

#include "few.h"
#include "mixed.h"
#include "rows.h"

typedef struct {
    Weight weight;
    int64_t kind, out;
} Piece;

/* Pieces under each other share one input. The bias is NULL or `out` long. */
typedef struct {
    const Piece *pieces;
    const bf16 *bias;
    int64_t count, in, out;
} Product;

typedef struct {
    Product qkv, o, up, down;
    const float *attn_norm, *mlp_norm, *post_attn_norm, *post_mlp_norm, *q_norm, *k_norm; /* each may be NULL: not normed */
    float eps, scale, k, e;
    int64_t heads, kv, d, half, window, whole, local; /* whole: q and k are normed over all heads together; local: the second angles */
} Block;

/* Of each row, [n][half]. */
typedef struct {
    const float *cosines, *sines;
} Angles;

/* `shares` moves on past those that this takes, on every thread alike. Compiled once, not for each of its callers. */
static __attribute__((noinline)) void share_product(const Product *p, const bf16 *x, long n, bf16 *y, Share **shares) {
    long first = 0;
    for (long i = 0; i < p->count; first += p->pieces[i++].out) {
        const Piece *piece = p->pieces + i;
        bf16 *to = y + first;
        switch (piece->kind) {
        case TWELVE: share_rows(TWELVE, x, p->in, &piece->weight, n, piece->out, p->in, to, p->out, SET, *shares); break;
        case INT8: share_rows(INT8, x, p->in, &piece->weight, n, piece->out, p->in, to, p->out, SET, *shares); break;
        default: share_rows(BF16, x, p->in, &piece->weight, n, piece->out, p->in, to, p->out, SET, *shares);
        }
        *shares += omp_get_num_threads();
    }
}

/* In place, `count` pieces of d; nothing without weights. */
INLINE void norm(bf16 *x, long count, long d, const float *w, float eps) {
    if (!w) return;
    for (long i = 0; i < count; i++) rms_row(x + i * d, d, w, eps, x + i * d);
}

/* y = x W^T + updates, complete when it returns; biases are added by whoever reads a row next. */
INLINE void projected(const Product *p, const Updates *u, const bf16 *x, long n, bf16 *h, bf16 *y, Share **shares) {
    share_product(p, x, n, y, shares);
    if (u) share_shrinks(u, x, p->in, p->in, h);
#pragma omp barrier
    if (!u) return;
    share_expands(u, h, y, p->out);
#pragma omp barrier
}

/* Inside a parallel region: h is replaced by the residual stream after block `b`. updates[0..3] are those of qkv, o, up, down. */
static void one_block(const Block *b, long layer, const Place *places, const Angles *angles, const Updates *const *updates, bf16 *h,
                      long n, bf16 *scratch, Share **shares) {
    const long hidden = b->qkv.in, wide = b->qkv.out, f = b->down.in, q = b->heads * b->d, kv = b->kv * b->d, group = b->heads / b->kv;
    const float *cosines = angles[b->local].cosines, *sines = angles[b->local].sines;
    bf16 *normed = scratch, *a = normed + n * hidden, *qkv = a + n * hidden, *heads = qkv + n * wide;
    bf16 *gate_up = heads + n * q, *inner = gate_up + n * 2 * f, *y = inner + n * f, *ranks = y + n * hidden;
#pragma omp for schedule(static)
    for (long r = 0; r < n; r++) {
        memcpy(normed + r * hidden, h + r * hidden, (size_t)hidden * 2);
        norm(normed + r * hidden, 1, hidden, b->attn_norm, b->eps);
    }
    projected(&b->qkv, updates[0], normed, n, ranks, qkv, shares);
#pragma omp for schedule(static)
    for (long r = 0; r < n; r++) {
        bf16 *row = qkv + r * wide, *key = key_of(places + r, layer);
        if (b->qkv.bias) add_row(row, b->qkv.bias, wide);
        norm(row, b->whole ? 1 : b->heads, b->whole ? q : b->d, b->q_norm, b->eps);
        norm(row + q, b->whole ? 1 : b->kv, b->whole ? kv : b->d, b->k_norm, b->eps);
        rotary_row(row, b->heads, b->d, b->half, cosines + r * b->half, sines + r * b->half, 1.0f, row);
        rotary_row(row + q, b->kv, b->d, b->half, cosines + r * b->half, sines + r * b->half, 1.0f, key);
        memcpy(key + places[r].value_step, row + q + kv, (size_t)kv * 2);
    }
    share_places(qkv, wide, NULL, places, n, layer, b->kv, group, b->d, b->window, b->scale, heads, q, *shares);
    *shares += omp_get_num_threads();
#pragma omp barrier
    projected(&b->o, updates[1], heads, n, ranks, a, shares);
#pragma omp for schedule(static)
    for (long r = 0; r < n; r++) {
        bf16 *row = a + r * hidden;
        if (b->o.bias) add_row(row, b->o.bias, hidden);
        norm(row, 1, hidden, b->post_attn_norm, b->eps);
        add_row(row, h + r * hidden, hidden);
        memcpy(normed + r * hidden, row, (size_t)hidden * 2);
        norm(normed + r * hidden, 1, hidden, b->mlp_norm, b->eps);
    }
    projected(&b->up, updates[2], normed, n, ranks, gate_up, shares);
#pragma omp for schedule(static)
    for (long r = 0; r < n; r++) {
        if (b->up.bias) add_row(gate_up + r * 2 * f, b->up.bias, 2 * f);
        gated_row(gate_up + r * 2 * f, f, b->k, b->e, inner + r * f);
    }
    projected(&b->down, updates[3], inner, n, ranks, y, shares);
#pragma omp for schedule(static) nowait /* the next to touch these rows is the same thread */
    for (long r = 0; r < n; r++) {
        if (b->down.bias) add_row(y + r * hidden, b->down.bias, hidden);
        norm(y + r * hidden, 1, hidden, b->post_mlp_norm, b->eps);
        add_row(y + r * hidden, a + r * hidden, hidden);
        memcpy(h + r * hidden, y + r * hidden, (size_t)hidden * 2);
    }
}

/* `count` blocks on the residual stream h [n][hidden], in place; updates has four for each. cosines and sines are [n][half], those of
 * global and of local layers. At the end h is normed by `final`, fp32, unless that is NULL. Returns 0 without memory. */
int decode_blocks(const Block *const *blocks, long count, const Place *places, const Angles *angles, const Updates *const *updates, bf16 *h,
                  long n, const float *final, int threads) {
    long most = 0, loops = 0;
    for (long l = 0; l < count; l++) {
        const Block *b = blocks[l];
        loops += b->qkv.count + b->o.count + b->up.count + b->down.count + 1;
        long ranks = 0;
        for (int i = 0; i < 4; i++)
            if (updates[4 * l + i] && updates[4 * l + i]->scratch > ranks) ranks = updates[4 * l + i]->scratch;
        const long needed = n * (3 * b->qkv.in + b->qkv.out + b->heads * b->d + 3 * b->down.in) + ranks;
        if (needed > most) most = needed;
    }
    const size_t sharing = (size_t)(loops * threads) * sizeof(Share), needed = sharing + (size_t)most * sizeof(bf16);
    char *room = aligned_alloc(64, (needed + 63) / 64 * 64);
    if (!room) return 0;
    memset(room, 0, sharing);
    bf16 *scratch = (bf16 *)(room + sharing);
#pragma omp parallel num_threads(threads)
    {
        Share *shares = (Share *)room;
        for (long l = 0; l < count; l++) one_block(blocks[l], l, places, angles, updates + 4 * l, h, n, scratch, &shares);
        const long hidden = blocks[0]->qkv.in;
#pragma omp for schedule(static)
        for (long r = 0; r < n; r++) norm(h + r * hidden, 1, hidden, final, blocks[0]->eps);
    }
    free(room);
    return 1;
}

/* Decoding: a handful of rows, so everything is as fast as memory. Each weight, key and value is read once, where it lies.
 *
 * Libraries copy the weight into a layout of their own first, or keep such a copy. For up to 32 rows that is not needed: both
 * operands run along k, so a register of 32 products is summed at the end of each row of W.
 */
#pragma once
#include <math.h>

#include "share.h"
#include "tile.h"

#define CHUNK 128
#define WIDEST 256
#define HEADS 16 /* queries that share a key */
#define AHEAD 8192 /* bytes of W asked for before they are needed: into the second cache, where many can be on their way */
#define TAKEN 32 /* rows of W that a thread takes at a time */
#define ROOM (1 << 18) /* bytes of keys and values that are brought to the cache at a time */

enum { SET, ADD, WIDE }; /* what becomes of a product: y = bf16, y += bf16, y = fp32 as it was summed */
enum { BF16 = 64, TWELVE = 48, INT8 = 32 }; /* how weights are stored, and the bytes of 32 of them */

/* Rows of weights where they lie.
 *   INT8    one byte a weight, times `scale` of the row
 *   TWELVE  a bf16 weight is its low byte, and four bits for its high one: the sign, and which of eight it is that `high` of the row counts.
 *           A block of 64 weights is 32 bytes of fours, then 64 low bytes: those of weights 8i to 8i + 7 and 32 + 8i to 39 + 8i lie together,
 *           as they have to for two registers to come out in order. What has none of the eight is listed: row r has values[first[r]] to
 *           values[first[r + 1]] at `places`, which count the weights of the whole matrix. */
typedef struct {
    const char *rows;
    const float *scale;
    const uint8_t *high;
    const int64_t *first, *places;
    const bf16 *values;
} Weight;

/* The high bytes that sixteen fours stand for: sign, and `high` + 0 to 7; where its top bit is set 0 stands for zero. */
INLINE __m512i high_bytes(uint8_t high) {
    const __m128i one_of_eight = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7), sign = _mm_set_epi64x((int64_t)0x8080808080808080, 0);
    const __m128i exponent = _mm_maskz_add_epi8(high & 0x80 ? 0xfefe : 0xffff, one_of_eight, _mm_set1_epi8((char)(high & 0x7f)));
    return _mm512_broadcast_i32x4(_mm_or_si128(exponent, sign));
}

typedef struct {
    __m512i half[2];
} Weights;

/* 64 weights of TWELVE, else the 32 at `p` as the first half. Every int8 is a bf16. */
INLINE Weights weights(const int kind, const char *p, __m512i table) {
    if (kind == BF16) return (Weights){{_mm512_loadu_si512(p)}};
    if (kind == TWELVE) {
        const __m512i fours = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)), low = _mm512_loadu_si512(p + 32);
        const __m512i apart = _mm512_and_si512(_mm512_or_si512(fours, _mm512_slli_epi16(fours, 4)), _mm512_set1_epi8(15));
        const __m512i high = _mm512_shuffle_epi8(table, apart);
        return (Weights){{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
    }
    const __m256i codes = _mm256_loadu_si256((const __m256i *)p);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return (Weights){{(__m512i)_mm512_cvtne2ps_pbh(high, low)}};
}

/* A way through the listed weights of row r: `column` is where the next of them is, beyond the row when there is none. */
typedef struct {
    const Weight *w;
    int64_t i, start, end, column;
} Listed;

INLINE int64_t next_listed(const Listed *l) { return l->i < l->end ? l->w->places[l->i] - l->start : INT64_MAX - 64; }

INLINE Listed listed_of(const int kind, const Weight *w, long r, long k) {
    Listed found = {w, 0, r * k, 0, INT64_MAX - 64};
    if (kind == TWELVE) found.i = w->first[r], found.end = w->first[r + 1], found.column = next_listed(&found);
    return found;
}

/* The 64 weights from column j on with those that are listed. */
static __attribute__((noinline)) Weights completed(Weights found, Listed *l, long j) {
    bf16 plain[64];
    memcpy(plain, &found, sizeof plain);
    for (; l->column < j + 64; l->i++, l->column = next_listed(l)) plain[l->column - j] = l->w->values[l->i];
    memcpy(&found, plain, sizeof plain);
    return found;
}

/* Row r of TWELVE as it was; k is a multiple of 64. */
INLINE void plain_row(const Weight *w, long r, long k, bf16 *to) {
    const __m512i table = high_bytes(w->high[r]);
    const char *p = w->rows + r * (k / 32 * TWELVE);
    for (long j = 0; j < k; j += 64, p += 2 * TWELVE) {
        const Weights found = weights(TWELVE, p, table);
        memcpy(to + j, &found, sizeof found);
    }
    for (int64_t i = w->first[r]; i < w->first[r + 1]; i++) to[w->places[i] - r * k] = w->values[i];
}

/* Lane r is the sum over the lanes of a[r]. */
INLINE __m512 sums_of(const __m512 *a) {
    __m512 two[8], four[4], eight[2];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d even = _mm512_castps_pd(two[2 * i]), odd = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

/* a += x u^T and b += x v^T for `n` rows of x. */
INLINE void multiply(const int n, const int halves, const bf16 *x, long x_row, Weights u, Weights v, __m512 *a, __m512 *b) {
    for (int half = 0; half < halves; half++)
        for (int i = 0; i < n; i++) {
            const __m512i row = _mm512_loadu_si512(x + i * x_row + 32 * half);
            a[i] = dot(a[i], u.half[half], row);
            b[i] = dot(b[i], v.half[half], row);
        }
}

/* Rows r and r + 1 of W, where there are both, against `n` rows of x. y_row counts elements of y. */
INLINE void two_rows(const int n, const int kind, const bf16 *x, long x_row, const Weight *w, long r, long k, void *out, long y_row, int both,
                     const int how) {
    __m512 a[8], b[8];
    const int halves = kind == TWELVE ? 2 : 1;
    const char *one = w->rows + r * (k / 32 * kind), *two = one + (both ? k / 32 * kind : 0);
    const __m512i first = high_bytes(kind == TWELVE ? w->high[r] : 0), second = high_bytes(kind == TWELVE ? w->high[r + both] : 0);
    for (int i = 0; i < n; i++) a[i] = b[i] = _mm512_setzero_ps();
    Listed mine = listed_of(kind, w, r, k), other = listed_of(kind, w, r + both, k);
    for (long j = 0; j < k;) {
        const int64_t next = (mine.column < other.column ? mine.column : other.column) / 64 * 64, stop = next < k ? next : k;
        for (; j < stop; j += 32 * halves, one += halves * kind, two += halves * kind) {
            for (int half = 0; half < halves; half++) {
                _mm_prefetch(one + half * kind + AHEAD, _MM_HINT_T1);
                _mm_prefetch(two + half * kind + AHEAD, _MM_HINT_T1);
            }
            multiply(n, halves, x + j, x_row, weights(kind, one, first), weights(kind, two, second), a, b);
        }
        if (kind != TWELVE || j == k) break;
        multiply(n, halves, x + j, x_row, completed(weights(kind, one, first), &mine, j), completed(weights(kind, two, second), &other, j), a, b);
        j += 64, one += 2 * kind, two += 2 * kind;
    }
    __m512 sums[16];
    for (int i = 0; i < 8; i++) sums[2 * i] = i < n ? a[i] : _mm512_setzero_ps(), sums[2 * i + 1] = i < n ? b[i] : _mm512_setzero_ps();
    __m512 sum = sums_of(sums);
    if (kind == INT8) sum = _mm512_mul_ps(sum, _mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(w->scale[r]), _mm512_set1_ps(w->scale[r + both])));
    if (how == WIDE) {
        float each[16];
        _mm512_storeu_ps(each, sum);
        for (int i = 0; i < n; i++) memcpy((float *)out + i * y_row, each + 2 * i, both ? 8 : 4);
        return;
    }
    bf16 narrowed[16] = {0}, *y = out;
    if (how == ADD) {
        for (int i = 0; i < n; i++) memcpy(narrowed + 2 * i, y + i * y_row, both ? 4 : 2);
        sum = _mm512_add_ps(sum, load_bf16(narrowed));
    }
    store_bf16(narrowed, sum);
    for (int i = 0; i < n; i++) memcpy(y + i * y_row, narrowed + 2 * i, both ? 4 : 2);
}

INLINE void up_to_eight(long n, const int kind, const bf16 *x, long x_row, const Weight *w, long r, long k, void *y, long y_row, int both,
                        const int how) {
    switch (n) {
    case 1: two_rows(1, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 2: two_rows(2, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 3: two_rows(3, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 4: two_rows(4, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 5: two_rows(5, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 6: two_rows(6, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    case 7: two_rows(7, kind, x, x_row, w, r, k, y, y_row, both, how); break;
    default: two_rows(8, kind, x, x_row, w, r, k, y, y_row, both, how);
    }
}

/* Inside a parallel region: y[n][m] = x[n][k] w[m][k]^T, shared out among its threads, with no barrier at the end. */
INLINE void share_rows(const int kind, const bf16 *x, long x_row, const Weight *w, long n, long m, long k, void *y, long y_row, const int how,
                       Share *shares) {
    Turns t = turns(shares, m, TAKEN);
    for (long from; (from = next_turn(&t)) >= 0;)
        for (long r = from; r < m && r < from + TAKEN; r += 2)
            for (long i = 0; i < n; i += 8) {
                void *to = how == WIDE ? (void *)((float *)y + i * y_row + r) : (void *)((bf16 *)y + i * y_row + r);
                up_to_eight(n - i < 8 ? n - i : 8, kind, x + i * x_row, x_row, w, r, k, to, y_row, r + 1 < m, how);
            }
}

INLINE __m512i columns(const bf16 *row, long d, long from) {
    return _mm512_maskz_loadu_epi16(d - from < 32 ? 0xffff : 0xffffffff, row + from);
}

/* q k of one query and up to 16 keys, -inf for those beyond `keys`. */
INLINE __m512 scores_of(const bf16 *q, const bf16 *k, long k_row, long keys, long d) {
    __m512 sums[16];
    for (int m = 0; m < 16; m++) sums[m] = _mm512_setzero_ps();
    for (long i = 0; i < d; i += 32) {
        const __m512i query = columns(q, d, i);
        if (keys >= 16)
            for (int m = 0; m < 16; m++) sums[m] = dot(sums[m], query, columns(k + m * k_row, d, i));
        else
            for (int m = 0; m < 16; m++) sums[m] = dot(sums[m], query, columns(k + (m < keys ? m : 0) * k_row, d, i));
    }
    const __mmask16 valid = keys >= 16 ? 0xffff : (__mmask16)((1u << keys) - 1);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), valid, sums_of(sums));
}

/* O += P V for `n` queries and 32 columns. A pair of rows of V is interleaved within lanes of four words, so O has its columns in the
 * order 0-3, 8-11, 16-19, 24-27 and then the others, until `restored`. */
INLINE void weigh(const int n, const bf16 *P, const bf16 *v, long v_row, long keys, long d, long from, float *O, long o_row) {
    __m512 low[4], high[4];
    for (int h = 0; h < n; h++) low[h] = _mm512_loadu_ps(O + h * o_row), high[h] = _mm512_loadu_ps(O + h * o_row + 16);
    for (long j = 0; j < keys; j += 2) {
        const __m512i even = columns(v + j * v_row, d, from);
        const __m512i odd = j + 1 < keys ? columns(v + (j + 1) * v_row, d, from) : _mm512_setzero_si512();
        const __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
        for (int h = 0; h < n; h++) {
            uint32_t word;
            memcpy(&word, P + h * CHUNK + j, 4);
            const __m512i weights = _mm512_set1_epi32((int)word);
            low[h] = dot(low[h], weights, first);
            high[h] = dot(high[h], weights, second);
        }
    }
    for (int h = 0; h < n; h++) _mm512_storeu_ps(O + h * o_row, low[h]), _mm512_storeu_ps(O + h * o_row + 16, high[h]);
}

INLINE __m512 restored(const float *O, const int half) {
    const __m512 low = _mm512_loadu_ps(O), high = _mm512_loadu_ps(O + 16);
    const __m512 both = half ? _mm512_shuffle_f32x4(low, high, 0xee) : _mm512_shuffle_f32x4(low, high, 0x44);
    return _mm512_shuffle_f32x4(both, both, 0xd8);
}

/* The queries of one group of heads against one sequence's keys [begin, end), CHUNK at a time with a running maximum. */
static void decode_group(const bf16 *q, const bf16 *k, const bf16 *v, long k_row, long v_row, long begin, long end, long group, long d,
                         float scale, bf16 *out) {
    float S[CHUNK], O[HEADS * WIDEST], tops[HEADS], sums[HEADS];
    bf16 P[HEADS * CHUNK];
    const long wide = (d + 31) / 32 * 32;
    const __m512 factor = _mm512_set1_ps(scale * LOG2E);
    memset(O, 0, (size_t)(group * wide) * sizeof *O);
    for (long h = 0; h < group; h++) tops[h] = -1e30f, sums[h] = 0;
    for (long j = begin; j < end; j += CHUNK) {
        const long keys = end - j < CHUNK ? end - j : CHUNK;
        for (long r = j + CHUNK; r < j + 2 * CHUNK && r < end; r++)
            for (long i = 0; i < d; i += 32) {
                _mm_prefetch((const char *)(k + r * k_row + i), _MM_HINT_T0);
                _mm_prefetch((const char *)(v + r * v_row + i), _MM_HINT_T0);
            }
        for (long h = 0; h < group; h++) {
            __m512 high = _mm512_set1_ps(tops[h]), sum = _mm512_setzero_ps();
            for (long r = 0; r < keys; r += 16) {
                const __m512 s = scores_of(q + h * d, k + (j + r) * k_row, k_row, keys - r, d);
                high = _mm512_max_ps(high, s);
                _mm512_storeu_ps(S + r, s);
            }
            const float top = _mm512_reduce_max_ps(high);
            const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(top), factor);
            for (long r = 0; r < keys; r += 16) {
                const __m512 p = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(S + r), factor, shift));
                sum = _mm512_add_ps(sum, p);
                store_bf16(P + h * CHUNK + r, p);
            }
            const __m512 fade = exp2_16(_mm512_fmsub_ps(_mm512_set1_ps(tops[h]), factor, shift));
            sums[h] = sums[h] * _mm512_cvtss_f32(fade) + _mm512_reduce_add_ps(sum);
            tops[h] = top;
            for (long i = 0; i < wide && j > begin; i += 16)
                _mm512_storeu_ps(O + h * wide + i, _mm512_mul_ps(_mm512_loadu_ps(O + h * wide + i), fade));
        }
        for (long i = 0; i < d; i += 32)
            for (long h = 0; h < group; h += 4) {
                const bf16 *weights = P + h * CHUNK, *values = v + j * v_row;
                float *to = O + h * wide + i;
                switch (group - h) {
                case 1: weigh(1, weights, values, v_row, keys, d, i, to, wide); break;
                case 2: weigh(2, weights, values, v_row, keys, d, i, to, wide); break;
                case 3: weigh(3, weights, values, v_row, keys, d, i, to, wide); break;
                default: weigh(4, weights, values, v_row, keys, d, i, to, wide);
                }
            }
    }
    for (long h = 0; h < group; h++)
        for (long i = 0; i < d; i += 16) {
            const float *from = O + h * wide + i / 32 * 32;
            store_bf16(out + h * d + i, _mm512_div_ps(i % 32 ? restored(from, 1) : restored(from, 0), _mm512_set1_ps(sums[h])));
        }
}

/* Where a row's sequence keeps what it has read: keys at store + layer * layer_step + position * position_step, values value_step
 * further. `at` is the position that the row takes. Steps count elements. */
typedef struct {
    bf16 *store;
    int64_t layer_step, value_step, position_step, at;
} Place;

INLINE bf16 *key_of(const Place *p, long layer) {
    return p->store + layer * p->layer_step + p->at * p->position_step;
}

/* Reads a word of each line of `count` keys and values: so few instructions that many lines are on their way at a time. */
INLINE void touch(const int lines, const bf16 *keys, const bf16 *values, long step, long count) {
    for (; count-- > 0; keys += step, values += step) {
        for (int i = 0; i < lines; i++) (void)*(const volatile bf16 *)(keys + 32 * i);
        for (int i = 0; i < lines; i++) (void)*(const volatile bf16 *)(values + 32 * i);
    }
}

/* Brings to the cache what a thread's next pairs of a row and a group of its heads attend to, from `pair` on, up to ROOM bytes. Returns the
 * first pair that is left. It lies in thousands of small pieces, and a processor drops prefetches for which it had to look up the page. */
INLINE long bring(const Place *places, long layer, long pair, long stop, long kv, long d, long window) {
    for (long bytes = 0; pair < stop && bytes < ROOM; pair++) {
        const Place *p = places + pair / kv;
        const long begin = window > 0 && p->at + 1 > window ? p->at + 1 - window : 0, step = p->position_step, count = p->at + 1 - begin;
        const bf16 *keys = p->store + layer * p->layer_step + begin * step + pair % kv * d, *values = keys + p->value_step;
        switch (d) {
        case 64: touch(2, keys, values, step, count); break;
        case 128: touch(4, keys, values, step, count); break;
        default: for (long i = 0; i < d; i += 32) touch(1, keys + i, values + i, step, count);
        }
        bytes += count * d * 4;
    }
    return pair;
}

/* Inside a parallel region, with no barrier at the end: what the rows at `places`, whose keys and values are stored, see of their
 * sequences. Row i of q and out is rows[i], or i where that is NULL. */
INLINE void share_places(const bf16 *q, long q_row, const int64_t *rows, const Place *places, long n, long layer, long kv, long group, long d,
                         long window, float scale, bf16 *out, long out_row, Share *shares) {
    const long pairs = n * kv;
    Turns t = turns(shares, pairs, 1);
    for (long pair, brought = 0; (pair = next_turn(&t)) >= 0;) {
        const long stop = t.helping ? pair + 1 : pairs * (t.self + 1) / t.threads, i = pair / kv, row = rows ? rows[i] : i;
        const long first = pair % kv * group * d, end = places[i].at + 1, begin = window > 0 && end > window ? end - window : 0;
        const bf16 *keys = places[i].store + layer * places[i].layer_step + pair % kv * d;
        if (t.helping || pair >= brought) brought = bring(places, layer, pair, stop, kv, d, window);
        decode_group(q + row * q_row + first, keys, keys + places[i].value_step, places[i].position_step, places[i].position_step, begin, end,
                     group, d, scale, out + row * out_row + first);
    }
}

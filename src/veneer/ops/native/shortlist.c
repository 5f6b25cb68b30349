/* The likeliest token of each row, and its score to the bit, without reading the whole vocabulary in full.
 *
 * A sketch holds every row of W as bytes: code = 128 + w / scale, rounded. With the length of what rounding left, `error`, it bounds a score:
 *   |x w - x sketch| <= |x| error            (Cauchy and Schwarz)
 * One pass over the sketch, half of W's bytes, leaves the few rows whose upper bound reaches the largest lower bound. Those are
 * multiplied as `few_scores` multiplies all, so what is found is what it would have found.
 *
 * Sixteen rows of W lie together, four codes of each in turn: a register has four of all sixteen, and no sum goes across its lanes. x is in
 * levels, two signed bytes each.
 */
#include "few.h"

#define LANES 16
#define LEVELS 8128 /* of x to either side, at most */
#define LIST 4096 /* rows of W that may be left, of one x and one thread */

typedef struct {
    const uint8_t *codes; /* [m / 16][k / 4][16][4], rounded up */
    const float *scale, *error; /* [m], rounded up to 16 */
    float longest; /* no row of W or of the sketch is longer */
} Sketch;

/* One x: its levels, k high bytes and then k low ones; what codes that are 128 too large add to a sum, negated; the score of one step of
 * such a sum; its length; and the part of a score's bound that does not depend on the row of W. */
typedef struct {
    int8_t *levels;
    int32_t offset;
    float step, length, slack;
} Row;

/* Rows of W that may be the likeliest for one x. */
typedef struct {
    long size;
    struct { float upper; int32_t row; } found[LIST];
} List;

INLINE __m512 near_of(__m512 x, __m512 inverse) {
    return _mm512_roundscale_ps(_mm512_mul_ps(x, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Codes of one row; its scale, error and length, the last two rounded up. */
static void sketch_row(const bf16 *row, long k, uint8_t *codes, float *scale, float *error, float *length) {
    __m512 top = _mm512_setzero_ps(), left = top, whole = top;
    for (long j = 0; j < k; j += 16) top = _mm512_max_ps(top, _mm512_abs_ps(load_bf16(row + j)));
    *scale = _mm512_reduce_max_ps(top) / 127;
    if (*scale < 1e-30f) *scale = 0; /* all of it is error then */
    const __m512 step = _mm512_set1_ps(*scale), inverse = _mm512_set1_ps(*scale > 0 ? 1 / *scale : 0);
    for (long j = 0; j < k; j += 16) {
        const __m512 x = load_bf16(row + j), near = near_of(x, inverse), rest = _mm512_fnmadd_ps(near, step, x);
        left = _mm512_fmadd_ps(rest, rest, left), whole = _mm512_fmadd_ps(x, x, whole);
        _mm_storeu_si128((__m128i *)(codes + j), _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(near)), _mm_set1_epi8((char)0x80)));
    }
    *error = 1.001f * sqrtf(_mm512_reduce_add_ps(left)) + 1e-19f * (float)k; /* squares vanish below that */
    *length = 1.001f * sqrtf(_mm512_reduce_add_ps(whole));
}

/* The sketch of w[m][k], k a multiple of 64; and the length of each row. */
void sketch_rows(const bf16 *w, long m, long k, uint8_t *codes, float *scale, float *error, float *length, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < m; r += LANES) {
        uint8_t rows[LANES * k];
        for (int i = 0; i < LANES; i++) {
            if (r + i < m) sketch_row(w + (r + i) * k, k, rows + i * k, scale + r + i, error + r + i, length + r + i);
            else memset(rows + i * k, 0x80, (size_t)k), scale[r + i] = error[r + i] = length[r + i] = 0;
        }
        for (long j = 0; j < k; j += 64)
            transpose16((const uint32_t *)(rows + j), k / 4, LANES, (uint32_t *)(codes + r * k + j * LANES), LANES);
    }
}

/* x in levels. 0 for what this kernel has no bound for: numbers that are not finite, or near the ends of fp32. */
static int level(const bf16 *x, long k, float longest, Row *row) {
    __m512 top = _mm512_setzero_ps(), left = top, whole = top;
    __m512i total = _mm512_setzero_si512();
    __mmask16 strange = 0;
    for (long j = 0; j < k; j += 16) {
        const __m512 v = load_bf16(x + j);
        strange |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, _mm512_abs_ps(v));
    }
    const float most = _mm512_reduce_max_ps(top), fit = (float)(INT32_MAX / 128 / k), levels = fit < LEVELS ? fit : LEVELS; /* sums fit */
    if (strange || most > 1e12f || most < 1e-12f) return 0;
    row->step = most / levels;
    const __m512 step = _mm512_set1_ps(row->step), inverse = _mm512_set1_ps(levels / most);
    for (long j = 0; j < k; j += 16) {
        const __m512 v = load_bf16(x + j), near = near_of(v, inverse), rest = _mm512_fnmadd_ps(near, step, v);
        left = _mm512_fmadd_ps(rest, rest, left), whole = _mm512_fmadd_ps(v, v, whole);
        const __m512i found = _mm512_cvtps_epi32(near), high = _mm512_srai_epi32(_mm512_add_epi32(found, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i *)(row->levels + j), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(row->levels + k + j), _mm512_cvtepi32_epi8(_mm512_sub_epi32(found, _mm512_slli_epi32(high, 8))));
        total = _mm512_add_epi32(total, found);
    }
    row->offset = (int32_t)(-128u * (uint32_t)_mm512_reduce_add_epi32(total)); /* may wrap, as the sums that it is added to may */
    row->length = 1.001f * sqrtf(_mm512_reduce_add_ps(whole));
    /* Rounding of x; and of sums in fp32, here and in the product itself: less than 2^-24 of |x| |w| for each of their steps. */
    const float rounding = (float)(k / 8 + 64) * 0x1p-24f;
    row->slack = 1.001f * longest * (sqrtf(_mm512_reduce_add_ps(left)) + rounding * row->length) + 1e-30f;
    return 1;
}

/* Only what may still be the largest. */
static void weed(List *list, float best) {
    long kept = 0;
    for (long i = 0; i < list->size; i++)
        if (list->found[i].upper >= best) list->found[kept++] = list->found[i];
    list->size = kept;
}

/* Those of sixteen rows from r on that `left` names. 0 when the list is full of rows that may each be the largest; `best` is the largest
 * lower bound so far. */
static __attribute__((noinline)) int note(List *list, float *best, unsigned left, __m512 upper, __m512 lower, long r) {
    float high[LANES];
    _mm512_storeu_ps(high, upper);
    *best = fmaxf(*best, _mm512_mask_reduce_max_ps((__mmask16)left, lower));
    if (list->size > LIST - LANES) weed(list, *best);
    if (list->size > LIST - LANES) return 0;
    for (; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        list->found[list->size].upper = high[lane], list->found[list->size++].row = (int32_t)(r + lane);
    }
    return 1;
}

/* Sixteen rows of W from r on against n rows of x. */
INLINE int sixteen(const int n, const Sketch *s, const Row *x, long r, long m, long k, List *lists, float *best) {
    const uint8_t *codes = s->codes + r * k;
    __m512i high[8], low[8];
    for (int i = 0; i < n; i++) high[i] = _mm512_setzero_si512(), low[i] = _mm512_set1_epi32(x[i].offset);
    for (long j = 0; j < k; j += 4) {
        _mm_prefetch((const char *)codes + j * LANES + AHEAD, _MM_HINT_T1);
        const __m512i four = _mm512_loadu_si512(codes + j * LANES);
        for (int i = 0; i < n; i++) {
            int32_t words[2];
            memcpy(words, x[i].levels + j, 4), memcpy(words + 1, x[i].levels + k + j, 4);
            high[i] = _mm512_dpbusd_epi32(high[i], four, _mm512_set1_epi32(words[0]));
            low[i] = _mm512_dpbusd_epi32(low[i], four, _mm512_set1_epi32(words[1]));
        }
    }
    const __mmask16 there = m - r < LANES ? (__mmask16)((1u << (m - r)) - 1) : 0xffff;
    const __m512 scale = _mm512_loadu_ps(s->scale + r), error = _mm512_loadu_ps(s->error + r);
    int fits = 1;
    for (int i = 0; i < n; i++) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
        const __m512 score = _mm512_mul_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(x[i].step)));
        const __m512 off = _mm512_fmadd_ps(error, _mm512_set1_ps(x[i].length), _mm512_set1_ps(x[i].slack)), upper = _mm512_add_ps(score, off);
        const unsigned left = _mm512_mask_cmp_ps_mask(there, upper, _mm512_set1_ps(best[i]), _CMP_GE_OQ);
        if (left) fits &= note(lists + i, best + i, left, upper, _mm512_sub_ps(score, off), r);
    }
    return fits;
}

INLINE int up_to_eight_x(long n, const Sketch *s, const Row *x, long r, long m, long k, List *lists, float *best) {
    switch (n) {
    case 1: return sixteen(1, s, x, r, m, k, lists, best);
    case 2: return sixteen(2, s, x, r, m, k, lists, best);
    case 3: return sixteen(3, s, x, r, m, k, lists, best);
    case 4: return sixteen(4, s, x, r, m, k, lists, best);
    case 5: return sixteen(5, s, x, r, m, k, lists, best);
    case 6: return sixteen(6, s, x, r, m, k, lists, best);
    case 7: return sixteen(7, s, x, r, m, k, lists, best);
    default: return sixteen(8, s, x, r, m, k, lists, best);
    }
}

/* Lower bounds of one thread and of all: each takes over what is larger. Rows of W come in an order of their own, and a thread that meets
 * no likely one would keep a long list. */
static void exchange(float *mine, int32_t *common, long n) {
    for (long i = 0; i < n; i++) {
        const int32_t bits = __atomic_load_n(common + i, __ATOMIC_RELAXED);
        float bound;
        memcpy(&bound, &bits, sizeof bound);
        if (bound > mine[i]) mine[i] = bound;
        else if (bound < mine[i]) { /* one of two may get lost, which only makes a list longer */
            int32_t own;
            memcpy(&own, mine + i, sizeof own);
            __atomic_store_n(common + i, own, __ATOMIC_RELAXED);
        }
    }
}

/* The first of the largest exact scores of one x among the rows that each thread has found. */
static void decide(const bf16 *x, const char *w, long k, List *lists, long threads, long stride, float best, int64_t *place, float *value) {
    const Weight weight = {w, NULL, NULL, NULL, NULL, NULL};
    *place = INT64_MAX, *value = -INFINITY;
    for (long t = 0; t < threads; t++) {
        List *list = lists + t * stride;
        weed(list, best);
        for (long c = 0; c < list->size; c++)
            for (long j = 0; j < k; j += 32) _mm_prefetch(w + (list->found[c].row * k + j) * 2, _MM_HINT_T0);
        for (long c = 0; c < list->size; c++) {
            const int64_t r = list->found[c].row;
            float score;
            two_rows(1, BF16, x, k, &weight, r, k, &score, 1, 0, WIDE);
            if (score > *value || (score == *value && r < *place)) *value = score, *place = r;
        }
    }
}

static long line(long n) { return (n + 15) / 16 * 16; }

/* Bytes that `likeliest` needs for itself. */
long likeliest_room(long n, long k, int threads) {
    return n * (2 * k + (long)(sizeof(Row) + threads * sizeof(List))) + threads * line(n) * 4;
}

/* Where the first of the largest scores of each of n rows of x is, and that score. 0: not found, since rows of x are not finite or
 * too many rows of W come near the largest. `room` lies on a cache line. */
int likeliest(const bf16 *x, long x_row, const char *w, const Sketch *s, long n, long m, long k, char *room, int64_t *places, float *values,
              int threads) {
    Share shares[threads];
    float *const best = (float *)(room + n * 2 * k); /* [threads][line(n)] */
    List *const lists = (List *)(best + threads * line(n)); /* [threads][n] */
    Row *const rows = (Row *)(lists + threads * n);
    int32_t common[n]; /* the bits of a float each */
    int full = 0;
    memset(shares, 0, sizeof shares);
    for (long i = 0; i < threads * line(n); i++) best[i] = -INFINITY;
    for (long i = 0; i < threads * n; i++) lists[i].size = 0;
    for (long i = 0; i < n; i++) {
        memcpy(common + i, best, sizeof *best);
        rows[i].levels = (int8_t *)room + i * 2 * k;
        if (!level(x + i * x_row, k, s->longest, rows + i)) return 0;
    }
#pragma omp parallel num_threads(threads)
    {
        List *mine = lists + omp_get_thread_num() * n;
        float *bounds = best + omp_get_thread_num() * line(n);
        Turns t = turns(shares, m, TAKEN);
        int fits = 1;
        for (long from; !__atomic_load_n(&full, __ATOMIC_RELAXED) && (from = next_turn(&t)) >= 0; exchange(bounds, common, n)) {
            for (long r = from; r < m && r < from + TAKEN; r += LANES)
                for (long i = 0; i < n; i += 8)
                    fits &= up_to_eight_x(n - i < 8 ? n - i : 8, s, rows + i, r, m, k, mine + i, bounds + i);
            if (!fits) __atomic_store_n(&full, 1, __ATOMIC_RELAXED); /* for all threads: what they have is of no use */
        }
#pragma omp barrier
        if (!__atomic_load_n(&full, __ATOMIC_RELAXED)) {
#pragma omp for schedule(static, 1)
            for (long i = 0; i < n; i++) {
                float bound = -INFINITY;
                for (long u = 0; u < threads; u++) bound = fmaxf(bound, best[u * line(n) + i]);
                decide(x + i * x_row, w, k, lists + i, threads, n, bound, places + i, values + i);
            }
        }
    }
    return !full;
}

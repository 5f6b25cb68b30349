/* Tokens drawn from scores by temperature, top-k, top-p and min-p: one pass over a row, and a few over what is left of it.
 *
 * Nothing is sorted. Which weights are the largest that together reach a number or a sum is found by their bits, eight at a time from the
 * top, as positive numbers and their bits have one order. Scores so near each other that their weights are one number count as equal; of
 * equals the first are the larger. The plain form is `draw_plainly` in engine/sampling.py.
 */
#include "tile.h"
#include <math.h>

#define PART 256 /* weights whose sum is kept */

/* As draw.py lays it out: eight bytes a field. `draw` is in [0, 1); a top_k of 0 takes all. */
typedef struct {
    const float *scores;
    double temperature, top_p, min_p, draw;
    int64_t top_k;
} Draw;

/* What a thread needs for itself: the weights of a row, those that are left and whose they are, and sums. */
typedef struct {
    float *weights, *left;
    int32_t *tokens;
    double *sums;
} Room;

/* Weights 2^((score - largest) / temperature / ln 2) and their sums, PART by PART; 0 for those below min_p. Their sum. */
static double weigh_row(const Draw *d, long m, float min_p, const Room *room) {
    const __m512 low = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps((float)(LOG2E / d->temperature)), least = _mm512_set1_ps(min_p);
    __m512 top = low;
    for (long j = 0; j < m; j += 16) {
        const __mmask16 there = m - j < 16 ? (__mmask16)((1u << (m - j)) - 1) : 0xffff;
        top = _mm512_max_ps(top, _mm512_mask_loadu_ps(low, there, d->scores + j));
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    double total = 0;
    for (long part = 0; part * PART < m; part++) {
        __m512 sum = _mm512_setzero_ps();
        for (long j = part * PART; j < m && j < (part + 1) * PART; j += 16) {
            const __mmask16 there = m - j < 16 ? (__mmask16)((1u << (m - j)) - 1) : 0xffff;
            const __m512 score = _mm512_mask_loadu_ps(low, there, d->scores + j);
            const __m512 weight = exp2_16(_mm512_mul_ps(_mm512_sub_ps(score, largest), factor));
            const __m512 kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight, least, _CMP_GE_OQ), weight);
            _mm512_mask_storeu_ps(room->weights + j, there, kept);
            sum = _mm512_add_ps(sum, kept);
        }
        total += room->sums[part] = _mm512_reduce_add_ps(sum);
    }
    return total;
}

/* Those not below `bound`, in order. */
static long collect(long m, float bound, const Room *room) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    long n = 0;
    for (long j = 0; j < m; j += 16) {
        const __mmask16 there = m - j < 16 ? (__mmask16)((1u << (m - j)) - 1) : 0xffff;
        const __m512 weight = _mm512_maskz_loadu_ps(there, room->weights + j);
        const __mmask16 found = _mm512_mask_cmp_ps_mask(there, weight, _mm512_set1_ps(bound), _CMP_GE_OQ);
        if (!found) continue;
        _mm512_mask_compressstoreu_ps(room->left + n, found, weight);
        _mm512_mask_compressstoreu_epi32(room->tokens + n, found, _mm512_add_epi32(lanes, _mm512_set1_epi32((int)j)));
        n += __builtin_popcount(found);
    }
    return n;
}

static double sum_of(const float *weights, long n) {
    double total = 0;
    for (long i = 0; i < n; i++) total += weights[i];
    return total;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Leaves the largest of n weights until they reach `goal`, in number or in sum: each is left whose larger ones do not. How many are left. */
static long leave(long n, double goal, int in_sum, const Room *room) {
    uint32_t edge = 0, mask = 0;
    double before = 0; /* of all that are larger than those with the bits of `edge` so far */
    for (int shift = 24; shift >= 0; shift -= 8) {
        double part[256] = {0};
        for (long i = 0; i < n; i++) {
            const uint32_t bits = bits_of(room->left[i]);
            if ((bits & mask) == edge) part[bits >> shift & 255] += in_sum ? room->left[i] : 1;
        }
        long bin = 255;
        for (; bin > 0 && before + part[bin] < goal; bin--) before += part[bin];
        edge |= (uint32_t)bin << shift, mask |= 255u << shift;
    }
    long left = 0;
    for (long i = 0; i < n; i++) {
        const uint32_t bits = bits_of(room->left[i]);
        const int equal = bits == edge && before < goal;
        if (equal) before += in_sum ? room->left[i] : 1;
        if (bits > edge || equal) room->left[left] = room->left[i], room->tokens[left++] = room->tokens[i];
    }
    return left;
}

/* The first of n weights at which their sum is above `goal`; where rounding lets none be, the last that is not 0. */
static long fall(const float *weights, long n, double goal) {
    double sum = 0;
    long last = 0;
    for (long i = 0; i < n; i++) {
        sum += weights[i];
        if (weights[i] > 0) last = i;
        if (sum > goal) return i;
    }
    return last;
}

static int64_t draw_row(const Draw *d, long m, const Room *room) {
    const int whole = (d->top_k <= 0 || d->top_k >= m) && d->top_p >= 1;
    const double total = weigh_row(d, m, whole ? (float)d->min_p : 0, room);
    if (whole) {
        double goal = d->draw * total;
        if (goal >= total) goal = nextafter(total, 0);
        long part = 0;
        for (; (part + 1) * PART < m && goal >= room->sums[part]; part++) goal -= room->sums[part];
        for (; part > 0 && room->sums[part] == 0; part--) goal = INFINITY; /* rounding led beyond the last that has any */
        return part * PART + fall(room->weights + part * PART, m - part * PART < PART ? m - part * PART : PART, goal);
    }
    const long most = d->top_k > 0 && d->top_k < m ? d->top_k : m;
    /* Whatever is not below a bound holds all that is wanted, where it reaches the number or the sum. What is below the last of them comes
     * together to less than top_p leaves out. */
    const float bounds[] = {0.01f, 0.0005f, most < m ? 0 : (float)(total * (1 - d->top_p) / (double)m)};
    long n = 0;
    for (int i = 0; i < 3; i++) {
        n = collect(m, bounds[i], room);
        if (most < m ? n >= most : sum_of(room->left, n) >= d->top_p * total) break;
    }
    if (most < m) n = leave(n, (double)most, 0, room);
    if (d->top_p < 1) n = leave(n, d->top_p * (most < m ? sum_of(room->left, n) : total), 1, room);
    for (long i = 0; i < n; i++)
        if (room->left[i] < (float)d->min_p) room->left[i] = 0;
    return room->tokens[fall(room->left, n, d->draw * sum_of(room->left, n))];
}

static long rounded(long m) { return (m + 63) / 64 * 64; }

/* Bytes that `draw_rows` needs for itself. */
long draw_room(long m, int threads) { return threads * (rounded(m) * 12 + rounded(m / PART + 1) * 8); }

/* A token for each of n rows of m scores, none of which is a NaN and one of which is finite. `room` lies on a cache line. */
void draw_rows(const Draw *draws, long n, long m, char *room, int64_t *tokens, int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long i = 0; i < n; i++) {
        char *own = room + omp_get_thread_num() * (rounded(m) * 12 + rounded(m / PART + 1) * 8);
        const Room mine = {(float *)own, (float *)own + rounded(m), (int32_t *)own + 2 * rounded(m), (double *)(own + 12 * rounded(m))};
        tokens[i] = draw_row(draws + i, m, &mine);
    }
}

/* Matrices of a file laid out anew: times a factor, in bf16, transposed where asked.
 *
 * A few hundred small ones make an adapter. Together they are one pass over memory, and no number goes through Python.
 */
#include "tile.h"

enum { BF16, F32, F16 };

/* As cast.py lays it out: eight bytes a field. */
typedef struct {
    const void *from;
    bf16 *to;
    int64_t rows, columns, kind, turned;
    double factor;
} Cast;

/* The numbers at `at` that `mask` names, as their bf16 bits in 32-bit words. Rounded where torch would: after the product, in the
 * type of the source, and at the end. */
INLINE __m512i sixteen(const Cast *c, int64_t at, __mmask16 mask) {
    const __m512 factor = _mm512_set1_ps((float)c->factor);
    if (c->kind == F32) {
        const __m512 x = _mm512_maskz_loadu_ps(mask, (const float *)c->from + at);
        return _mm512_cvtepu16_epi32(nearest(c->factor == 1 ? x : _mm512_mul_ps(x, factor)));
    }
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)c->from + at);
    if (c->kind == BF16) {
        const __m512i bits = _mm512_cvtepu16_epi32(half);
        if (c->factor == 1) return bits;
        return _mm512_cvtepu16_epi32(nearest(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), factor)));
    }
    __m512 x = _mm512_cvtph_ps(half);
    if (c->factor != 1) x = _mm512_cvtph_ps(_mm512_cvtps_ph(_mm512_mul_ps(x, factor), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_cvtepu16_epi32(nearest(x));
}

INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* Lanes that hold no number: an exponent of ones. */
INLINE __mmask16 strange(__m512i bits) {
    const __m512i exponent = _mm512_set1_epi32(0x7f80);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
}

static int straight(const Cast *c) {
    const int64_t n = c->rows * c->columns;
    __mmask16 bad = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = first(n - i);
        const __m512i bits = sixteen(c, i, mask);
        bad |= strange(bits);
        _mm256_mask_storeu_epi16(c->to + i, mask, _mm512_cvtepi32_epi16(bits));
    }
    return bad == 0;
}

static int turned(const Cast *c) {
    uint32_t block[256], across[256];
    __mmask16 bad = 0;
    for (int64_t i = 0; i < c->rows; i += 16) {
        const int64_t rows = c->rows - i < 16 ? c->rows - i : 16;
        for (int64_t j = 0; j < c->columns; j += 16) {
            const int64_t columns = c->columns - j < 16 ? c->columns - j : 16;
            for (int64_t m = 0; m < rows; m++) {
                const __m512i bits = sixteen(c, (i + m) * c->columns + j, first(columns));
                bad |= strange(bits);
                _mm512_storeu_si512(block + 16 * m, bits);
            }
            transpose16(block, 16, rows, across, 16);
            for (int64_t k = 0; k < columns; k++)
                _mm256_mask_storeu_epi16(c->to + (j + k) * c->rows + i, first(rows), _mm512_cvtepi32_epi16(_mm512_loadu_si512(across + 16 * k)));
        }
    }
    return bad == 0;
}

/* Whether all the numbers that were written are finite. */
int cast_all(const void *casts, long n) {
    int finite = 1;
    for (const Cast *c = casts; n > 0; n--, c++) finite &= c->turned ? turned(c) : straight(c);
    return finite;
}

/* Small products in registers: C[m][n] (+)= sum_k A[m][k] B[k][n], bf16 in, fp32 out (AVX512-BF16).
 *
 * vdpbf16ps multiplies pairs: lane n of one instruction adds a[2k] b[2k][n] + a[2k+1] b[2k+1][n]. So
 *   A is row-major bf16; a pair of neighbours is broadcast as one 32-bit word;
 *   B is "paired": word [k][n] holds rows 2k and 2k+1 of column n.
 * Row-major data becomes paired by `pair_rows`, its transpose by `transpose` (of 32-bit words).
 */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.4426950408889634f
#define ROWS 4 /* of C held in registers at a time: 4 x 4 accumulators */

typedef uint16_t bf16;

INLINE __m512 dot(__m512 c, __m512i a, __m512i b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

INLINE __m512i narrow(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

INLINE void store_bf16(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

INLINE __m512 load_bf16(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* To the nearest, ties to even. The instruction for it makes zeros of denormal numbers, and a number that does not change must not. */
INLINE __m256i nearest(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i found = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 strange = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(found, strange, high, _mm512_set1_epi32(0x40)));
}

/* Words whose low half is from a and whose high half is from b. */
INLINE __m512i pair(__m512 a, __m512 b) { return _mm512_or_si512(narrow(a), _mm512_slli_epi32(narrow(b), 16)); }

INLINE void tile(const int rows, const int vectors, long pairs, const bf16 *A, long lda, const uint32_t *B, long ldb,
                 float *C, long ldc, int add) {
    __m512 c[ROWS][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) c[m][n] = add ? _mm512_loadu_ps(C + m * ldc + 16 * n) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512i b[4];
        for (int n = 0; n < vectors; n++) b[n] = _mm512_loadu_si512(B + k * ldb + 16 * n);
        for (int m = 0; m < rows; m++) {
            uint32_t word;
            memcpy(&word, A + m * lda + 2 * k, 4);
            __m512i a = _mm512_set1_epi32((int)word);
            for (int n = 0; n < vectors; n++) c[m][n] = dot(c[m][n], a, b[n]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) _mm512_storeu_ps(C + m * ldc + 16 * n, c[m][n]);
}

INLINE void strip(const int vectors, long rows, long pairs, const bf16 *A, long lda, const uint32_t *B, long ldb, float *C,
                  long ldc, int add) {
    long m = 0;
    for (; m + ROWS <= rows; m += ROWS) tile(ROWS, vectors, pairs, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
    for (; m < rows; m++) tile(1, vectors, pairs, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
}

/* C[rows][16 * vectors] (+)= A[rows][2 * pairs] B[pairs][16 * vectors] */
static inline void product(long rows, long vectors, long pairs, const bf16 *A, long lda, const uint32_t *B, long ldb, float *C,
                    long ldc, int add) {
    for (; vectors >= 4; vectors -= 4, B += 64, C += 64) strip(4, rows, pairs, A, lda, B, ldb, C, ldc, add);
    if (vectors == 3) strip(3, rows, pairs, A, lda, B, ldb, C, ldc, add);
    if (vectors == 2) strip(2, rows, pairs, A, lda, B, ldb, C, ldc, add);
    if (vectors == 1) strip(1, rows, pairs, A, lda, B, ldb, C, ldc, add);
}

/* to[j][i] = from[i][j] for a 16 x 16 block of 32-bit words; rows of `from` at or past `rows` read as zero. */
static inline void transpose16(const uint32_t *from, long from_row, long rows, uint32_t *to, long to_row) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_loadu_si512(from + i * from_row) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
    }
}

/* Rows 2p and 2p + 1 of `from` (bf16, `d` wide, `rows` of them, zero beyond) as paired words [p][d]. */
static inline void pair_rows(const bf16 *from, long from_row, long rows, long padded, long d, uint32_t *to) {
    for (long p = 0; p < padded / 2; p++)
        for (long j = 0; j < d; j += 16) {
            __m512i a = _mm512_setzero_si512(), b = a;
            if (2 * p < rows) a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + 2 * p * from_row + j)));
            if (2 * p + 1 < rows)
                b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + (2 * p + 1) * from_row + j)));
            _mm512_storeu_si512(to + p * d + j, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
}

/* 2^x; 0 where x is very negative. Relative error below 2e-7. */
INLINE __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

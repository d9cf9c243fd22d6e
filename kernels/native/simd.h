/* What the kernels are written in: vectors of LANES floats, exp on them, and small matrix products in cache.

   Included once for each instruction set by baseline.c, avx2.c and avx512.c, which set VARIANT and LANES. Everything
   here is static; a kernel is exported as EXPORT(name), which carries the variant in its name. GCC and Clang vector
   extensions only: no intrinsics, so the same text serves x86 and Arm. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(name, VARIANT)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias)); /* at any address */
typedef int32_t vec_int __attribute__((vector_size(LANES * 4)));
typedef double vec_double __attribute__((vector_size(LANES * 8)));
typedef double vec_double_any __attribute__((vector_size(LANES * 8), aligned(8), may_alias));

INLINE vec load(const float *from) { return *(const vec_any *)from; }
INLINE void store(float *to, vec x) { *(vec_any *)to = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(vec_int mask, vec yes, vec no) { return (vec)((mask & (vec_int)yes) | (~mask & (vec_int)no)); }
INLINE vec vec_max(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec vec_min(vec a, vec b) { return choose(a < b, a, b); }

/* Shuffles by constant lane numbers, lanes of b counted on from those of a. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif
#define FOUR(pick, l, w) pick(l, w), pick(l + 1, w), pick(l + 2, w), pick(l + 3, w)
#if LANES == 16
#define EACH(pick, w) FOUR(pick, 0, w), FOUR(pick, 4, w), FOUR(pick, 8, w), FOUR(pick, 12, w)
#elif LANES == 8
#define EACH(pick, w) FOUR(pick, 0, w), FOUR(pick, 4, w)
#else
#define EACH(pick, w) FOUR(pick, 0, w)
#endif

/* Folds the vector onto itself: added one after the other, each lane would wait for the last. */
#define ACROSS(lane, width) ((lane) ^ (width))
#define LANE(lane, width) (lane)
INLINE float sum(vec x) {
#if LANES == 16
    x += SHUFFLE(x, x, EACH(ACROSS, 8));
#endif
#if LANES >= 8
    x += SHUFFLE(x, x, EACH(ACROSS, 4));
#endif
    x += SHUFFLE(x, x, EACH(ACROSS, 2));
    return x[0] + x[1];
}
INLINE float highest(vec x) {
#if LANES == 16
    x = vec_max(x, SHUFFLE(x, x, EACH(ACROSS, 8)));
#endif
#if LANES >= 8
    x = vec_max(x, SHUFFLE(x, x, EACH(ACROSS, 4)));
#endif
    x = vec_max(x, SHUFFLE(x, x, EACH(ACROSS, 2)));
    return x[0] > x[1] ? x[0] : x[1];
}
INLINE int round_up(int n) { return (n + LANES - 1) / LANES * LANES; }

/* The first or last `count` numbers of a row, zeros behind them; a whole vector where there are as many. */
INLINE vec load_some(const float *from, int count) {
    if (count >= LANES) return load(from);
#if LANES == 16
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    vec x = {0};
    memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
#endif
}
INLINE void store_some(float *to, vec x, int count) {
    if (count >= LANES) store(to, x);
#if LANES == 16
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x);
#else
    else memcpy(to, &x, (size_t)count * sizeof(float));
#endif
}

/* exp to within 2 units in the last place for -87.3 <= x <= 88.3; NaN stays NaN.
   exp(x) = 2^n exp(r) with |r| <= ln 2 / 2, ln 2 in two parts, and a polynomial (Cephes, Moshier 1992). */
INLINE vec vec_exp_inside(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((vec_int)p + (__builtin_convertvector(n, vec_int) << 23));
}

/* exp; 0 below -87.3, infinity above 88.3, NaN stays NaN. */
INLINE vec vec_exp(vec x) {
    vec y = vec_exp_inside(vec_min(vec_max(x, all(-87.33654f)), all(88.37626f)));
    y = choose(x < -87.33654f, (vec){0}, y);
    y = choose(x > 88.37626f, all(INFINITY), y);
    return choose(x != x, x, y);
}

/* exp of what is not above 0, to within 2 units in the last place; 0 below -87.3, NaN stays NaN. As vec_exp, and half of
   its work: the exponent stands in the low bits of x / ln 2 + magic, bias included. */
INLINE vec vec_exp_below(vec x) {
    const vec magic = all(12582912.0f + 127);
    vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return choose(x < -87.33654f, (vec){0}, p * (vec)((vec_int)shifted << 23));
}

/* exp(-|x|), and exp kept within the range of float32. */
INLINE vec vec_abs(vec x) { return (vec)((vec_int)x & 0x7fffffff); }
INLINE vec vec_exp_decay(vec x) { return vec_exp_below(-vec_abs(x)); }
INLINE vec vec_exp_finite(vec x) {
    x = choose(x > 88.0f, all(88.0f), x); /* comparisons that NaN fails, so that it stays */
    return vec_exp_inside(choose(x < -87.0f, all(-87.0f), x));
}
INLINE vec vec_sigmoid(vec x) { return 1.0f / (1.0f + vec_exp_finite(-x)); }

/* tanh to within 4e-7 of its size: x P(x^2) / Q(x^2) on [-9, 9], a minimax fit (2e-8) of relative error. */
INLINE vec vec_tanh(vec x) {
    x = choose(x > 9.0f, all(9.0f), x);
    x = choose(x < -9.0f, all(-9.0f), x);
    vec square = x * x;
    vec p = square * 1.335537771e-8f + 2.0609640560e-5f, q = square * 7.776863739e-7f + 3.285693328e-4f;
    p = p * square + 3.4956237852e-3f;
    q = q * square + 2.5877119582e-2f;
    p = p * square + 1.3381056214e-1f;
    q = q * square + 4.6714371830e-1f;
    p = p * square + 9.9999997948e-1f;
    q = q * square + 1.0f;
    return x * p / q;
}

/* erf to within 4e-7 of its size: x P(x^2) / Q(x^2) on [-3.92, 3.92], a minimax fit (2e-8) of relative error. */
INLINE vec vec_erf(vec x) {
    x = choose(x > 3.92f, all(3.92f), x); /* comparisons that NaN fails, so that it stays */
    x = choose(x < -3.92f, all(-3.92f), x);
    vec square = x * x;
    vec p = square * 2.050093290e-6f + 2.848815022e-4f, q = square * 3.809171160e-5f + 1.162524022e-3f;
    p = p * square + 3.765571491e-3f;
    q = q * square + 1.496912714e-2f;
    p = p * square + 5.274858608e-2f;
    q = q * square + 1.141086856e-1f;
    p = p * square + 1.904054394e-1f;
    q = q * square + 5.020751685e-1f;
    p = p * square + 1.128379146e0f;
    q = q * square + 1.0f;
    vec y = x * p / q;
    y = choose(y > 1.0f, all(1.0f), y);
    return choose(y < -1.0f, all(-1.0f), y);
}

/* x times the share of a normal distribution below x. */
INLINE vec vec_gelu(vec x) {
    vec half = x * 0.5f;
    return half * vec_erf(x * 0.70710678118654752f) + half;
}

/* logsigmoid(x) and its slope sigmoid(-x), from e = vec_exp_decay(x), with one division:
   log(1 + e) = 2 artanh(e / (2 + e)). */
INLINE vec vec_logsigmoid(vec x, vec e, vec *slope) {
    vec one_more = 1.0f + e, two_more = 2.0f + e;
    vec shared = 1.0f / (one_more * two_more);
    vec t = e * one_more * shared, square = t * t;
    vec p = square * (1.0f / 13) + 1.0f / 11;
    p = p * square + 1.0f / 9;
    p = p * square + 1.0f / 7;
    p = p * square + 1.0f / 5;
    p = p * square + 1.0f / 3;
    *slope = choose(x < 0, all(1.0f), e) * two_more * shared;
    return vec_min(x, (vec){0}) - 2.0f * (p * square * t + t);
}

/* Matrix products of operands that lie in cache: C[m][n] (=, +=) A[m][k] B[k][n].

   A is read one number at a time, so it may lie in any order: A[i][p] = a[i * a_row + p * a_column]. Rows of B and C are
   contiguous, and n is a multiple of LANES. ROWS x VECTORS sums stay in registers. */
#ifndef ROWS
#define ROWS 6
#endif
#ifndef MULTIPLY_ADD
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
#endif

typedef struct {
    const float *at;
    ptrdiff_t row, column;
} Operand;

INLINE void tile(const int rows, const int vectors, int k, Operand a, const float *b, ptrdiff_t b_row, float *c,
                 ptrdiff_t c_row, int add) {
    vec total[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) total[i][j] = add ? load(c + i * c_row + j * LANES) : (vec){0};
    for (int p = 0; p < k; p++) {
        vec line[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) line[j] = load(b + p * b_row + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vec x = all(a.at[i * a.row + p * a.column]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) total[i][j] = MULTIPLY_ADD(x, line[j], total[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, total[i][j]);
}

/* One strip of at most ROWS rows. */
static void strip(int rows, int n, int k, Operand a, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row,
                  int add) {
    int j = 0;
#define STRIP(R)                                                                                                   \
    case R:                                                                                                        \
        for (; j + VECTORS * LANES <= n; j += VECTORS * LANES)                                                     \
            tile(R, VECTORS, k, a, b + j, b_row, c + j, c_row, add);                                               \
        for (; j < n; j += LANES) tile(R, 1, k, a, b + j, b_row, c + j, c_row, add);                               \
        break;
    switch (rows) {
        STRIP(1) STRIP(2) STRIP(3) STRIP(4) STRIP(5) STRIP(6)
    }
#undef STRIP
}

static __attribute__((unused)) void product(int m, int n, int k, Operand a, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row,
                    int add) {
    for (int i = 0; i < m; i += ROWS) {
        Operand rest = {a.at + i * a.row, a.row, a.column};
        strip(m - i < ROWS ? m - i : ROWS, n, k, rest, b, b_row, c + i * c_row, c_row, add);
    }
}

/* Transposes LANES x LANES in registers: at each width, swap what stands off the diagonal (Eklundh 1972). */
#define LOW(lane, width) ((lane) & (width) ? LANES + (lane) - (width) : (lane))
#define HIGH(lane, width) ((lane) & (width) ? LANES + (lane) : (lane) + (width))
INLINE void transpose_lanes(vec *row) {
    vec upper, lower;
#define STAGE(width)                                                                                               \
    for (int r = 0; r < LANES; r++)                                                                                \
        if (!(r & width)) {                                                                                        \
            upper = row[r], lower = row[r + width];                                                                \
            row[r] = SHUFFLE(upper, lower, EACH(LOW, width));                                                      \
            row[r + width] = SHUFFLE(upper, lower, EACH(HIGH, width));                                             \
        }
#if LANES == 16
    STAGE(8)
#endif
#if LANES >= 8
    STAGE(4)
#endif
    STAGE(2)
    STAGE(1)
#undef STAGE
}

/* In lane i the sum of row[i]: as transpose_lanes, adding what it would set side by side. */
INLINE vec sums_of(vec *row) {
#define STAGE(width)                                                                                               \
    for (int r = 0; r < width; r++)                                                                                \
        row[r] = SHUFFLE(row[r], row[r + width], EACH(LOW, width)) + SHUFFLE(row[r], row[r + width], EACH(HIGH, width));
#if LANES == 16
    STAGE(8)
#endif
#if LANES >= 8
    STAGE(4)
#endif
    STAGE(2)
    STAGE(1)
#undef STAGE
    return row[0];
}

/* to[columns][rows, and zeros up to a multiple of LANES] = transposed from[rows][columns]. */
static void transpose(const float *from, ptrdiff_t from_row, int rows, int columns, float *to, ptrdiff_t to_row) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES) {
            vec square[LANES];
            for (int p = 0; p < LANES; p++)
                square[p] = i + p < rows ? load_some(from + (i + p) * from_row + j, columns - j) : (vec){0};
            transpose_lanes(square);
            for (int p = 0; p < LANES && j + p < columns; p++) store(to + (j + p) * to_row + i, square[p]);
        }
}

/* Rows of numbers; n and padded are multiples of LANES. */
INLINE void copy_row(float *to, const float *from, int width, int padded) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
    if (i < padded) {
        store(to + i, (vec){0});
        for (; i < width; i++) to[i] = from[i];
    }
}
INLINE void write_row(float *to, const float *from, int width) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
    for (; i < width; i++) to[i] = from[i];
}
/* Ask for a row that will be read, or written, soon; past the end of memory it does nothing. */
INLINE void prefetch_row(const float *from, int width) {
    for (int i = 0; i < width; i += 16) __builtin_prefetch(from + i, 0, 2);
}
INLINE void prefetch_write(const float *to, int width) {
    for (int i = 0; i < width; i += 16) __builtin_prefetch(to + i, 1, 2);
}
INLINE float dot(const float *a, const float *b, int n) {
    vec total = {0};
    for (int i = 0; i < n; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}
INLINE void scale(float *x, float by, int n) {
    for (int i = 0; i < n; i += LANES) store(x + i, load(x + i) * by);
}
INLINE void add_scaled(float *to, const float *x, float by, int n) {
    for (int i = 0; i < n; i += LANES) store(to + i, load(to + i) + load(x + i) * by);
}

/* A thread's own working memory, aligned to a cache line; NULL when there is none. */
INLINE float *workspace(size_t floats) { return (float *)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

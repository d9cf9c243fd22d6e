/* y = norm(x) W^T + bias + residual for a few rows of x.

   Bound by the reading of W: each row of W is read once, by one thread, and meets all rows of x while it lies in
   registers. W is float32 or bfloat16 (the upper half of a float32); the rest is float32. The norm of x is cheap enough
   for every thread to compute it by itself. */

typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t vec_uint __attribute__((vector_size(LANES * 4)));

INLINE vec load_bfloat16(const uint16_t *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, vec_uint) << 16);
}
INLINE float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* The numbers from i on of a row of n: a whole vector of them, or what there is and zeros. */
INLINE vec load_part(const float *row, int64_t i, int64_t n) {
    if (i + LANES <= n) return load(row + i);
    vec x = {0};
    memcpy(&x, row + i, (n - i) * sizeof(float));
    return x;
}
INLINE void store_part(float *row, int64_t i, int64_t n, vec x) {
    if (i + LANES <= n) store(row + i, x);
    else memcpy(row + i, &x, (n - i) * sizeof(float));
}

/* y = (x - mean) / sqrt(variance + eps) * weight + bias; x may be y. Zeros past the end would count in the variance. */
static void layer_norm(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *y) {
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += load_part(x, i, n);
    float mean = sum(total) / n;
    total = (vec){0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec apart = load_part(x, i, n) - mean;
        total += apart * apart;
    }
    float past = (float)((n + LANES - 1) / LANES * LANES - n) * mean * mean;
    float by = 1 / sqrtf((sum(total) - past) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) {
        vec normed = (load_part(x, i, n) - mean) * by * load_part(weight, i, n);
        store_part(y, i, n, bias ? normed + load_part(bias, i, n) : normed);
    }
}

/* y[r][j] = x[r] . w[j], for constant numbers of rows of x and of w. The rows of w behind these are fetched meanwhile. */
INLINE void dots(const int rows, const int columns, const int narrow, int64_t in, const float *x, const void *weight,
                 float (*y)[4]) {
    const float *w = weight;
    const uint16_t *w16 = weight;
    vec total[8][4];
    int64_t p = 0;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) total[r][j] = (vec){0};
    for (; p + LANES <= in; p += LANES) {
        vec line[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            int64_t at = j * in + p, next = at + columns * in;
            line[j] = narrow ? load_bfloat16(w16 + at) : load(w + at);
            __builtin_prefetch(narrow ? (const void *)(w16 + next) : (const void *)(w + next));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec part = load(x + r * in + p);
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++) total[r][j] += part * line[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            float rest = 0;
            for (int64_t i = p; i < in; i++)
                rest += x[r * in + i] * (narrow ? from_bfloat16(w16[j * in + i]) : w[j * in + i]);
            y[r][j] = sum(total[r][j]) + rest;
        }
}

/* The same for 1 to 8 rows of x, and 4 or 1 of w. */
static void some_dots(int rows, int columns, int narrow, int64_t in, const float *x, const void *w, float (*y)[4]) {
#define CASE(R)                                                   \
    case R:                                                       \
        if (columns == 4 && narrow) dots(R, 4, 1, in, x, w, y);   \
        else if (columns == 4) dots(R, 4, 0, in, x, w, y);        \
        else if (narrow) dots(R, 1, 1, in, x, w, y);              \
        else dots(R, 1, 0, in, x, w, y);                          \
        break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

/* x [rows][in], weight [out][in] (bfloat16 if narrow), bias [out] and residual [rows][out] or NULL, y [rows][out].
   norm_weight [in] or NULL: no norm; norm_bias [in] or NULL. */
static int few_rows(const float *x, const void *weight, const float *bias, const float *norm_weight,
                    const float *norm_bias, const float *residual, float *y, int64_t rows, int64_t in, int64_t out,
                    int64_t narrow, int64_t threads, float eps) {
    int failed = 0;
    int64_t groups = (out + 3) / 4;
#pragma omp parallel num_threads((int)threads)
    {
        float *normed = norm_weight ? workspace(rows * in) : NULL;
        const float *from = normed ? normed : x;
        if (norm_weight && !normed) failed = 1;
        if (normed)
            for (int64_t r = 0; r < rows; r++) layer_norm(x + r * in, in, norm_weight, norm_bias, eps, normed + r * in);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            int columns = out - 4 * group < 4 ? 1 : 4;
            for (int64_t j = 4 * group; j < out && j < 4 * group + 4; j += columns) {
                const char *w = (const char *)weight + j * in * (narrow ? 2 : 4);
                for (int64_t r = 0; r < rows; r += 8) {
                    float found[8][4];
                    int some = rows - r < 8 ? (int)(rows - r) : 8;
                    some_dots(some, columns, narrow != 0, in, from + r * in, w, found);
                    for (int i = 0; i < some; i++)
                        for (int c = 0; c < columns; c++) {
                            int64_t at = (r + i) * out + j + c;
                            y[at] = found[i][c] + (bias ? bias[j + c] : 0) + (residual ? residual[at] : 0);
                        }
                }
            }
        }
        free(normed);
    }
    return failed;
}

int EXPORT(linear_rows)(const float *x, const void *weight, const float *bias, const float *norm_weight,
                        const float *norm_bias, const float *residual, float *y, int64_t rows, int64_t in, int64_t out,
                        int64_t narrow, int64_t threads, float eps) {
    return few_rows(x, weight, bias, norm_weight, norm_bias, residual, y, rows, in, out, narrow, threads, eps);
}

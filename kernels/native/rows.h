/* y = norm(x) W^T + bias + residual for a few rows of x.

   Bound by the reading of W: each row of W is read once, by one thread, and meets all rows of x while it lies in
   registers. W is float32 or bfloat16 (the upper half of a float32); the rest is float32. Every thread norms, or copies,
   x for itself. */

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

/* y = (x - mean) / sqrt(variance + eps) * weight + bias; x may be y. Zeros past the end would count in the variance. */
static void layer_norm(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *y) {
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += load_some(x + i, n - i);
    float mean = sum(total) / n;
    total = (vec){0};
    for (int64_t i = 0; i < n; i += LANES) {
        vec apart = load_some(x + i, n - i) - mean;
        total += apart * apart;
    }
    float past = (float)((n + LANES - 1) / LANES * LANES - n) * mean * mean;
    float by = 1 / sqrtf((sum(total) - past) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) {
        vec normed = (load_some(x + i, n - i) - mean) * by * load_some(weight + i, n - i);
        store_some(y + i, bias ? normed + load_some(bias + i, n - i) : normed, n - i);
    }
}

/* y[r] = x[r] . w for a constant number of rows of x, in `sums` partial sums each. One row of w at a time: memory is
   fastest in the order in which it lies. */
INLINE void row_dots(const int rows, const int sums, const int narrow, int64_t in, const float *x, int64_t x_row,
                 const void *weight, float *y) {
    const float *w = weight;
    const uint16_t *w16 = weight;
    vec total[8][4];
    int64_t p = 0;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < sums; j++) total[r][j] = (vec){0};
    for (; p + sums * LANES <= in; p += sums * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < sums; j++) {
            int64_t at = p + j * LANES;
            vec line = narrow ? load_bfloat16(w16 + at) : load(w + at);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) total[r][j] += load(x + r * x_row + at) * line;
        }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int j = 1; j < sums; j++) total[r][0] += total[r][j];
        y[r] = sum(total[r][0]);
        for (int64_t i = p; i < in; i++) y[r] += x[r * x_row + i] * (narrow ? from_bfloat16(w16[i]) : w[i]);
    }
}

/* The same for 1 to 8 rows. */
static void some_dots(int rows, int narrow, int64_t in, const float *x, int64_t x_row, const void *w, float *y) {
#define CASE(R)                                                    \
    case R:                                                        \
        if (narrow) row_dots(R, R > 4 ? 1 : 4, 1, in, x, x_row, w, y); \
        else row_dots(R, R > 4 ? 1 : 4, 0, in, x, x_row, w, y);        \
        break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

/* A norm of x before the map: layer norm or RMS norm, or none where there is no weight [in]; bias [in] or NULL. */
typedef struct {
    const float *weight, *bias;
    int rms;
    float eps;
} RowNorm;

/* x [rows][in], weight [out][in] (bfloat16 if narrow), bias [out] and residual [rows][out] or NULL, y [rows][out]. */
static int few_rows(const float *x, const void *weight, const float *bias, RowNorm norm, const float *residual,
                    float *y, int64_t rows, int64_t in, int64_t out, int64_t narrow, int64_t threads) {
    int failed = 0;
    int64_t x_row = (in + LANES - 1) / LANES * LANES + LANES; /* rows 4096 bytes apart would share a few lines of cache */
#pragma omp parallel num_threads((int)threads)
    {
        float *own = workspace(rows * x_row);
        if (!own) failed = 1;
        for (int64_t r = 0; own && r < rows; r++)
            if (norm.weight && norm.rms) rms_row(x + r * in, norm.weight, in, norm.eps, own + r * x_row);
            else if (norm.weight) layer_norm(x + r * in, in, norm.weight, norm.bias, norm.eps, own + r * x_row);
            else memcpy(own + r * x_row, x + r * in, in * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t j = 0; j < out; j++) {
            if (!own) continue;
            const char *w = (const char *)weight + j * in * (narrow ? 2 : 4);
            for (int64_t r = 0; r < rows; r += 8) {
                float found[8];
                int some = rows - r < 8 ? (int)(rows - r) : 8;
                some_dots(some, narrow != 0, in, own + r * x_row, x_row, w, found);
                for (int i = 0; i < some; i++) {
                    int64_t at = (r + i) * out + j;
                    y[at] = found[i] + (bias ? bias[j] : 0) + (residual ? residual[at] : 0);
                }
            }
        }
        free(own);
    }
    return failed;
}

int EXPORT(linear_rows)(const float *x, const void *weight, const float *bias, const float *norm_weight,
                        const float *norm_bias, const float *residual, float *y, int64_t rows, int64_t in, int64_t out,
                        int64_t narrow, int64_t threads, float eps) {
    RowNorm norm = {norm_weight, norm_bias, 0, eps};
    return few_rows(x, weight, bias, norm, residual, y, rows, in, out, narrow, threads);
}

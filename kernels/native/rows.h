/* y = norm(x) W^T + bias + residual for a few rows of x.

   Bound by the reading of W: each row of W is read once, by one thread, and meets the rows of x while it lies in
   registers, or in cache where they are more than ROWS_OF_X. W is float32 or bfloat16 (the upper half of a float32);
   the rest is float32. Every thread norms, or copies, x for itself. */

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

/* y[r][j] = x[r] . w[j] for constant numbers of rows of x and of W, of which `there` are there. Some rows of W at a time,
   and those two steps on asked for into L2: memory gives a third more than in the order in which it lies (Zen 4). */
INLINE void row_dots(const int rows, const int wide, const int narrow, int64_t in, const float *x, int64_t x_row,
                     const void *weight, int there, float *y) {
    const char *w[4];
    const int size = narrow ? 2 : 4;
    vec total[6][4];
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) w[j] = (const char *)weight + (j < there ? j : 0) * in * size;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) total[r][j] = (vec){0};
    int64_t p = 0;
    for (; p + LANES <= in; p += LANES) {
        vec line[4];
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            const char *at = w[j] + p * size;
            line[j] = narrow ? load_bfloat16((const uint16_t *)at) : load((const float *)at);
            if (!narrow || p % (2 * LANES) == 0) __builtin_prefetch(at + 2 * wide * in * size, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec part = load(x + r * x_row + p);
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) total[r][j] += part * line[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            y[r * wide + j] = sum(total[r][j]);
            for (int64_t i = p; i < in; i++) {
                const char *at = w[j] + i * size;
                float one = narrow ? from_bfloat16(*(const uint16_t *)at) : *(const float *)at;
                y[r * wide + j] += x[r * x_row + i] * one;
            }
        }
}

enum { ROWS_OF_X = 6, ROWS_OF_W = 4 }; /* at a time: their sums stay in registers */

/* The same for 1 to ROWS_OF_X rows of x and ROWS_OF_W of W. */
static void some_dots(int rows, int narrow, int64_t in, const float *x, int64_t x_row, const void *w, int there,
                      float *y) {
#define CASE(R)                                                           \
    case R:                                                               \
        if (narrow) row_dots(R, ROWS_OF_W, 1, in, x, x_row, w, there, y); \
        else row_dots(R, ROWS_OF_W, 0, in, x, x_row, w, there, y);        \
        break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
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
        for (int64_t j = 0; j < out; j += ROWS_OF_W) {
            if (!own) continue;
            const char *w = (const char *)weight + j * in * (narrow ? 2 : 4);
            int wide = out - j < ROWS_OF_W ? (int)(out - j) : ROWS_OF_W;
            for (int64_t r = 0; r < rows; r += ROWS_OF_X) {
                float found[ROWS_OF_X * ROWS_OF_W];
                int some = rows - r < ROWS_OF_X ? (int)(rows - r) : ROWS_OF_X;
                some_dots(some, narrow != 0, in, own + r * x_row, x_row, w, wide, found);
                for (int i = 0; i < some; i++)
                    for (int o = 0; o < wide; o++) {
                        int64_t at = (r + i) * out + j + o;
                        y[at] = found[i * ROWS_OF_W + o] + (bias ? bias[j + o] : 0) + (residual ? residual[at] : 0);
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

/* y = x W^T + bias + residual for some rows of x, W bfloat16 [out][in], `in` even; x is rounded to bfloat16 once.

   Bound by the reading of W up to some ten rows, and by the products from there on. Two rows of W at a time, read once, by
   one thread, meet LANES / 2 rows of x; the LANES sums are gathered by a transposition. W is asked for two steps ahead:
   the processor alone fetches half as much (Zen 4). */

enum { TOGETHER = LANES / 2 }; /* rows of x */

/* sums[TOGETHER][2] = x . w */
INLINE void two_rows(int words, const float *x, ptrdiff_t x_row, const float *w, ptrdiff_t w_row, float *sums) {
    vec total[LANES];
    int p = 0;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) total[i] = (vec){0};
    for (; p + LANES <= words; p += LANES) {
        vec a = load(w + p), b = load(w + w_row + p);
        __builtin_prefetch(w + 4 * w_row + p), __builtin_prefetch(w + 5 * w_row + p); /* the pair after the next */
#pragma GCC unroll 16
        for (int r = 0; r < TOGETHER; r++) {
            vec line = load(x + r * x_row + p);
            total[2 * r] = MULTIPLY_ADD(line, a, total[2 * r]);
            total[2 * r + 1] = MULTIPLY_ADD(line, b, total[2 * r + 1]);
        }
    }
    if (p < words) {
        vec a = load_some(w + p, words - p), b = load_some(w + w_row + p, words - p);
#pragma GCC unroll 16
        for (int r = 0; r < TOGETHER; r++) {
            vec line = load(x + r * x_row + p);
            total[2 * r] = MULTIPLY_ADD(line, a, total[2 * r]);
            total[2 * r + 1] = MULTIPLY_ADD(line, b, total[2 * r + 1]);
        }
    }
    transpose_lanes(total);
    vec found = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) found += total[i];
    store(sums, found);
}

int EXPORT(linear_some)(const float *x, const float *weight, const float *bias, const float *residual, float *y,
                         int64_t rows, int64_t in, int64_t out, int64_t threads) {
    const int words = words_of(in), padded = (rows + TOGETHER - 1) / TOGETHER * TOGETHER;
    const ptrdiff_t x_row = round_up(words) + LANES; /* rows 4096 bytes apart would share a few lines of cache */
    float *own = workspace(padded * x_row);
    if (!own) return 1;
    memset(own, 0, padded * x_row * sizeof(float));
    for (int64_t r = 0; r < rows; r++) pack_along(x + r * in, in, own + r * x_row);
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t j = 0; j < out; j += 2)
        for (int64_t r = 0; r < rows; r += TOGETHER) {
            float sums[LANES];
            const int64_t some = rows - r < TOGETHER ? rows - r : TOGETHER;
            two_rows(words, own + r * x_row, x_row, weight + j * words, j + 1 < out ? words : 0, sums);
            for (int64_t i = 0; i < some; i++)
                for (int64_t at = (r + i) * out + j, o = 0; o < 2 && j + o < out; o++)
                    y[at + o] = sums[2 * i + o] + (bias ? bias[j + o] : 0) + (residual ? residual[at + o] : 0);
        }
    free(own);
    return 0;
}

/* y = x W^T + bias + residual for some rows of x; `words` of W [out][in] are float32, or pairs of bfloat16 to which x is
   rounded once (`in` is even then).

   Bound by the reading of W up to some ten rows, and by the products from there on. WIDE rows of W at a time, read once,
   by one thread, meet LANES / WIDE rows of x. W is asked for two steps ahead, into L2: the processor alone, and into L1,
   fetches two thirds as much (Zen 4). Each group of rows of x asks for its part, so that memory is read all the while.
   Two rows of bfloat16 are a little quicker than four, and four of float32 than two, at 16 rows of x. */

#ifdef PAIRS
enum { WIDE = 2 }; /* rows of W at a time */
#else
enum { WIDE = 4 };
#endif
enum { TOGETHER = LANES / WIDE }; /* rows of x */

/* sums[TOGETHER][WIDE] = x . w, of which `wide` rows are there. Of the rows of W that come two steps later every
   `step`-th from `first` on is asked for. */
INLINE void some_rows(int words, const float *x, ptrdiff_t x_row, const float *w, int wide, int first, int step,
                      float *sums) {
    vec total[LANES];
    const float *row[WIDE];
    for (int j = 0; j < WIDE; j++) row[j] = w + (j < wide ? j : 0) * (ptrdiff_t)words;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) total[i] = (vec){0};
    for (int p = 0; p < words; p += LANES) {
        const int left = words - p;
        vec part[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) part[j] = load_some(row[j] + p, left);
        for (int j = first; j < WIDE; j += step) __builtin_prefetch(w + (j + 2 * WIDE) * (ptrdiff_t)words + p, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < TOGETHER; r++) {
            vec line = load(x + r * x_row + p);
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) total[WIDE * r + j] = MULTIPLY_ADD(line, part[j], total[WIDE * r + j]);
        }
    }
    store(sums, sums_of(total));
}

int EXPORT(linear_some)(const float *x, const float *weight, const float *bias, const float *residual, float *y,
                         int64_t rows, int64_t in, int64_t out, int64_t threads) {
    const int words = words_of(in), groups = (rows + TOGETHER - 1) / TOGETHER, padded = groups * TOGETHER;
    const ptrdiff_t x_row = round_up(words) + LANES; /* rows 4096 bytes apart would share a few lines of cache */
    float *own = workspace(padded * x_row);
    if (!own) return 1;
    memset(own, 0, padded * x_row * sizeof(float));
    for (int64_t r = 0; r < rows; r++) pack_along(x + r * in, in, own + r * x_row);
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t j = 0; j < out; j += WIDE) {
        const int wide = out - j < WIDE ? out - j : WIDE;
        for (int64_t r = 0; r < rows; r += TOGETHER) {
            float sums[LANES];
            const int64_t some = rows - r < TOGETHER ? rows - r : TOGETHER;
            some_rows(words, own + r * x_row, x_row, weight + j * words, wide, r / TOGETHER, groups, sums);
            for (int64_t i = 0; i < some; i++)
                for (int64_t at = (r + i) * out + j, o = 0; o < wide; o++)
                    y[at + o] = sums[WIDE * i + o] + (bias ? bias[j + o] : 0) + (residual ? residual[at + o] : 0);
        }
    }
    free(own);
    return 0;
}

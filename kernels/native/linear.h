/* Matrix products of any size: C[m][n] = act(A[m][k] B[k][n] + bias[n]) + residual[m][n].

   A and B may lie in any order (a step along each dimension is given, one of the two is 1), rows of C are contiguous.
   Bias, activation (a GELU) and residual may be left out; they are put to a block of C while it lies in cache.
   B is cut along k into pieces of PANEL_DEPTH, and each piece is packed into panels as wide as a tile, shared by all threads.
   A thread takes BLOCK_ROWS rows at a time, which stay in its L2 cache, and walks the panels.

   What is packed are words of four bytes: float32 numbers, or, where PAIRS is defined, two neighbours along k rounded to
   bfloat16, for instructions that multiply pairs and add to float32. There an A whose rows, or a B whose columns are
   contiguous may itself be bfloat16, its k even: its pairs are words already. */

#define PANEL (VECTORS * LANES)
enum { BLOCK_ROWS = 16 * ROWS, SHARES = 16 };

#ifdef PAIRS
enum { PER_WORD = 2, PANEL_DEPTH = 1024 };

/* Round to bfloat16, nearest even; the bits lie in the upper half of each word. NaN stays NaN. */
INLINE vec_int rounded(vec x) {
    vec_int bits = (vec_int)x;
    vec_int up = bits + 0x7fff + ((bits >> 16) & 1);
    return (vec_int)choose(x != x, x, (vec)up) & ~0xffff;
}
INLINE vec paired(vec first, vec second) { return (vec)(((rounded(first) >> 16) & 0xffff) | rounded(second)); }
#else
enum { PER_WORD = 1, PANEL_DEPTH = 512 };
#endif

INLINE int words_of(int k) { return (k + PER_WORD - 1) / PER_WORD; }

/* to[words][0..columns] of k rows that are `row` apart, zeros up to a multiple of LANES or, in a panel, to its end. */
static void pack_across(const float *from, ptrdiff_t row, int k, int columns, float *to, int to_row) {
    const int width = to_row == PANEL ? PANEL : round_up(columns);
    for (int p = 0; p < k; p += PER_WORD, to += to_row) {
        const float *line = from + p * row;
#ifdef PAIRS
        const float *next = p + 1 < k ? line + row : NULL;
        int j = 0;
        for (; j + LANES <= columns; j += LANES)
            store(to + j, paired(load(line + j), next ? load(next + j) : (vec){0}));
        if (j < width) {
            float first[BLOCK_ROWS] = {0}, second[BLOCK_ROWS] = {0};
            memcpy(first, line + j, (columns - j) * sizeof(float));
            if (next) memcpy(second, next + j, (columns - j) * sizeof(float));
            for (int i = 0; j < width; i += LANES, j += LANES)
                store(to + j, paired(load(first + i), load(second + i)));
        }
#else
        int j = 0;
        for (; j + LANES <= columns; j += LANES) store(to + j, load(line + j));
        for (; j < columns; j++) to[j] = line[j];
        for (; j < width; j++) to[j] = 0;
#endif
    }
}

#ifdef PAIRS
/* to[words] of k neighbours. */
static void pack_along(const float *from, int k, float *to) {
    int p = 0;
    for (; p + 2 * LANES <= k; p += 2 * LANES) {
        vec_int low = rounded(load(from + p)), high = rounded(load(from + p + LANES));
        store(to + p / 2, upper_halves(low, high));
    }
    if (p == k) return;
    const int left = k - p;
    vec low = load_some(from + p, left), high = left > LANES ? load_some(from + p + LANES, left - LANES) : (vec){0};
    store_some(to + p / 2, upper_halves(rounded(low), rounded(high)), words_of(left));
}
#else
static void pack_along(const float *from, int k, float *to) { memcpy(to, from, k * sizeof(float)); }
#endif

/* One panel of B: to[words][PANEL]. */
static void pack_panel(const float *b, ptrdiff_t b_row, ptrdiff_t b_column, int narrow, int k, int columns, float *to) {
    if (narrow) {
        if (columns < PANEL) memset(to, 0, (size_t)words_of(k) * PANEL * sizeof(float));
        transpose(b, b_column, columns, words_of(k), to, PANEL);
        return;
    }
    if (b_column == 1) {
        pack_across(b, b_row, k, columns, to, PANEL);
        return;
    }
    if (columns < PANEL) memset(to, 0, (size_t)words_of(k) * PANEL * sizeof(float));
#ifdef PAIRS
    float line[LANES][PANEL_DEPTH / PER_WORD];
    for (int j = 0; j < columns; j += LANES) {
        int lines = columns - j < LANES ? columns - j : LANES;
        for (int i = 0; i < lines; i++) pack_along(b + (j + i) * b_column, k, line[i]);
        transpose(line[0], PANEL_DEPTH / PER_WORD, lines, words_of(k), to + j, PANEL);
    }
#else
    transpose(b, b_column, columns, k, to, PANEL);
#endif
}

/* At most BLOCK_ROWS rows of A, packed where that is needed; strip_step is from one strip of ROWS rows to the next. */
static Operand pack_block(const float *a, ptrdiff_t a_row, ptrdiff_t a_column, int narrow, int rows, int k, float *to,
                          ptrdiff_t *strip_step) {
    if (narrow) {
        *strip_step = ROWS * a_row;
        return (Operand){a, a_row, 1};
    }
    if (a_column == 1) {
#ifdef PAIRS
        const ptrdiff_t row = PANEL_DEPTH / PER_WORD + 16; /* not a power of two: neighbours would share cache sets */
        for (int i = 0; i < rows; i++) pack_along(a + i * a_row, k, to + i * row);
        *strip_step = ROWS * row;
        return (Operand){to, row, 1};
#else
        *strip_step = ROWS * a_row;
        return (Operand){a, a_row, 1};
#endif
    }
    pack_across(a, a_column, k, rows, to, BLOCK_ROWS);
    *strip_step = ROWS;
    return (Operand){to, 1, BLOCK_ROWS};
}

static void panel_strip(int rows, int columns, int words, Operand a, const float *b, float *c, ptrdiff_t c_row, int add) {
#define PANEL_STRIP(R)                                                                                             \
    case R:                                                                                                        \
        if (columns > 2 * LANES || (VECTORS == 2 && columns > LANES))                                              \
            tile(R, VECTORS, words, a, b, PANEL, c, c_row, add);                                                   \
        else if (columns > LANES) tile(R, 2, words, a, b, PANEL, c, c_row, add);                                   \
        else tile(R, 1, words, a, b, PANEL, c, c_row, add);                                                        \
        break;
    switch (rows) {
        PANEL_STRIP(1) PANEL_STRIP(2) PANEL_STRIP(3) PANEL_STRIP(4) PANEL_STRIP(5) PANEL_STRIP(6)
    }
#undef PANEL_STRIP
}

static void block_by_panel(int rows, int columns, int words, Operand a, ptrdiff_t strip_step, const float *b, float *c,
                           ptrdiff_t c_row, int add) {
    for (int i = 0; i < rows; i += ROWS, a.at += strip_step, c += ROWS * c_row) {
        int count = rows - i < ROWS ? rows - i : ROWS;
        if (columns == PANEL) {
            panel_strip(count, PANEL, words, a, b, c, c_row, add);
            continue;
        }
        float edge[ROWS * PANEL];
        panel_strip(count, columns, words, a, b, edge, PANEL, 0);
        for (int r = 0; r < count; r++)
            for (int j = 0; j < columns; j++) c[r * c_row + j] = edge[r * PANEL + j] + (add ? c[r * c_row + j] : 0);
    }
}

/* What is done to a block of C when its sums are complete. */
typedef struct {
    const float *bias, *residual; /* or NULL */
    ptrdiff_t residual_row;
    int gelu;
} Finish;

static void finish(const Finish *f, int rows, int columns, int64_t i, int64_t j, float *c, ptrdiff_t c_row) {
    if (!f->bias && !f->residual && !f->gelu) return;
    for (int r = 0; r < rows; r++, c += c_row) {
        const float *residual = f->residual ? f->residual + (i + r) * f->residual_row + j : NULL;
        for (int x = 0; x < columns; x += LANES) {
            const int left = columns - x;
            vec y = load_some(c + x, left);
            if (f->bias) y += load_some(f->bias + j + x, left);
            if (f->gelu) y = vec_gelu(y);
            if (residual) y += load_some(residual + x, left);
            store_some(c + x, y, left);
        }
    }
}

enum { NARROW_A = 1, NARROW_B = 2 }; /* which operands are bfloat16; their steps count words of two */

int EXPORT(matrix_product)(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_column,
                           const float *b, int64_t b_row, int64_t b_column, int64_t narrow, float *c, int64_t c_row,
                           const float *bias, const float *residual, int64_t residual_row, int64_t gelu) {
    const Finish last = {bias, residual, residual_row, gelu != 0};
    const int a_step = narrow & NARROW_A ? PER_WORD : 1, b_step = narrow & NARROW_B ? PER_WORD : 1; /* along k */
    int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t groups = blocks < SHARES ? (SHARES + blocks - 1) / blocks : 1; /* of panels: work for all threads */
    if (groups > panels) groups = panels;
    int deepest = k < PANEL_DEPTH ? k : PANEL_DEPTH, failed = 0;
    size_t panel_size = (size_t)words_of(deepest) * PANEL;
    float *packed = workspace(panels * panel_size);
    if (!packed) return 1;
#pragma omp parallel
    {
        float *own = workspace(BLOCK_ROWS * (PANEL_DEPTH / PER_WORD + 16));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t p = 0; p < k; p += PANEL_DEPTH) {
            int depth = k - p < PANEL_DEPTH ? k - p : PANEL_DEPTH;
#pragma omp for schedule(static)
            for (int64_t j = 0; j < panels; j++) {
                int columns = n - j * PANEL < PANEL ? n - j * PANEL : PANEL;
                pack_panel(b + p / b_step * b_row + j * PANEL * b_column, b_row, b_column, narrow & NARROW_B, depth, columns,
                           packed + j * panel_size);
            }
#pragma omp for schedule(dynamic)
            for (int64_t share = 0; share < blocks * groups; share++) {
                int64_t i = share / groups, group = share % groups;
                int rows = m - i * BLOCK_ROWS < BLOCK_ROWS ? m - i * BLOCK_ROWS : BLOCK_ROWS;
                ptrdiff_t strip_step;
                if (!own) continue;
                Operand block = pack_block(a + i * BLOCK_ROWS * a_row + p / a_step * a_column, a_row, a_column,
                                           narrow & NARROW_A, rows, depth, own, &strip_step);
                for (int64_t j = group * panels / groups; j < (group + 1) * panels / groups; j++) {
                    int columns = n - j * PANEL < PANEL ? n - j * PANEL : PANEL;
                    block_by_panel(rows, columns, words_of(depth), block, strip_step, packed + j * panel_size,
                                   c + i * BLOCK_ROWS * c_row + j * PANEL, c_row, p > 0);
                    if (p + depth == k)
                        finish(&last, rows, columns, i * BLOCK_ROWS, j * PANEL,
                               c + i * BLOCK_ROWS * c_row + j * PANEL, c_row);
                }
            }
        }
        free(own);
    }
    free(packed);
    return failed;
}

/* One token for every sequence through an xLSTM-7B block; see step.h, whose mLSTM this is.

   y = z + down(swiglu(up(norm(z)))), z = x + out(sigmoid(o) * head_norm(mlstm(q, k, v, capped gates of norm(x)))) */

/* The parameters; what may be absent is NULL. The norms are RMS norms. */
typedef struct {
    const float *norm;            /* [width] */
    const void *maps;             /* [2 qk + 2 width][width]: q, k, v, o */
    const float *maps_bias;
    const float *gates, *gates_bias; /* [2 heads][width], input gates first */
    const float *head_norm;       /* [width] */
    const void *out;              /* [width][width] */
    const float *out_bias;
    const float *feed_forward_norm; /* [width] */
    const void *up;               /* [2 inner][width]: gate, up */
    const float *up_bias;
    const void *down; /* [width][inner] */
    const float *down_bias;
} CappedWeights;

typedef struct {
    int64_t rows, width, qk, inner, heads;
    float cap, eps, head_eps; /* cap 0: none */
} CappedSizes;

INLINE float dot_any(const float *a, const float *b, int64_t n) {
    vec total = {0};
    for (int64_t i = 0; i < n; i += LANES) total += load_some(a + i, n - i) * load_some(b + i, n - i);
    return sum(total);
}

/* From maps [rows][2 qk + 2 width] and the normed stream to what `out` reads, [rows][width]. */
static void capped_mixer(const CappedWeights *w, BlockState state, CappedSizes z, const float *maps,
                         const float *normed, float *mixed, int64_t threads) {
    const int64_t qk_dim = z.qk / z.heads, v_dim = z.width / z.heads, row = 2 * z.qk + 2 * z.width;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t s = 0; s < z.rows * z.heads; s++) {
        const int64_t r = s / z.heads, head = s % z.heads;
        const float *q = maps + r * row + head * qk_dim, *v = maps + r * row + 2 * z.qk + head * v_dim;
        float *h = mixed + r * z.width + head * v_dim, gates[2];
        for (int g = 0; g < 2; g++) {
            float gate = dot_any(normed + r * z.width, w->gates + (g * z.heads + head) * z.width, z.width);
            gate += w->gates_bias[g * z.heads + head];
            gates[g] = z.cap > 0 ? z.cap * tanhf(gate / z.cap) : gate;
        }
        memory_step(qk_dim, v_dim, q, q + z.qk, v, gates[0], log_sigmoid(gates[1]), state.C + s * qk_dim * v_dim,
                    state.n + s * qk_dim, state.m + s, state.C_new + s * qk_dim * v_dim, state.n_new + s * qk_dim,
                    state.m_new + s, h);
        layer_norm(h, v_dim, w->head_norm + head * v_dim, NULL, z.head_eps, h);
        for (int64_t j = 0; j < v_dim; j += LANES)
            store_some(h + j, load_some(h + j, v_dim - j) * vec_sigmoid(load_some(v + z.width + j, v_dim - j)), v_dim - j);
    }
}

int EXPORT(capped_mixer_step)(const CappedWeights *w, const float *C, const float *n, const float *m, float *C_new,
                              float *n_new, float *m_new, const float *maps, const float *normed, float *mixed,
                              int64_t rows, int64_t width, int64_t qk, int64_t heads, int64_t threads, float cap,
                              float head_eps) {
    BlockState state = {NULL, C, n, m, NULL, C_new, n_new, m_new};
    CappedSizes sizes = {rows, width, qk, 0, heads, cap, 0, head_eps};
    capped_mixer(w, state, sizes, maps, normed, mixed, threads);
    return 0;
}

/* The whole block, for few rows or some; `narrow`: bits for bfloat16 maps (1), out (2), up (4), down (8). */
int EXPORT(capped_block_step)(const CappedWeights *w, const float *C, const float *n, const float *m, float *C_new,
                              float *n_new, float *m_new, const float *x, float *y, int64_t rows, int64_t width,
                              int64_t qk, int64_t heads, int64_t threads, float cap, float head_eps, int64_t inner,
                              int64_t narrow, Pairs pairs, float eps) {
    BlockState state = {NULL, C, n, m, NULL, C_new, n_new, m_new};
    CappedSizes sizes = {rows, width, qk, inner, heads, cap, eps, head_eps};
    const int64_t row = 2 * qk + 2 * width;
    float *maps = workspace(rows * (row + 3 * width + 3 * inner)), *normed = maps + rows * row;
    if (!maps) return 1;
    float *mixed = normed + rows * width, *middle = mixed + rows * width, *up = middle + rows * width;
    float *active = up + rows * 2 * inner;
    RowNorm none = {0}, second = {w->feed_forward_norm, NULL, 1, eps};
    for (int64_t r = 0; r < rows; r++) rms_row(x + r * width, w->norm, width, eps, normed + r * width);
    int failed =
        block_map(normed, w->maps, w->maps_bias, none, NULL, maps, rows, width, row, narrow & 1, threads, pairs);
    if (!failed) capped_mixer(w, state, sizes, maps, normed, mixed, threads);
    failed = failed ||
             block_map(mixed, w->out, w->out_bias, none, x, middle, rows, width, width, narrow & 2, threads, pairs) ||
             block_map(middle, w->up, w->up_bias, second, NULL, up, rows, width, 2 * inner, narrow & 4, threads, pairs);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (rows > ROWS_OF_X)
    for (int64_t r = 0; r < rows; r++)
        if (!failed) activate_row(0, 1, inner, up + r * 2 * inner, active + r * inner);
    failed = failed ||
             block_map(active, w->down, w->down_bias, none, middle, y, rows, inner, width, narrow & 8, threads, pairs);
    free(maps);
    return failed;
}

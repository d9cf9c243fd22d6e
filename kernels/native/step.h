/* One token for every sequence: the mLSTM, and what stands around it in a block, each with its state.

   Bound by the reading and writing of C, which is gone through once, in the order in which it lies: decayed, added to,
   multiplied by q and written. C_new may be C, n_new n and m_new m.

   Tried and left: to keep the last tokens beside C and write it every eighth time. To read C alone takes 0.8 of the time
   of reading and writing it (two cores of a Zen 4), and what was saved went into the waiting tokens. */

#ifdef _OPENMP
#include <omp.h>
#endif

INLINE float log_sigmoid(float x) { return (x < 0 ? x : 0) - log1pf(expf(-fabsf(x))); }

/* One row of C, and what it adds to h. One at a time, since memory is fastest in the order in which it lies. */
INLINE void memory_row(int64_t v_dim, float q, float written, const float *v, float decay, const float *C, float *C_new,
                       float *h) {
    int64_t j = 0;
    for (; j + LANES <= v_dim; j += LANES) {
        vec c = load(C + j) * decay + load(v + j) * written;
        store(C_new + j, c);
        store(h + j, load(h + j) + c * q);
    }
    for (; j < v_dim; j++) {
        C_new[j] = C[j] * decay + v[j] * written;
        h[j] += C_new[j] * q;
    }
}

/* One head of one sequence; the gates are logarithms. */
static void memory_step(int64_t qk_dim, int64_t v_dim, const float *q, const float *k, const float *v, float log_input,
                        float log_forget, const float *C, const float *n, const float *m, float *C_new, float *n_new,
                        float *m_new, float *h) {
    float kept = log_forget + *m, most = kept > log_input ? kept : log_input;
    float decay = expf(kept - most), write = expf(log_input - most), by = 1 / sqrtf(qk_dim);
    vec along = {0};
    memset(h, 0, v_dim * sizeof(float));
    for (int64_t i = 0; i < qk_dim; i += LANES) {
        vec normaliser = load_some(n + i, qk_dim - i) * decay + load_some(k + i, qk_dim - i) * write;
        store_some(n_new + i, normaliser, qk_dim - i);
        along += normaliser * load_some(q + i, qk_dim - i);
    }
    for (int64_t i = 0; i < qk_dim; i++)
        memory_row(v_dim, q[i] * by, k[i] * write, v, decay, C + i * v_dim, C_new + i * v_dim, h);
    *m_new = most;
    float least = expf(-most), size = fabsf(sum(along) * by);
    float scale = 1 / (size > least ? size : least);
    for (int64_t j = 0; j < v_dim; j += LANES) store_some(h + j, load_some(h + j, v_dim - j) * scale, v_dim - j);
}

/* q, k [rows][heads][qk_dim], v and h [rows][heads][v_dim], gates [rows][heads] as logarithms, and the state. */
int EXPORT(mlstm_step)(const float *q, const float *k, const float *v, const float *log_input, const float *log_forget,
                       const float *C, const float *n, const float *m, float *C_new, float *n_new, float *m_new,
                       float *h, int64_t rows, int64_t heads, int64_t qk_dim, int64_t v_dim, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t s = 0; s < rows * heads; s++)
        memory_step(qk_dim, v_dim, q + s * qk_dim, k + s * qk_dim, v + s * v_dim, log_input[s], log_forget[s],
                    C + s * qk_dim * v_dim, n + s * qk_dim, m + s, C_new + s * qk_dim * v_dim, n_new + s * qk_dim,
                    m_new + s, h + s * v_dim);
    return 0;
}

/* linear_some of bfloat16 pairs, which another file has; NULL where the processor multiplies none. */
typedef int (*Pairs)(const float *, const float *, const float *, const float *, float *, int64_t, int64_t, int64_t,
                     int64_t);

/* few_rows, or for more rows linear_some. */
static int block_map(const float *x, const void *weight, const float *bias, RowNorm norm, const float *residual,
                     float *y, int64_t rows, int64_t in, int64_t out, int64_t narrow, int64_t threads, Pairs pairs) {
    if (rows <= ROWS_OF_X) return few_rows(x, weight, bias, norm, residual, y, rows, in, out, narrow, threads);
    float *own = norm.weight ? workspace(rows * in) : NULL;
    if (norm.weight && !own) return 1;
    for (int64_t r = 0; norm.weight && r < rows; r++)
        if (norm.rms) rms_row(x + r * in, norm.weight, in, norm.eps, own + r * in);
        else layer_norm(x + r * in, in, norm.weight, norm.bias, norm.eps, own + r * in);
    const float *read = own ? own : x;
    int failed = narrow ? pairs(read, weight, bias, residual, y, rows, in, out, threads)
                        : JOIN(linear_some, VARIANT)(read, weight, bias, residual, y, rows, in, out, threads);
    free(own);
    return failed;
}

/* y = W x + bias for `blocks` blocks of `size` numbers; w [blocks][in][out]. */
INLINE void block_maps(const int64_t size, int64_t blocks, const float *w, const float *bias, const float *x,
                       float *restrict y) {
    for (int64_t b = 0; b < blocks; b++, w += size * size, x += size, y += size) {
        for (int64_t o = 0; o < size; o++) y[o] = bias ? bias[b * size + o] : 0;
        for (int64_t i = 0; i < size; i++)
            for (int64_t o = 0; o < size; o++) y[o] += w[i * size + o] * x[i];
    }
}

/* The parameters of a NeurIPS mLSTM block; what may be absent is NULL. */
typedef struct {
    const float *norm, *norm_bias; /* [width] */
    const void *up;                /* [2 inner][width] */
    const float *up_bias;
    const void *down; /* [width][inner] */
    const float *down_bias;
    const float *taps, *taps_bias;            /* [inner][taps], [inner] */
    const float *query_key, *query_key_bias;  /* [2][blocks][out][in], [2][inner] */
    const float *value, *value_bias;          /* [blocks][out][in], [inner] */
    const float *gates, *gates_bias;          /* [2 heads][3 inner], input gates first, of q, k, v joined */
    const float *head_norm, *skip;            /* [inner] */
} BlockWeights;

typedef struct {
    const float *past, *C, *n, *m; /* past [rows][taps - 1][inner] */
    float *past_new, *C_new, *n_new, *m_new;
} BlockState;

typedef struct {
    int64_t rows, width, inner, heads, taps, size; /* size: of the blocks of q, k, v */
} BlockSizes;

/* Rotary positions of q and k: the cosine and sine of each pair of channels, or NULL for none. */
typedef struct {
    const float *turns; /* [rows][channels that turn together / 2][2] */
    int64_t whole;      /* all channels turn together and the gates see it; or each head by itself, behind the gates */
} Rotary;

/* Turn the pairs (2 j, 2 j + 1) of n channels. */
static void turn_pairs(const float *x, const float *turns, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i += 2) {
        float a = x[i], b = x[i + 1];
        y[i] = a * turns[i] - b * turns[i + 1];
        y[i + 1] = b * turns[i] + a * turns[i + 1];
    }
}

static void turn_blocks(const float *from, int64_t blocks, int64_t size, float *to) {
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t o = 0; o < size; o++)
            for (int64_t i = 0; i < size; i++) to[(b * size + i) * size + o] = from[(b * size + o) * size + i];
}

/* Convolution, SiLU, q, k and v of every row, for the blocks of channels from `first` to `last`.
   up [rows][2 inner]: the cell's input, and the gate of its output; joined [rows][3 inner]: q, k and v. */
static void mixer_inputs(const BlockWeights *w, BlockState state, BlockSizes z, const float *up, int64_t first,
                         int64_t last, float *space, float *convolved, float *joined) {
    int64_t inner = z.inner, size = z.size, taps = z.taps, begin = first * size, width = last * size - begin;
    float *turned = space, *maps = space + taps * width;
    for (int64_t t = 0; t < taps; t++)
        for (int64_t c = 0; c < width; c++) turned[t * width + c] = w->taps[(begin + c) * taps + t];
    for (int64_t map = 0; map < 3; map++)
        turn_blocks((map < 2 ? w->query_key + map * inner * size : w->value) + begin * size, last - first, size,
                    maps + map * width * size);
    for (int64_t r = 0; r < z.rows; r++) {
        const float *now = up + r * 2 * inner + begin, *past = state.past + r * (taps - 1) * inner + begin;
        float *past_new = state.past_new + r * (taps - 1) * inner + begin, *out = convolved + r * inner + begin;
        for (int64_t c = 0; c < width; c += LANES) {
            vec y = load_some(w->taps_bias + begin + c, width - c);
            for (int64_t t = 0; t < taps; t++) {
                vec part = load_some((t < taps - 1 ? past + t * inner : now) + c, width - c);
                y += part * load_some(turned + t * width + c, width - c);
                if (t) store_some(past_new + (t - 1) * inner + c, part, width - c);
            }
            store_some(out + c, y * vec_sigmoid(y), width - c);
        }
        for (int64_t map = 0; map < 3; map++) {
            const float *bias = map < 2 ? w->query_key_bias : w->value_bias, *from = map < 2 ? out : now;
            const float *weight = maps + map * width * size;
            float *y = joined + (r * 3 + map) * inner + begin;
            if (bias) bias += (map < 2 ? map * inner : 0) + begin;
            if (size == 4) block_maps(4, last - first, weight, bias, from, y);
            else block_maps(size, last - first, weight, bias, from, y);
        }
    }
}

/* Between up- and down-projection: mixed = (head_norm(mlstm(q, k, v, gates)) + skip * convolved) * silu(gate). */
static int mixer_step(const BlockWeights *w, BlockState state, BlockSizes z, Rotary rotary, const float *up,
                      float *mixed, int64_t threads, float eps) {
    int64_t rows = z.rows, inner = z.inner, heads = z.heads, blocks = inner / z.size, dim = inner / heads;
    float *joined = workspace(4 * rows * inner), *convolved = joined + 3 * rows * inner;
    if (!joined) return 1;
    int failed = 0, before_gates = rotary.turns && rotary.whole;
#pragma omp parallel num_threads((int)threads)
    {
        int64_t each = blocks, here = 0;
#ifdef _OPENMP
        each = (blocks + omp_get_num_threads() - 1) / omp_get_num_threads();
        here = omp_get_thread_num();
#endif
        int64_t first = here * each < blocks ? here * each : blocks;
        int64_t last = first + each < blocks ? first + each : blocks;
        float *space = workspace(each * z.size * (z.taps + 3 * z.size) + 3 * dim);
        if (!space) failed = 1;
        else mixer_inputs(w, state, z, up, first, last, space, convolved, joined);
#pragma omp barrier
        if (before_gates) {
#pragma omp for schedule(static)
            for (int64_t s = 0; s < 2 * rows; s++) {
                float *part = joined + (s / 2 * 3 + s % 2) * inner;
                if (!failed) turn_pairs(part, rotary.turns + s / 2 * inner, inner, part);
            }
        }
#pragma omp for schedule(static)
        for (int64_t s = 0; s < rows * heads; s++) {
            if (failed) continue;
            int64_t r = s / heads, head = s % heads, at = head * dim;
            const float *row = joined + r * 3 * inner, *gate = up + r * 2 * inner + inner + at;
            const float *past_silu = convolved + r * inner + at;
            float *h = space, gates[2];
            for (int g = 0; g < 2; g++) {
                const float *weight = w->gates + (g * heads + head) * 3 * inner;
                vec total = {0};
                for (int64_t i = 0; i < 3 * inner; i += LANES)
                    total += load_some(row + i, 3 * inner - i) * load_some(weight + i, 3 * inner - i);
                gates[g] = sum(total) + w->gates_bias[g * heads + head];
            }
            const float *q = row + at, *k = row + inner + at;
            if (rotary.turns && !before_gates) {
                turn_pairs(q, rotary.turns + r * dim, dim, space + dim);
                turn_pairs(k, rotary.turns + r * dim, dim, space + 2 * dim);
                q = space + dim, k = space + 2 * dim;
            }
            memory_step(dim, dim, q, k, row + 2 * inner + at, gates[0], log_sigmoid(gates[1]),
                        state.C + s * dim * dim, state.n + s * dim, state.m + s, state.C_new + s * dim * dim,
                        state.n_new + s * dim, state.m_new + s, h);
            layer_norm(h, dim, w->head_norm + at, NULL, eps, h);
            for (int64_t j = 0; j < dim; j += LANES) {
                vec skipped = load_some(w->skip + at + j, dim - j) * load_some(past_silu + j, dim - j);
                vec y = load_some(h + j, dim - j) + skipped, g = load_some(gate + j, dim - j);
                store_some(mixed + r * inner + at + j, y * g * vec_sigmoid(g), dim - j);
            }
        }
        free(space);
    }
    free(joined);
    return failed;
}

int EXPORT(mlstm_mixer_step)(const BlockWeights *weights, const float *past, const float *C, const float *n,
                             const float *m, float *past_new, float *C_new, float *n_new, float *m_new,
                             const float *up, float *mixed, int64_t rows, int64_t width, int64_t inner, int64_t heads,
                             int64_t taps, int64_t size, int64_t threads, const float *turns, int64_t whole,
                             float head_eps) {
    BlockState state = {past, C, n, m, past_new, C_new, n_new, m_new};
    BlockSizes sizes = {rows, width, inner, heads, taps, size};
    Rotary rotary = {turns, whole};
    return mixer_step(weights, state, sizes, rotary, up, mixed, threads, head_eps);
}

/* The whole block, for few rows or some: y = x + down(mixer(up(norm(x)))). */
int EXPORT(mlstm_block_step)(const BlockWeights *w, const float *past, const float *C, const float *n, const float *m,
                             float *past_new, float *C_new, float *n_new, float *m_new, const float *x, float *y,
                             int64_t rows, int64_t width, int64_t inner, int64_t heads, int64_t taps, int64_t size,
                             int64_t threads, const float *turns, int64_t whole, float head_eps, int64_t narrow_up,
                             int64_t narrow_down, Pairs pairs, float eps) {
    BlockState state = {past, C, n, m, past_new, C_new, n_new, m_new};
    BlockSizes sizes = {rows, width, inner, heads, taps, size};
    Rotary rotary = {turns, whole};
    float *up = workspace(3 * rows * inner), *mixed = up + 2 * rows * inner;
    int failed = !up ||
                 block_map(x, w->up, w->up_bias, (RowNorm){w->norm, w->norm_bias, 0, eps}, NULL, up, rows, width,
                           2 * inner, narrow_up, threads, pairs) ||
                 mixer_step(w, state, sizes, rotary, up, mixed, threads, head_eps) ||
                 block_map(mixed, w->down, w->down_bias, (RowNorm){0}, x, y, rows, inner, width, narrow_down, threads,
                           pairs);
    free(up);
    return failed;
}

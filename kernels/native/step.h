/* One token for every sequence: the mLSTM, and what stands around it in a block, each with its state.

   Bound by the reading and writing of C, which is gone through once, in the order in which it lies: decayed, added to,
   multiplied by q and written. C_new may be C, n_new n and m_new m. */

#ifdef _OPENMP
#include <omp.h>
#endif

INLINE float log_sigmoid(float x) { return (x < 0 ? x : 0) - log1pf(expf(-fabsf(x))); }
INLINE vec silu(vec x) { return x / (vec_exp(-x) + 1.0f); }

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
        vec normaliser = load_part(n, i, qk_dim) * decay + load_part(k, i, qk_dim) * write;
        store_part(n_new, i, qk_dim, normaliser);
        along += normaliser * load_part(q, i, qk_dim);
    }
    for (int64_t i = 0; i < qk_dim; i++)
        memory_row(v_dim, q[i] * by, k[i] * write, v, decay, C + i * v_dim, C_new + i * v_dim, h);
    *m_new = most;
    float least = expf(-most), size = fabsf(sum(along) * by);
    float scale = 1 / (size > least ? size : least);
    for (int64_t j = 0; j < v_dim; j += LANES) store_part(h, j, v_dim, load_part(h, j, v_dim) * scale);
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

/* y = W x + bias for `blocks` blocks of `size` numbers; w [blocks][in][out]. */
INLINE void block_maps(const int64_t size, int64_t blocks, const float *w, const float *bias, const float *x,
                       float *restrict y) {
    for (int64_t b = 0; b < blocks; b++, w += size * size, x += size, y += size) {
        for (int64_t o = 0; o < size; o++) y[o] = bias ? bias[b * size + o] : 0;
        for (int64_t i = 0; i < size; i++)
            for (int64_t o = 0; o < size; o++) y[o] += w[i * size + o] * x[i];
    }
}

typedef struct {
    int64_t rows, inner, heads, taps, size; /* size: of the blocks of q, k, v */
    const float *up;                        /* [rows][2 inner]: the cell's input, and the gate of its output */
    const float *taps_weight, *taps_bias;   /* [inner][taps], [inner] */
    const float *past;                      /* [rows][taps - 1][inner] */
    float *past_new;
    const float *query_key, *value;           /* [2][blocks][out][in], [blocks][out][in] */
    const float *query_key_bias, *value_bias; /* [2][inner], [inner], or NULL */
    float *joined, *convolved;                /* [rows][3 inner]: q, k, v; [rows][inner] */
} Mixer;

static void turn_blocks(const float *from, int64_t blocks, int64_t size, float *to) {
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t o = 0; o < size; o++)
            for (int64_t i = 0; i < size; i++) to[(b * size + i) * size + o] = from[(b * size + o) * size + i];
}

/* Convolution, SiLU, q, k and v of every row, for the blocks of channels from `first` to `last`. */
static void mixer_inputs(const Mixer *x, int64_t first, int64_t last, float *space) {
    int64_t inner = x->inner, size = x->size, taps = x->taps, blocks = last - first, begin = first * size;
    int64_t width = blocks * size, all_blocks = inner / size;
    float *turned = space, *maps = space + taps * width;
    for (int64_t t = 0; t < taps; t++)
        for (int64_t c = 0; c < width; c++) turned[t * width + c] = x->taps_weight[(begin + c) * taps + t];
    for (int64_t map = 0; map < 3; map++)
        turn_blocks((map < 2 ? x->query_key + map * all_blocks * size * size : x->value) + begin * size, blocks, size,
                    maps + map * width * size);
    for (int64_t r = 0; r < x->rows; r++) {
        const float *now = x->up + r * 2 * inner + begin, *past = x->past + r * (taps - 1) * inner + begin;
        float *past_new = x->past_new + r * (taps - 1) * inner + begin, *convolved = x->convolved + r * inner + begin;
        for (int64_t c = 0; c < width; c += LANES) {
            vec y = load_part(x->taps_bias + begin, c, width);
            for (int64_t t = 0; t < taps; t++) {
                vec part = load_part(t < taps - 1 ? past + t * inner : now, c, width);
                y += part * load_part(turned + t * width, c, width);
                if (t) store_part(past_new + (t - 1) * inner, c, width, part);
            }
            store_part(convolved, c, width, silu(y));
        }
        for (int64_t map = 0; map < 3; map++) {
            const float *bias = map < 2 ? x->query_key_bias : x->value_bias, *from = map < 2 ? convolved : now;
            const float *w = maps + map * width * size;
            float *y = x->joined + (r * 3 + map) * inner + begin;
            if (bias) bias += (map < 2 ? map * inner : 0) + begin;
            if (size == 4) block_maps(4, blocks, w, bias, from, y);
            else block_maps(size, blocks, w, bias, from, y);
        }
    }
}

/* A NeurIPS mLSTM block between its up- and its down-projection, one token for every sequence:
   mixed = (head_norm(mlstm(q, k, v, gates)) + skip * convolved) * silu(gate).

   gates_weight [2 heads][3 inner] (input gates first), gates_bias [2 heads], head_weight and skip [inner],
   mixed [rows][inner]; the rest as in Mixer and mlstm_step, qk_dim = v_dim = inner / heads. */
int EXPORT(mlstm_mixer_step)(const float *up, const float *taps_weight, const float *taps_bias, const float *query_key,
                             const float *query_key_bias, const float *value, const float *value_bias,
                             const float *gates_weight, const float *gates_bias, const float *head_weight,
                             const float *skip, const float *past, const float *C, const float *n, const float *m,
                             float *past_new, float *C_new, float *n_new, float *m_new, float *mixed, int64_t rows,
                             int64_t inner, int64_t heads, int64_t taps, int64_t size, int64_t threads, float eps) {
    float *shared = workspace(4 * rows * inner);
    if (!shared) return 1;
    Mixer x = {.rows = rows, .inner = inner, .heads = heads, .taps = taps, .size = size, .up = up,
               .taps_weight = taps_weight, .taps_bias = taps_bias, .past = past, .past_new = past_new,
               .query_key = query_key, .value = value, .query_key_bias = query_key_bias, .value_bias = value_bias,
               .joined = shared, .convolved = shared + 3 * rows * inner};
    int64_t blocks = inner / size, dim = inner / heads;
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int64_t each = blocks, here = 0;
#ifdef _OPENMP
        each = (blocks + omp_get_num_threads() - 1) / omp_get_num_threads();
        here = omp_get_thread_num();
#endif
        int64_t first = here * each < blocks ? here * each : blocks;
        int64_t last = first + each < blocks ? first + each : blocks;
        float *space = workspace(each * size * (taps + 3 * size) + dim);
        if (!space) failed = 1;
        else mixer_inputs(&x, first, last, space);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t s = 0; s < rows * heads; s++) {
            if (failed) continue;
            int64_t r = s / heads, head = s % heads, at = head * dim;
            const float *row = x.joined + r * 3 * inner, *gate = up + r * 2 * inner + inner + at;
            const float *convolved = x.convolved + r * inner + at;
            float *h = space, gates[2];
            for (int g = 0; g < 2; g++) {
                const float *w = gates_weight + (g * heads + head) * 3 * inner;
                vec total = {0};
                for (int64_t i = 0; i < 3 * inner; i += LANES)
                    total += load_part(row, i, 3 * inner) * load_part(w, i, 3 * inner);
                gates[g] = sum(total) + gates_bias[g * heads + head];
            }
            memory_step(dim, dim, row + at, row + inner + at, row + 2 * inner + at, gates[0], log_sigmoid(gates[1]),
                        C + s * dim * dim, n + s * dim, m + s, C_new + s * dim * dim, n_new + s * dim, m_new + s, h);
            layer_norm(h, dim, head_weight + at, NULL, eps, h);
            for (int64_t j = 0; j < dim; j += LANES) {
                vec y = load_part(h, j, dim) + load_part(skip + at, j, dim) * load_part(convolved, j, dim);
                store_part(mixed + r * inner + at, j, dim, y * silu(load_part(gate, j, dim)));
            }
        }
        free(space);
    }
    free(shared);
    return failed;
}

/* Attention on packed sequences: FlashAttention-2 (Dao 2023) with one query in each lane.

   A block of QUERIES queries stands in the columns of everything that the loop over the keys touches:

       S' = K Q' / sqrt(dim)      P' = exp(S' - top)      O' += V' P'          (' is transposed: [.., queries])

   so the running maximum, the sums and the rescaling are vertical, head sizes are free, and no key or value is read
   beyond its sequence. Near the diagonal the keys come in steps of STEP, and the queries before them are left out.
   Every product runs in L1 or L2; nothing of size queries x keys is ever written to memory.

   Floor: 4 dim FLOP per visible pair forward, 10 dim more backward (S and P are made again). */

#include "attention_blocks.h"

enum { FEW = 16 }; /* keys at a time for a single query */

/* to[rows][columns] = from[rows][columns]: rows of a head lie 4 kB apart and would push each other out of L1. */
static void copy(const float *from, ptrdiff_t from_row, int rows, int columns, float *to) {
    for (int r = 0; r < rows; r++) {
        int c = 0;
        for (; c + LANES <= columns; c += LANES) store(to + r * columns + c, load(from + r * from_row + c));
        for (; c < columns; c++) to[r * columns + c] = from[r * from_row + c];
    }
}

/* The keys and values of the next block; after the last one, those of the next head, which lie beside these. */
static void fetch_next(const Part *p, Range r, int j, int size) {
    const Attention *a = p->a;
    int next = j + size, ends = next >= r.last, rows = ends || next + size <= r.last ? size : r.last - next;
    if (ends) next = r.first;
    fetch(p->k + next * a->k_token + (ends ? a->k_head : 0), a->k_token, rows, a->dim);
    fetch(p->v + next * a->v_token + (ends ? a->v_head : 0), a->v_token, rows, a->v_dim);
}

static void attend(const Part *p, int begin, float scale, float *work, float *y, ptrdiff_t y_row, float *top,
                   float *inverse) {
    const Attention *a = p->a;
    const int dim = a->dim, v_dim = a->v_dim;
    Range r = visible_range(p, begin);
    int count = r.i1 - r.i0, n = round_up(count);
    float *q = work, *s = q + dim * QUERIES, *o = s + KEYS * QUERIES, *v = o + v_dim * QUERIES;
    vec m[QUERIES / LANES], total[QUERIES / LANES];
    for (int c = 0; c < n / LANES; c++) m[c] = all(-3e38f), total[c] = (vec){0};
    memset(o, 0, v_dim * QUERIES * sizeof(float));
    turn_in(p->q + begin * a->q_token, a->q_token, count, dim, scale, q);
    fetch(p->q + a->q_head + begin * a->q_token, a->q_token, count, dim);
    Block b;
    for (int j = r.first; j < r.last; j += b.size) {
        b = next_block(p, r, j);
        copy(p->v + j * a->v_token, a->v_token, b.size, v_dim, v);
        Operand keys = {p->k + j * a->k_token, a->k_token, 1}, values = {v, 1, v_dim};
        fetch_next(p, r, j, b.size);
        product(b.size, n - b.skip, dim, keys, q + b.skip, QUERIES, s + b.skip, QUERIES, 0);
        if (b.masked) hide(p, r, b, j, s);
        for (int c = b.skip; c < n; c += LANES) {
            vec high = m[c / LANES], sum = {0};
            for (int i = 0; i < b.size; i++) high = vec_max(load(s + i * QUERIES + c), high);
            for (int i = 0; i < b.size; i++) {
                vec weight = vec_exp_below(load(s + i * QUERIES + c) - high);
                sum += weight;
                store(s + i * QUERIES + c, weight);
            }
            vec shrink = vec_exp_below(m[c / LANES] - high);
            m[c / LANES] = high;
            total[c / LANES] = total[c / LANES] * shrink + sum;
            for (int i = 0; i < v_dim; i++) store(o + i * QUERIES + c, load(o + i * QUERIES + c) * shrink);
        }
        product(v_dim, n - b.skip, b.size, values, s + b.skip, QUERIES, o + b.skip, QUERIES, 1);
    }
    for (int c = 0; c < n; c += LANES) {
        vec share = 1.0f / total[c / LANES];
        for (int i = 0; i < v_dim; i++) store(o + i * QUERIES + c, load(o + i * QUERIES + c) * share);
        for (int lane = 0; lane < LANES && c + lane < count; lane++) {
            top[c + lane] = m[c / LANES][lane];
            inverse[c + lane] = share[lane];
        }
    }
    turn_out(o, count, v_dim, y, y_row);
}

/* One query, as in decoding: reading the keys and values is all that may take time, so now they lie in the lanes, and
   the heads that stand side by side in memory are taken block by block together. */

/* Rows that will be read soon. Asked for all at once they would wait for each other and the work for them. */
typedef struct {
    const float *at;
    ptrdiff_t row;
    int rows, columns;
} Coming;

INLINE void fetch_some(Coming next, int first, int count) {
    for (int i = first; i < first + count && i < next.rows; i++) prefetch_row(next.at + i * next.row, next.columns);
}

/* q . k of LANES keys, of which `rows` are there; the other lanes repeat the last one. */
INLINE vec dots(const float *q, const float *k, ptrdiff_t k_row, int rows, int dim, int key, Coming k_next,
                Coming v_next) {
    vec total[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const float *at[4];
        for (int n = 0; n < 4; n++) at[n] = k + (i + n < rows ? i + n : rows - 1) * k_row, total[i + n] = (vec){0};
        fetch_some(k_next, key + i, 4);
        fetch_some(v_next, key + i, 4);
        int c = 0;
        for (; c + LANES <= dim; c += LANES) {
            vec line = load(q + c);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) total[i + n] = MULTIPLY_ADD(line, load(at[n] + c), total[i + n]);
        }
        if (c < dim)
            for (int n = 0; n < 4; n++) total[i + n] += load_some(q + c, dim - c) * load_some(at[n] + c, dim - c);
    }
    return sums_of(total);
}

/* `shared` key heads with `share` heads of the query each; what belongs to a head in `top` and `inverse` is `step`
   apart. `weights` holds [share][FEW] numbers. */
static void attend_one(const Part *p, int shared, int share, float scale, float *weights, float *y, float *top,
                       float *inverse, ptrdiff_t step) {
    const Attention *a = p->a;
    const int dim = a->dim, v_dim = a->v_dim, whole = v_dim / LANES * LANES;
    Range r = visible_range(p, 0);
    memset(y, 0, shared * share * v_dim * sizeof(float));
    for (int h = 0; h < shared * share; h++) top[h * step] = -3e38f, inverse[h * step] = 0;
    for (int j = r.first; j < r.last; j += FEW) {
        const int left = r.last - j, size = left < FEW ? left : FEW, more = left - size < FEW ? left - size : FEW;
        for (int g = 0; g < shared; g++) {
            const float *k = p->k + j * a->k_token + g * a->k_head, *v = p->v + j * a->v_token + g * a->v_head;
            float *out = y + g * share * v_dim;
            for (int n = 0; n < share; n++) {
                const Coming k_next = {k + FEW * a->k_token, a->k_token, n ? 0 : more, dim};
                const Coming v_next = {v + FEW * a->v_token, a->v_token, n < share - 1 ? 0 : more, v_dim};
                const int h = g * share + n;
                float *weight = weights + n * FEW, old = top[h * step];
                vec score[FEW / LANES], high = all(old), total = {0};
                for (int i = 0; i < FEW / LANES; i++) {
                    const int rows = size - i * LANES;
                    score[i] = all(-INFINITY);
                    if (rows <= 0) continue;
                    score[i] = dots(p->q + h * a->q_head, k + i * LANES * a->k_token, a->k_token, rows, dim,
                                    i * LANES, k_next, v_next) * scale;
                    score[i] = choose((vec_int){EACH(LANE, 0)} < rows, score[i], all(-INFINITY));
                    high = vec_max(score[i], high);
                }
                const float now = highest(high);
                for (int i = 0; i < FEW / LANES; i++) {
                    vec x = vec_exp_below(score[i] - now);
                    store(weight + i * LANES, x);
                    total += x;
                }
                if (now > old) {
                    const float shrink = vec_exp_below(all(old - now))[0];
                    inverse[h * step] *= shrink, top[h * step] = now;
                    for (int c = 0; c < v_dim; c++) out[n * v_dim + c] *= shrink;
                }
                inverse[h * step] += sum(total);
            }
            product(share, whole, size, (Operand){weights, FEW, 1}, v, a->v_token, out, v_dim, 1);
            for (int n = 0; whole < v_dim && n < share; n++)
                for (int i = 0; i < size; i++)
                    for (int c = whole; c < v_dim; c++)
                        out[n * v_dim + c] += weights[n * FEW + i] * v[i * a->v_token + c];
        }
    }
    for (int h = 0; h < shared * share; h++) {
        inverse[h * step] = 1.0f / inverse[h * step];
        for (int c = 0; c < v_dim; c++) y[h * v_dim + c] *= inverse[h * step];
    }
}

/* y[tokens][heads][v_dim] and stats[2][heads][tokens], the maximum of each row of S and 1 / the sum of its P. */
EXPORT(int attention_forward)(const float *q, const float *k, const float *v, const int64_t *edges,
                              const int64_t *key_starts, const int64_t *key_lengths, const int64_t *prefix,
                              const Attention *a, float scale, float *y, float *stats) {
    const int64_t tokens = edges[a->sequences], heads = a->heads, y_row = heads * a->v_dim;
    const int share = heads / a->kv_heads, together = (256 + a->dim - 1) / a->dim; /* 1 kB of each key */
    int64_t *starts = block_starts(a, edges);
    if (!starts) return 1;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *work = workspace((a->dim + KEYS + a->v_dim) * QUERIES + KEYS * a->v_dim + share * FEW);
        failed = !work;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < starts[a->sequences] * heads; task++) {
            if (!work) continue;
            int64_t block = task / heads, head = task % heads, s = owner(starts, a->sequences, block);
            Part p = attention_part(a, q, k, v, edges, key_starts, key_lengths, prefix, s, head);
            int begin = (block - starts[s]) * QUERIES;
            int64_t token = edges[s] + begin;
            float *out = y + token * y_row + head * a->v_dim;
            float *top = stats + head * tokens + token, *inverse = top + heads * tokens;
            if (p.queries > 1) attend(&p, begin, scale, work, out, y_row, top, inverse);
            else if (head % (share * together) == 0) {
                int rest = a->kv_heads - head / share;
                attend_one(&p, rest < together ? rest : together, share, scale, work, out, top, inverse, tokens);
            }
        }
        free(work);
    }
    free(starts);
    return failed;
}

/* All queries of the heads that share one key head in one sequence. dk and dv are summed in working memory. */
typedef struct {
    float *q_turned, *q_rows, *dy_turned, *dy_rows, *y_turned, *dq, *p, *dp, *k, *dk, *dv;
} Backward;

static size_t backward_floats(const Attention *a, int64_t keys) {
    size_t wide = round_up(a->dim) + round_up(a->v_dim);
    return QUERIES * (2 * a->dim + 2 * a->v_dim + wide + 2 * KEYS) + KEYS * a->dim + keys * wide;
}

static Backward backward_space(const Attention *a, int64_t keys, float *work) {
    Backward w;
    int wide = round_up(a->dim), v_wide = round_up(a->v_dim);
    w.q_turned = work;
    w.q_rows = w.q_turned + a->dim * QUERIES;
    w.dy_rows = w.q_rows + wide * QUERIES;
    w.dy_turned = w.dy_rows + v_wide * QUERIES;
    w.y_turned = w.dy_turned + a->v_dim * QUERIES;
    w.dq = w.y_turned + a->v_dim * QUERIES;
    w.p = w.dq + a->dim * QUERIES;
    w.dp = w.p + KEYS * QUERIES;
    w.dk = w.dp + KEYS * QUERIES;
    w.dv = w.dk + keys * wide;
    w.k = w.dv + keys * v_wide;
    return w;
}

/* to[QUERIES][wide] = scale * from[rows][columns], zeros around it. */
static void copy_rows(const float *from, ptrdiff_t from_row, int rows, int columns, float scale, float *to, int wide) {
    memset(to, 0, QUERIES * wide * sizeof(float));
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) to[r * wide + c] = from[r * from_row + c] * scale;
}

static void attend_backward(const Part *p, int begin, float scale, const float *y, const float *dy, ptrdiff_t y_row,
                            const float *top, const float *inverse, Backward w, float *dq, ptrdiff_t dq_row) {
    const Attention *a = p->a;
    const int dim = a->dim, v_dim = a->v_dim, wide = round_up(dim), v_wide = round_up(v_dim);
    Range r = visible_range(p, begin);
    int count = r.i1 - r.i0, n = round_up(count);
    float m[QUERIES] = {0}, share[QUERIES] = {0}, delta[QUERIES] = {0};
    memcpy(m, top, count * sizeof(float));
    memcpy(share, inverse, count * sizeof(float)); /* 0 in the lanes without a query: their P is 0 */
    const float *q = p->q + begin * a->q_token;
    turn_in(q, a->q_token, count, dim, scale, w.q_turned);
    turn_in(dy, y_row, count, v_dim, 1.0f, w.dy_turned);
    turn_in(y, y_row, count, v_dim, 1.0f, w.y_turned);
    for (int i = 0; i < v_dim * QUERIES; i += QUERIES) /* in the order of the products: where P is 1, dS is 0 */
        for (int c = 0; c < n; c++) delta[c] += w.y_turned[i + c] * w.dy_turned[i + c];
    copy_rows(q, a->q_token, count, dim, scale, w.q_rows, wide);
    copy_rows(dy, y_row, count, v_dim, 1.0f, w.dy_rows, v_wide);
    memset(w.dq, 0, dim * QUERIES * sizeof(float));
    fetch(q + a->q_head, a->q_token, count, dim);
    fetch(y + v_dim, y_row, count, v_dim);
    fetch(dy + v_dim, y_row, count, v_dim);
    Block b;
    for (int j = r.first; j < r.last; j += b.size) {
        b = next_block(p, r, j);
        int skip = b.skip, lanes = n - skip;
        copy(p->k + j * a->k_token, a->k_token, b.size, dim, w.k);
        fetch_next(p, r, j, b.size);
        Operand keys = {w.k, dim, 1}, keys_turned = {w.k, 1, dim}, values = {p->v + j * a->v_token, a->v_token, 1};
        Operand weights = {w.p + skip, QUERIES, 1}, dscores = {w.dp + skip, QUERIES, 1};
        product(b.size, lanes, dim, keys, w.q_turned + skip, QUERIES, w.p + skip, QUERIES, 0);
        product(b.size, lanes, v_dim, values, w.dy_turned + skip, QUERIES, w.dp + skip, QUERIES, 0);
        if (b.masked) hide(p, r, b, j, w.p);
        for (int c = skip; c < n; c += LANES) {
            vec high = load(m + c), part = load(share + c), mean = load(delta + c);
            for (int row = 0; row < b.size; row++) {
                float *at = w.p + row * QUERIES + c, *dat = w.dp + row * QUERIES + c;
                vec weight = vec_exp_below(load(at) - high) * part;
                store(at, weight);
                store(dat, weight * (load(dat) - mean));
            }
        }
        product(b.size, v_wide, lanes, weights, w.dy_rows + skip * v_wide, v_wide, w.dv + j * v_wide, v_wide, 1);
        product(b.size, wide, lanes, dscores, w.q_rows + skip * wide, wide, w.dk + j * wide, wide, 1);
        product(dim, lanes, b.size, keys_turned, w.dp + skip, QUERIES, w.dq + skip, QUERIES, 1);
    }
    for (int i = 0; i < dim * QUERIES; i++) w.dq[i] *= scale;
    turn_out(w.dq, count, dim, dq, dq_row);
}

/* Gradients of contiguous shapes [tokens or keys][heads or kv_heads][dim or v_dim]. */
EXPORT(int attention_backward)(const float *q, const float *k, const float *v, const int64_t *edges,
                               const int64_t *key_starts, const int64_t *key_lengths, const int64_t *prefix,
                               const Attention *a, float scale, const float *y, const float *stats, const float *dy,
                               float *dq, float *dk, float *dv) {
    const int64_t tokens = edges[a->sequences], heads = a->heads, share = heads / a->kv_heads;
    const int64_t q_row = heads * a->dim, y_row = heads * a->v_dim;
    const int wide = round_up(a->dim), v_wide = round_up(a->v_dim);
    int64_t longest = 0;
    for (int64_t s = 0; s < a->sequences; s++)
        if (key_lengths[s] > longest) longest = key_lengths[s];
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *work = workspace(backward_floats(a, longest));
        failed = !work;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < a->sequences * a->kv_heads; task++) {
            if (!work) continue;
            int64_t s = task / a->kv_heads, shared = task % a->kv_heads, keys = key_lengths[s];
            Backward w = backward_space(a, keys, work);
            memset(w.dk, 0, keys * wide * sizeof(float));
            memset(w.dv, 0, keys * v_wide * sizeof(float));
            for (int64_t head = shared * share; head < (shared + 1) * share; head++) {
                Part p = attention_part(a, q, k, v, edges, key_starts, key_lengths, prefix, s, head);
                for (int begin = 0; begin < p.queries; begin += QUERIES) {
                    int64_t token = edges[s] + begin, at = token * y_row + head * a->v_dim;
                    const float *top = stats + head * tokens + token;
                    attend_backward(&p, begin, scale, y + at, dy + at, y_row, top, top + heads * tokens, w,
                                    dq + token * q_row + head * a->dim, q_row);
                }
            }
            for (int64_t j = 0; j < keys; j++) {
                int64_t row = (key_starts[s] + j) * a->kv_heads + shared;
                memcpy(dk + row * a->dim, w.dk + j * wide, a->dim * sizeof(float));
                memcpy(dv + row * a->v_dim, w.dv + j * v_wide, a->v_dim * sizeof(float));
            }
        }
        free(work);
    }
    return failed;
}

/* Attention whose products are of bfloat16 pairs and add to float32: attention.h without its backward.

   Keys, two neighbours of a head in each word, and values, two keys in each word, are paired once for all blocks of
   queries, queries and weights block by block. What is summed and divided by is the weights before they are
   rounded. The scores are in units of ln 2, which saves the exponential a product, and a cubic is enough for a weight
   that is rounded to 2^-9.

   Floor: as attention.h, at twice the speed of its products, and as many exponentials, which are the larger part of heads
   below 64. Reached of the 220 GFLOP/s of one Zen 4 core, not causal: 0.71 with heads of 64, 0.58 of 24, 0.51 of 16; in
   time 1.9 of attention.h. */

#include "attention_blocks.h"

/* 2^x to within 7.5e-5 of itself; NaN stays NaN. */
INLINE vec power(vec x) {
    vec r = (vec)_mm512_reduce_ps((__m512)x, 1); /* x - floor(x) */
    vec p = (all(7.8024540e-2f) * r + 2.2606720e-1f) * r + 6.9583349e-1f;
    return (vec)_mm512_scalef_ps((__m512)(p * r + 9.9992523e-1f), (__m512)x);
}

/* As `paired`, of finite numbers: half a unit in the last place is rounded up. */
INLINE vec weights_paired(vec first, vec second) {
    return (vec)(((((vec_int)first + 0x8000) >> 16) & 0xffff) | (((vec_int)second + 0x8000) & ~0xffff));
}

/* to[pairs of rows][columns] of from[rows][columns]; a last row alone is paired with zeros. */
static void pair_rows(const float *from, ptrdiff_t from_row, int rows, int columns, float *to, int to_row) {
    for (int r = 0; r < rows; r += 2, to += to_row)
        for (int c = 0; c < columns; c += LANES) {
            const float *at = from + r * from_row + c;
            vec second = r + 1 < rows ? load_some(at + from_row, columns - c) : (vec){0};
            store(to + c, paired(load_some(at, columns - c), second));
        }
}

/* Scores s[size][QUERIES] to weights in pairs, s[pairs][QUERIES], for `columns` vectors of queries side by side: a maximum
   or a sum alone waits for the one before it. m, total and the sums o[v_dim][QUERIES] are brought to the new maximum. */
INLINE void softmax_columns(const int columns, int size, int v_dim, float *s, float *o, vec *m, vec *total) {
    vec high[QUERIES / LANES], sum[QUERIES / LANES];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) high[c] = m[c], sum[c] = (vec){0};
    for (int i = 0; i < size; i++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) high[c] = vec_max(load(s + i * QUERIES + c * LANES), high[c]);
    for (int i = 0; i < (size + 1) / 2; i++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            const float *at = s + 2 * i * QUERIES + c * LANES;
            vec first = power(load(at) - high[c]), second = power(load(at + QUERIES) - high[c]);
            if (2 * i + 1 == size) second = (vec){0};
            sum[c] += first + second;
            store(s + i * QUERIES + c * LANES, weights_paired(first, second));
        }
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
        if (_mm512_cmp_ps_mask((__m512)high[c], (__m512)m[c], _CMP_NEQ_UQ)) { /* seldom, but for the first keys */
            vec shrink = power(m[c] - high[c]);
            m[c] = high[c];
            total[c] *= shrink;
            for (int i = 0; i < v_dim; i++) store(o + i * QUERIES + c * LANES, load(o + i * QUERIES + c * LANES) * shrink);
        }
        total[c] += sum[c];
    }
}

/* `keys` and `values` are those of the head: [keys][words of dim], [pairs of keys][round_up(v_dim)]. */
static void attend_pairs(const Part *p, const float *keys, const float *values, int begin, float scale, float *work, float *y,
                         ptrdiff_t y_row) {
    const Attention *a = p->a;
    const int dim = a->dim, words = words_of(dim), v_dim = a->v_dim, wide = round_up(v_dim);
    Range r = visible_range(p, begin);
    int count = r.i1 - r.i0, n = round_up(count);
    float *q = work, *s = q + dim * QUERIES, *o = s + KEYS * QUERIES;
    vec m[QUERIES / LANES], total[QUERIES / LANES];
    for (int c = 0; c < n / LANES; c++) m[c] = all(-3e38f), total[c] = (vec){0};
    memset(o, 0, v_dim * QUERIES * sizeof(float));
    turn_in(p->q + begin * a->q_token, a->q_token, count, dim, scale * 1.44269504f, q);
    pair_rows(q, QUERIES, dim, QUERIES, q, QUERIES); /* row i is read before row i / 2 is written */
    fetch(p->q + a->q_head + begin * a->q_token, a->q_token, count, dim);
    Block b;
    for (int j = r.first / 2 * 2; j < r.last; j += b.size) { /* a key before the first is hidden by the window */
        b = next_block(p, r, j);
        const int pairs = (b.size + 1) / 2;
        Operand own = {keys + j * words, words, 1}, turned = {values + j / 2 * wide, 1, wide};
        product(b.size, n - b.skip, words, own, q + b.skip, QUERIES, s + b.skip, QUERIES, 0);
        if (b.masked) hide(p, r, b, j, s);
        if (b.size % 2) memset(s + b.size * QUERIES, 0, QUERIES * sizeof(float));
        if (n - b.skip == QUERIES) softmax_columns(QUERIES / LANES, b.size, v_dim, s, o, m, total);
        else
            for (int c = b.skip; c < n; c += LANES)
                softmax_columns(1, b.size, v_dim, s + c, o + c, m + c / LANES, total + c / LANES);
        product(v_dim, n - b.skip, pairs, turned, s + b.skip, QUERIES, o + b.skip, QUERIES, 1);
    }
    for (int c = 0; c < n; c += LANES) {
        vec share = 1.0f / total[c / LANES];
        for (int i = 0; i < v_dim; i++) store(o + i * QUERIES + c, load(o + i * QUERIES + c) * share);
    }
    turn_out(o, count, v_dim, y, y_row);
}

/* y[tokens][heads][v_dim] */
int EXPORT(attention_forward)(const float *q, const float *k, const float *v, const int64_t *edges,
                              const int64_t *key_starts, const int64_t *key_lengths, const int64_t *prefix,
                              const Attention *a, float scale, float *y) {
    const int64_t heads = a->heads, kv_heads = a->kv_heads, y_row = heads * a->v_dim, wide = round_up(a->v_dim);
    const int64_t end = a->sequences ? key_starts[a->sequences - 1] + key_lengths[a->sequences - 1] : 0;
    const int64_t words = words_of(a->dim);
    const int64_t pairs = end / 2 + a->sequences; /* those of sequence s begin at key_starts[s] / 2 + s */
    int64_t *starts = block_starts(a, edges);
    float *keys = workspace(kv_heads * (end * words + pairs * wide)), *values = keys + kv_heads * end * words;
    if (!starts || !keys) {
        free(starts), free(keys);
        return 1;
    }
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *work = workspace((a->dim + KEYS + a->v_dim) * QUERIES);
        failed = !work;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < a->sequences * kv_heads; task++) {
            int64_t s = task / kv_heads, head = task % kv_heads, first = key_starts[s], count = key_lengths[s];
            for (int64_t i = first; i < first + count; i++)
                pack_along(k + i * a->k_token + head * a->k_head, a->dim, keys + (head * end + i) * words);
            pair_rows(v + first * a->v_token + head * a->v_head, a->v_token, count, a->v_dim,
                      values + (head * pairs + first / 2 + s) * wide, wide);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < starts[a->sequences] * heads; task++) {
            if (!work) continue;
            int64_t block = task / heads, head = task % heads, s = owner(starts, a->sequences, block);
            int64_t shared = head / (heads / kv_heads), begin = (block - starts[s]) * QUERIES;
            Part p = attention_part(a, q, k, v, edges, key_starts, key_lengths, prefix, s, head);
            attend_pairs(&p, keys + (shared * end + key_starts[s]) * words,
                         values + (shared * pairs + key_starts[s] / 2 + s) * wide, (int)begin, scale, work,
                         y + (edges[s] + begin) * y_row + head * a->v_dim, y_row);
        }
        free(work);
    }
    free(starts), free(keys);
    return failed;
}

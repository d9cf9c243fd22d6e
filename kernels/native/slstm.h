/* sLSTM; kernels/slstm.py has the formula.

   Heads do not read each other, so a task is one head of a group of sequences, and no thread waits for another. A
   group walks time together, longest sequence first, so that the active ones are its first rows. Each step is a small
   product of last outputs and recurrent weights, which stay in cache; the gates follow on the product's tile while it
   is in the first-level cache. Every row is summed over in the same order wherever it stands, so a sequence's numbers
   depend neither on its company nor on the threads, bit for bit; the gradient of the weights is summed in an order of
   its own, which the threads do not change either. */

#ifdef _OPENMP
#include <omp.h>
#endif

#define SLSTM_ROWS 48  /* sequences in a group: enough to read the weights from near cache, few enough to stay there */
#define SLSTM_SAVED 6  /* what the backward reads of every token and unit: decay, slope, z, o, c, n */
#define SLSTM_OVERLAP 8 /* so many vectors of units take each stage of a step together */
#define SLSTM_CHUNK 64 /* rows of one product for the gradient of the weights */
#define SLSTM_PARTIAL 16 /* such products are summed by themselves, since rounding grows with the length of a sum */

typedef struct {
    int64_t length, index;
} SlstmSequence;

typedef struct {
    const int64_t *edges;
    int64_t sequences, tokens, heads, dim, reverse;
    int padded, groups, rows; /* dim as whole vectors; groups of at most so many sequences */
    SlstmSequence *sorted;
} Slstm;

static int slstm_longest_first(const void *a, const void *b) {
    const SlstmSequence *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return (x->index > y->index) - (x->index < y->index);
}

/* Starting threads costs some microseconds. */
#define SLSTM_WORTH_THREADS(s) ((s).tokens * (s).heads * (s).dim * (s).dim > 100000)

/* Sort, and choose groups that keep all threads busy. */
static int slstm_plan(Slstm *s, const int64_t *edges, int64_t sequences, int64_t heads, int64_t dim, int64_t reverse) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    *s = (Slstm){edges, sequences, edges[sequences], heads, dim, reverse, round_up((int)dim), 0, 0, NULL};
    int64_t groups = (sequences + SLSTM_ROWS - 1) / SLSTM_ROWS;
    while (groups < sequences && groups * heads < 4 * threads && groups * heads % threads) groups++;
    s->rows = groups ? (int)((sequences + groups - 1) / groups) : 0;
    s->groups = groups ? (int)((sequences + s->rows - 1) / s->rows) : 0;
    s->sorted = malloc((size_t)(sequences + 1) * sizeof(SlstmSequence));
    if (!s->sorted) return 1;
    for (int64_t i = 0; i < sequences; i++) s->sorted[i] = (SlstmSequence){edges[i + 1] - edges[i], i};
    qsort(s->sorted, (size_t)sequences, sizeof(SlstmSequence), slstm_longest_first);
    return 0;
}

/* The token of a sequence's step. */
INLINE int64_t slstm_token(const Slstm *s, int64_t sequence, int64_t step) {
    return s->reverse ? s->edges[sequence + 1] - 1 - step : s->edges[sequence] + step;
}

INLINE float *slstm_saved_at(const Slstm *s, float *saved, int64_t head, int64_t token) {
    return saved + (head * s->tokens + token) * s->padded * SLSTM_SAVED;
}

/* The height of the next strip where `rows` are left, so that all strips are about as high. */
INLINE int slstm_height(int rows) {
    int strips = (rows + ROWS - 1) / ROWS;
    return (rows + strips - 1) / strips;
}

/* [4, head, out, in] to [block of units][in][gate][unit]: one tile of the product is the four gates of some units. */
static void slstm_pack(const Slstm *s, int64_t head, const float *recurrent, float *packed) {
    int dim = (int)s->dim;
    memset(packed, 0, (size_t)4 * dim * s->padded * sizeof(float));
    for (int gate = 0; gate < 4; gate++) {
        const float *from = recurrent + (gate * s->heads + head) * dim * dim;
        for (int unit = 0; unit < dim; unit += LANES) {
            int units = dim - unit < LANES ? dim - unit : LANES;
            transpose(from + unit * dim, dim, units, dim, packed + (unit * dim * 4 + gate * LANES), 4 * LANES);
        }
    }
}

/* What a step's product is followed by, for some vectors of units at once. Each stage is a loop of its own: the chain
   of dependent operations from gates to y is some 250 cycles long, and the processor can overlap only short ones.
   Vector v has its four gates in raw[v], which take other meanings on the way. */
typedef struct {
    vec input, forget, cell, output;
} SlstmGates;

static void slstm_first_stages(SlstmGates *raw, vec *decay, int vectors) {
    for (int v = 0; v < vectors; v++) decay[v] = vec_exp_decay(raw[v].forget);
    for (int v = 0; v < vectors; v++) {
        raw[v].output = 1.0f + vec_exp_finite(-raw[v].output);
        raw[v].cell = vec_tanh(raw[v].cell);
    }
}

/* `forget` becomes the log of what is kept; the slope of that waits in `decay`. */
INLINE void slstm_keep(SlstmGates *raw, vec *decay, vec m) {
    vec slope;
    raw->forget = vec_logsigmoid(raw->forget, *decay, &slope) + m;
    *decay = slope;
}

/* `weaker` is the smaller of both gates; the other one is 1. `saved` may be NULL. */
INLINE vec slstm_cell(SlstmGates raw, vec slope, vec weaker, float *c, float *n, float *m, float *saved) {
    vec lead = raw.input - raw.forget, before = load(n);
    vec_int wins = (lead >= 0) | (before == 0);
    vec write = choose(wins, all(1.0f), weaker), keep = choose(lead <= 0, all(1.0f), weaker);
    vec cell = keep * load(c) + write * raw.cell, norm = keep * before + write;
    vec shared = 1.0f / (norm * raw.output);
    store(m, choose(wins, raw.input, raw.forget));
    store(c, cell);
    store(n, norm);
    if (saved) {
        store(saved, choose(write < 1.0f, -write, keep)); /* both gates: one is 1, the sign tells which */
        store(saved + LANES, slope);
        store(saved + 2 * LANES, raw.cell);
        store(saved + 3 * LANES, norm * shared);
        store(saved + 4 * LANES, cell);
        store(saved + 5 * LANES, norm);
    }
    return cell * shared;
}

static size_t slstm_forward_floats(const Slstm *s) { return (size_t)5 * s->rows * s->padded; }

static void slstm_forward_group(const Slstm *s, int64_t head, const SlstmSequence *group, int count, const float *gates,
                                const float *packed, const float *const *initial, float *y, float *const *last,
                                float *saved, float *scratch) {
    const int dim = (int)s->dim, padded = s->padded;
    const int64_t width = s->heads * dim, way = s->reverse ? -1 : 1;
    size_t part = (size_t)count * padded;
    float *y_old = scratch, *y_new = y_old + part, *c = y_new + part, *n = c + part, *m = n + part;
    float *state[4] = {y_old, c, n, m};
    const float *gate[SLSTM_ROWS]; /* of each row at its present token */
    float *out[SLSTM_ROWS], *kept[SLSTM_ROWS];
    SlstmGates raw[SLSTM_ROWS];
    vec decay[SLSTM_ROWS], weaker[SLSTM_ROWS];
    memset(scratch, 0, 5 * part * sizeof(float));
    for (int r = 0; r < count; r++) {
        int64_t token = slstm_token(s, group[r].index, 0), at = group[r].index * width + head * dim;
        gate[r] = gates + token * 4 * width + head * dim;
        out[r] = y + token * width + head * dim;
        kept[r] = saved ? slstm_saved_at(s, saved, head, token) : NULL;
        for (int p = 0; initial[0] && p < 4; p++) memcpy(state[p] + r * padded, initial[p] + at, dim * sizeof(float));
    }
    for (int64_t t = 0;; t++) {
        for (; count && group[count - 1].length <= t; count--) {
            int64_t to = group[count - 1].index * width + head * dim;
            float *end[4] = {y_old, c, n, m};
            for (int p = 0; last[0] && p < 4; p++)
                memcpy(last[p] + to, end[p] + (count - 1) * padded, dim * sizeof(float));
        }
        if (!count) return;
        const int together = (count < SLSTM_OVERLAP ? SLSTM_OVERLAP / count : 1) * LANES; /* units at a time */
        for (int start = 0; start < dim; start += together) {
            const int end = start + together < dim ? start + together : dim;
            SlstmGates *at = raw;
            for (int unit = start; unit < end; unit += LANES)
                for (int first = 0, height; first < count; first += height, at += height) {
                    height = slstm_height(count - first);
                    strip(height, 4 * LANES, dim, (Operand){y_old + first * padded, padded, 1},
                          packed + unit * dim * 4, 4 * LANES, (float *)at, 4 * LANES, 0);
                }
            at = raw;
            for (int unit = start; unit < end; unit += LANES)
                for (int r = 0; r < count; r++, at++) {
                    const float *of = gate[r] + unit;
                    for (int g = 0; g < 4; g++) __builtin_prefetch(of + (4 * way + g) * width, 0, 2);
                    at->input += load_some(of, dim - unit);
                    at->forget += load_some(of + width, dim - unit);
                    at->cell += load_some(of + 2 * width, dim - unit);
                    at->output += load_some(of + 3 * width, dim - unit);
                }
            const int vectors = (int)(at - raw);
            slstm_first_stages(raw, decay, vectors);
            int v = 0;
            for (int unit = start; unit < end; unit += LANES)
                for (int r = 0; r < count; r++, v++) slstm_keep(raw + v, decay + v, load(m + r * padded + unit));
            for (v = 0; v < vectors; v++) weaker[v] = vec_exp_decay(raw[v].input - raw[v].forget);
            v = 0;
            for (int unit = start; unit < end; unit += LANES)
                for (int r = 0; r < count; r++, v++) {
                    ptrdiff_t place = r * padded + unit;
                    vec value = slstm_cell(raw[v], decay[v], weaker[v], c + place, n + place, m + place,
                                           saved ? kept[r] + unit * SLSTM_SAVED : NULL);
                    store(y_new + place, value);
                    store_some(out[r] + unit, value, dim - unit);
                }
        }
        for (int r = 0; r < count; r++) {
            gate[r] += way * 4 * width;
            out[r] += way * width;
            if (saved) kept[r] += way * padded * SLSTM_SAVED;
        }
        float *swap = y_old;
        y_old = y_new, y_new = swap;
    }
}

/* Run every (group, head), longest first; `saved` and the parts of both states may be NULL. */
int EXPORT(slstm_forward)(const float *gates, const float *recurrent, const int64_t *edges, const float *y0,
                          const float *c0, const float *n0, const float *m0, float *y, float *y_last, float *c_last,
                          float *n_last, float *m_last, float *saved, int64_t sequences, int64_t heads, int64_t dim,
                          int64_t reverse) {
    Slstm s;
    if (slstm_plan(&s, edges, sequences, heads, dim, reverse)) return 1;
    const float *initial[4] = {y0, c0, n0, m0};
    float *last[4] = {y_last, c_last, n_last, m_last};
    size_t packed_floats = (size_t)4 * dim * s.padded;
    float *packed = workspace(heads * packed_floats);
    int failed = !packed;
#pragma omp parallel if (SLSTM_WORTH_THREADS(s))
    {
        float *scratch = workspace(slstm_forward_floats(&s));
        if (!scratch)
#pragma omp atomic write
            failed = 1;
#pragma omp barrier
        if (!failed) {
#pragma omp for
            for (int64_t head = 0; head < heads; head++)
                slstm_pack(&s, head, recurrent, packed + head * packed_floats);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < s.groups * heads; task++) {
                int64_t head = task % heads, first = task / heads * s.rows;
                int count = (int)(sequences - first < s.rows ? sequences - first : s.rows);
                slstm_forward_group(&s, head, s.sorted + first, count, gates, packed + head * packed_floats, initial, y,
                                    last, saved, scratch);
            }
        }
        free(scratch);
    }
    free(packed);
    free(s.sorted);
    return failed;
}

/* What one step's outputs owe: gates' gradients [4][dim] from those of y (with what came through the recurrence), c, n
   and of the free part of m. That part is all that remains of m's gradient, dm - c dc - n dn, since y does not depend
   on m: it goes to the input gate where that gate won, and back in time where it did not. */
INLINE void slstm_cell_backward(const float *saved, vec c_before, vec n_before, vec dy, float *dc_at, float *dn_at,
                                float *dm_at, vec *d_gate) {
    vec both = load(saved), slope = load(saved + LANES), z = load(saved + 2 * LANES), o = load(saved + 3 * LANES);
    vec c = load(saved + 4 * LANES), n = load(saved + 5 * LANES), dm = load(dm_at);
    vec_int loses = (vec_int)both < 0;
    vec write = choose(loses, -both, all(1.0f)), keep = choose(loses, all(1.0f), both);
    vec_int tie = (both == 1.0f) & (n_before != 0);
    vec won = choose(loses, (vec){0}, choose(tie, all(0.5f), all(1.0f)));
    vec inverse = 1.0f / n, dh = dy * o * inverse; /* of c at fixed n */
    vec dc = load(dc_at) + dh, dn = load(dn_at) - dh * c * inverse;
    d_gate[0] = write * (dc * z + dn) + won * dm;
    d_gate[1] = (keep * (dc * c_before + dn * n_before) + (1.0f - won) * dm) * slope;
    d_gate[2] = dc * write * (1.0f - z * z);
    d_gate[3] = dh * c * (1.0f - o);
    store(dc_at, keep * dc);
    store(dn_at, keep * dn);
    store(dm_at, (1.0f - won) * dm);
}

static size_t slstm_backward_floats(const Slstm *s) { return (size_t)8 * s->rows * s->padded; }

static void slstm_backward_group(const Slstm *s, int64_t head, const SlstmSequence *group, int count,
                                 const float *packed, const float *const *initial, float *saved, const float *const *last,
                                 const float *dy, const float *const *d_last, float *d_gates, float *const *d_initial,
                                 float *scratch) {
    const int dim = (int)s->dim, padded = s->padded;
    const int64_t width = s->heads * dim, way = s->reverse ? -1 : 1;
    size_t part = (size_t)count * padded;
    float *carry[4], *d_gate = scratch + 4 * part; /* carry: gradients of y, c, n, and the free part of m's */
    memset(scratch, 0, 8 * part * sizeof(float));
    for (int p = 0; p < 4; p++) {
        carry[p] = scratch + p * part;
        for (int r = 0; d_last[p] && r < count; r++)
            memcpy(carry[p] + r * padded, d_last[p] + group[r].index * width + head * dim, dim * sizeof(float));
    }
    for (int r = 0; last[1] && r < count; r++)
        for (int i = 0; i < dim; i++) {
            size_t at = r * padded + i, from = group[r].index * width + head * dim + i;
            carry[3][at] -= last[1][from] * carry[1][at] + last[2][from] * carry[2][at];
        }
    int active = 0;
    for (int64_t t = count ? group[0].length - 1 : -1; t >= 0; t--) {
        while (active < count && group[active].length > t) active++;
        for (int r = 0; r < active; r++) {
            int64_t token = slstm_token(s, group[r].index, t), start = group[r].index * width + head * dim;
            float *kept = slstm_saved_at(s, saved, head, token), *to = d_gates + token * 4 * width + head * dim;
            const float *of = dy ? dy + token * width + head * dim : NULL;
            for (int unit = 0; unit < dim; unit += LANES) {
                int some = dim - unit;
                ptrdiff_t at = r * padded + unit;
                float *here = kept + unit * SLSTM_SAVED, *before = here - way * padded * SLSTM_SAVED;
                vec c_before = {0}, n_before = {0}, of_y = load(carry[0] + at), d[4];
                for (int i = 0; i < SLSTM_SAVED; i++)
                    __builtin_prefetch(before - way * padded * SLSTM_SAVED + i * LANES, 0, 2);
                if (t) {
                    c_before = load(before + 4 * LANES);
                    n_before = load(before + 5 * LANES);
                } else if (initial[0]) {
                    c_before = load_some(initial[1] + start + unit, some);
                    n_before = load_some(initial[2] + start + unit, some);
                }
                if (of) {
                    __builtin_prefetch(of + unit - way * width, 0, 2);
                    of_y += load_some(of + unit, some);
                }
                slstm_cell_backward(here, c_before, n_before, of_y, carry[1] + at, carry[2] + at, carry[3] + at, d);
                for (int gate = 0; gate < 4; gate++) {
                    __builtin_prefetch(to + (gate - 4 * way) * width + unit, 1, 2);
                    store_some(to + gate * width + unit, d[gate], some);
                    store(d_gate + gate * part + at, d[gate]);
                }
            }
        }
        for (int gate = 0; gate < 4; gate++)
            for (int first = 0, height; first < active; first += height) {
                height = slstm_height(active - first);
                strip(height, padded, dim, (Operand){d_gate + gate * part + first * padded, padded, 1},
                      packed + (size_t)gate * dim * padded, padded, carry[0] + first * padded, padded, gate > 0);
            }
    }
    for (int r = 0; d_initial[0] && r < count; r++) {
        size_t to = group[r].index * width + head * dim;
        for (int p = 0; p < 4; p++) memcpy(d_initial[p] + to, carry[p] + r * padded, dim * sizeof(float));
        for (int i = 0; i < dim; i++)
            d_initial[3][to + i] += initial[1][to + i] * d_initial[1][to + i] + initial[2][to + i] * d_initial[2][to + i];
    }
}

static size_t slstm_weight_floats(const Slstm *s) { return (size_t)2 * (s->dim + SLSTM_CHUNK) * s->padded; }

/* One gate and head of the weights' gradient: the sum over all steps of the gate's gradient times the last output. */
static void slstm_weight_gradient(const Slstm *s, int64_t gate, int64_t head, const float *d_gates, const float *y,
                                  const float *y0, float *d_recurrent, float *scratch) {
    const int dim = (int)s->dim, padded = s->padded;
    const int64_t width = s->heads * dim, way = s->reverse ? -1 : 1;
    const size_t size = (size_t)dim * padded;
    float *total = scratch, *partial = total + size, *left = partial + size, *right = left + SLSTM_CHUNK * padded;
    memset(scratch, 0, slstm_weight_floats(s) * sizeof(float));
    int filled = 0, products = 0;
    for (int64_t sequence = 0; sequence <= s->sequences; sequence++) {
        int end = sequence == s->sequences;
        int64_t length = end ? 1 : s->edges[sequence + 1] - s->edges[sequence];
        for (int64_t t = y0 || end ? 0 : 1; t < length; t++) {
            if (!end) {
                const float *before = t ? y + slstm_token(s, sequence, t - 1) * width : y0 + sequence * width;
                const float *of_gate = d_gates + (slstm_token(s, sequence, t) * 4 + gate) * width + head * dim;
                before += head * dim;
                for (int i = 0; i < dim; i += LANES) {
                    __builtin_prefetch(of_gate + i + way * 16 * 4 * width);
                    __builtin_prefetch(before + i + way * 16 * width);
                    store(left + filled * padded + i, load_some(of_gate + i, dim - i));
                    store(right + filled * padded + i, load_some(before + i, dim - i));
                }
                if (++filled < SLSTM_CHUNK) continue;
            }
            product(dim, padded, filled, (Operand){left, 1, padded}, right, padded, partial, padded, products > 0);
            filled = 0;
            if (++products < SLSTM_PARTIAL && !end) continue;
            for (size_t i = 0; i < size; i++) total[i] += partial[i];
            products = 0;
        }
    }
    for (int i = 0; i < dim; i++)
        memcpy(d_recurrent + ((gate * s->heads + head) * dim + i) * dim, total + i * padded, dim * sizeof(float));
}

/* Everything but `d_gates` may be absent: dy, the parts of d_last, the initial state, its gradient, d_recurrent. */
int EXPORT(slstm_backward)(const float *recurrent, const int64_t *edges, const float *y0, const float *c0,
                           const float *n0, const float *y, const float *c_last, const float *n_last, float *saved,
                           const float *dy, const float *dy_last, const float *dc_last, const float *dn_last,
                           const float *dm_last, float *d_gates, float *d_recurrent, float *dy0, float *dc0, float *dn0,
                           float *dm0, int64_t sequences, int64_t heads, int64_t dim, int64_t reverse) {
    Slstm s;
    if (slstm_plan(&s, edges, sequences, heads, dim, reverse)) return 1;
    const float *initial[3] = {y0, c0, n0}, *last[3] = {NULL, c_last, n_last};
    const float *d_last[4] = {dy_last, dc_last, dn_last, dm_last};
    float *d_initial[4] = {dy0, dc0, dn0, dm0};
    size_t packed_floats = (size_t)4 * dim * s.padded;
    float *packed = workspace(heads * packed_floats);
    int failed = !packed;
#pragma omp parallel if (SLSTM_WORTH_THREADS(s))
    {
        size_t group_floats = slstm_backward_floats(&s), weight_floats = slstm_weight_floats(&s);
        float *scratch = workspace(group_floats > weight_floats ? group_floats : weight_floats);
        if (!scratch)
#pragma omp atomic write
            failed = 1;
#pragma omp barrier
        if (!failed) {
#pragma omp for
            for (int64_t row = 0; row < 4 * heads * dim; row++) { /* [gate, head, out, in] to [head][gate][out][in] */
                int64_t gate = row / (heads * dim), head = row / dim % heads, out = row % dim;
                float *to = packed + head * packed_floats + (gate * dim + out) * s.padded;
                memset(to, 0, s.padded * sizeof(float));
                memcpy(to, recurrent + row * dim, dim * sizeof(float));
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < s.groups * heads; task++) {
                int64_t head = task % heads, first = task / heads * s.rows;
                int count = (int)(sequences - first < s.rows ? sequences - first : s.rows);
                slstm_backward_group(&s, head, s.sorted + first, count, packed + head * packed_floats, initial, saved,
                                     last, dy, d_last, d_gates, d_initial, scratch);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (d_recurrent ? 4 * heads : 0); task++)
                slstm_weight_gradient(&s, task % 4, task / 4, d_gates, y, y0, d_recurrent, scratch);
        }
        free(scratch);
    }
    free(packed);
    free(s.sorted);
    return failed;
}

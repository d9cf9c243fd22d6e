/* Causal depthwise convolution, alone or with a SiLU behind it; kernels/convolution.py has the formula.

   Positions count along a sequence in running direction; a position below zero lies in the sequence's state. A task is
   a segment of packed tokens and a block of channels, walked in tiles of some positions, so that rows stay in near
   cache and x is read, and y written, once. The backward walks against the running direction, in one pass: it
   recomputes what the activation saw, and carries the next gradients, which earlier inputs owe. Segments do not depend
   on the threads, nor do the sums over them. */

#ifdef _OPENMP
#include <omp.h>
#endif

#define CONV_SEGMENT 512   /* tokens */
#define CONV_CHANNELS 256
#define CONV_TILE 4        /* positions together */
#define CONV_WORTH_THREADS 65536

typedef struct {
    const float *x, *weight, *bias, *state; /* weight [taps][padded] and bias [padded], made here */
    float *zeros;
    const int64_t *edges;
    int64_t x_row, sequences, tokens, channels, padded, past, reverse, silu;
} Conv;

/* Weights tap by tap, as whole vectors; the bias is a row behind them. NULL without memory. */
static float *conv_weights(const float *weight, const float *bias, int64_t channels, int64_t taps, int64_t padded) {
    float *to = workspace((taps + 2) * padded);
    if (!to) return NULL;
    memset(to, 0, (taps + 2) * padded * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t tap = 0; tap < taps; tap++) to[tap * padded + c] = weight[c * taps + tap];
        if (bias) to[taps * padded + c] = bias[c];
    }
    return to;
}

INLINE int64_t conv_token(const Conv *s, int64_t sequence, int64_t position) {
    return s->reverse ? s->edges[sequence + 1] - 1 - position : s->edges[sequence] + position;
}

/* The input at a position, which may lie in the state. */
INLINE const float *conv_input(const Conv *s, int64_t sequence, int64_t position) {
    if (position >= 0) return s->x + conv_token(s, sequence, position) * s->x_row;
    return s->state ? s->state + ((sequence + 1) * s->past + position) * s->channels : s->zeros;
}

/* The last sequence that starts at or before a token. */
static int64_t conv_sequence(const Conv *s, int64_t token) {
    int64_t low = 0, high = s->sequences;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (s->edges[middle] <= token) low = middle;
        else high = middle;
    }
    return low;
}

/* Tap by tap over rows[i], the input `past` positions before output i. */
INLINE void conv_sums(const Conv *s, const int taps, const int count, const float *const *rows, int64_t c, int some,
                      vec *u) {
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) u[i] = load(s->bias + c);
#pragma GCC unroll 4
    for (int tap = 0; tap < taps; tap++) {
        vec w = load(s->weight + tap * s->padded + c);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) u[i] += w * load_some(rows[i + tap] + c, some);
    }
}

INLINE void conv_tile(const Conv *s, const int taps, const int count, const float *const *rows, float *const *out,
                      int64_t from, int64_t to) {
    for (int64_t c = from; c < to; c += LANES) {
        vec u[CONV_TILE] = {{0}};
        conv_sums(s, taps, count, rows, c, (int)(to - c), u);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            if (s->silu) u[i] *= vec_sigmoid(u[i]);
            store_some(out[i] + c, u[i], (int)(to - c));
        }
    }
}

/* `next` [past][block] holds the gradients of the following positions' sums, and takes this tile's in turn; `total`
   [taps + 1][block] those of weights and bias. `keep` is 0 where a tile only fills `next`. */
INLINE void conv_tile_backward(const Conv *s, const int taps, const int count, const float *const *rows,
                               const float *const *dy, float *const *dx, float *next, float *total, vec *u, vec *du,
                               int64_t from, int64_t to, const int keep) {
    const int past = taps - 1;
    for (int64_t c = from; c < to; c += LANES) {
        const int some = (int)(to - c);
        const int64_t at = c - from;
        if (s->silu) conv_sums(s, taps, count, rows, c, some, u);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            du[i] = load_some(dy[i] + c, some);
            if (s->silu) {
                vec gate = vec_sigmoid(u[i]);
                du[i] *= gate * (1.0f + u[i] * (1.0f - gate));
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < past; j++) du[count + j] = load(next + j * CONV_CHANNELS + at);
#pragma GCC unroll 4
        for (int j = 0; j < past; j++) store(next + j * CONV_CHANNELS + at, du[j]);
        if (!keep) continue;
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            vec owed = {0};
#pragma GCC unroll 4
            for (int k = 0; k < taps; k++) owed += load(s->weight + (past - k) * s->padded + c) * du[i + k];
            store_some(dx[i] + c, owed, some);
        }
#pragma GCC unroll 4
        for (int tap = 0; tap <= taps; tap++) {
            vec sum_ = load(total + tap * CONV_CHANNELS + at);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) sum_ += tap < taps ? du[i] * load_some(rows[i + tap] + c, some) : du[i];
            store(total + tap * CONV_CHANNELS + at, sum_);
        }
    }
}

/* Each usual number of taps and height of a tile gets its own code, where everything stays in registers. */
#define CONV_EACH(call, taps, count)                                                                                   \
    switch ((taps) * 8 + (count)) {                                                                                    \
        case 4 * 8 + 4: call(4, 4); break;                                                                             \
        case 4 * 8 + 1: call(4, 1); break;                                                                             \
        default: call((int)(taps), count); break;                                                                      \
    }

static void conv_forward_task(const Conv *s, int64_t segment, int64_t block, float *y, const float **rows) {
    const int64_t from = block * CONV_CHANNELS, taps = s->past + 1;
    const int64_t to = from + CONV_CHANNELS < s->channels ? from + CONV_CHANNELS : s->channels;
    int64_t token = segment * CONV_SEGMENT;
    const int64_t stop = token + CONV_SEGMENT < s->tokens ? token + CONV_SEGMENT : s->tokens;
    for (int64_t q = conv_sequence(s, token); token < stop; q++) {
        int64_t end = s->edges[q + 1] < stop ? s->edges[q + 1] : stop;
        if (end <= token) continue;
        int64_t first = s->reverse ? s->edges[q + 1] - end : token - s->edges[q], last = first + end - token;
        for (int64_t p = first; p < last;) {
            const int count = last - p >= CONV_TILE ? CONV_TILE : 1;
            float *out[CONV_TILE];
            for (int64_t i = 0; i < count + s->past; i++) rows[i] = conv_input(s, q, p - s->past + i);
            for (int i = 0; i < count; i++) out[i] = y + conv_token(s, q, p + i) * s->channels;
#define CALL(taps, count) conv_tile(s, taps, count, rows, out, from, to)
            CONV_EACH(CALL, taps, count)
#undef CALL
            p += count;
        }
        token = end;
    }
}

typedef struct {
    const float *dy, *d_last;
    float *dx, *d_state, *partial; /* partial [segments][taps + 1][channels] */
} ConvGradients;

static size_t conv_backward_floats(const Conv *s) {
    return (size_t)(2 * s->past + 2) * CONV_CHANNELS + (size_t)(s->past + 2 * CONV_TILE) * LANES;
}

static void conv_backward_task(const Conv *s, const ConvGradients *g, int64_t segment, int64_t block,
                               const float **rows, float *scratch) {
    const int64_t from = block * CONV_CHANNELS, past = s->past, taps = past + 1;
    const int64_t to = from + CONV_CHANNELS < s->channels ? from + CONV_CHANNELS : s->channels;
    float *next = scratch, *total = next + past * CONV_CHANNELS;
    vec *u = (vec *)(total + (taps + 1) * CONV_CHANNELS), *du = u + CONV_TILE;
    memset(total, 0, (taps + 1) * CONV_CHANNELS * sizeof(float));
    int64_t token = segment * CONV_SEGMENT;
    const int64_t stop = token + CONV_SEGMENT < s->tokens ? token + CONV_SEGMENT : s->tokens;
    for (int64_t q = conv_sequence(s, token); token < stop; q++) {
        const int64_t length = s->edges[q + 1] - s->edges[q];
        int64_t end = s->edges[q + 1] < stop ? s->edges[q + 1] : stop;
        if (end <= token) continue;
        const int64_t first = s->reverse ? s->edges[q + 1] - end : token - s->edges[q], last = first + end - token;
        memset(next, 0, past * CONV_CHANNELS * sizeof(float));
        for (int64_t stop_at = last + past < length ? last + past : length, p = stop_at; p > first;) {
            const int keep = p <= last, count = keep && p - first >= CONV_TILE ? CONV_TILE : 1;
            const float *dy[CONV_TILE];
            float *dx[CONV_TILE];
            p -= count;
            for (int64_t i = 0; i < count + past; i++) rows[i] = conv_input(s, q, p - past + i);
            for (int i = 0; i < count; i++) {
                int64_t at = conv_token(s, q, p + i) * s->channels;
                dy[i] = g->dy ? g->dy + at : s->zeros;
                dx[i] = g->dx + at;
            }
#define CALL(taps, count) conv_tile_backward(s, taps, count, rows, dy, dx, next, total, u, du, from, to, keep)
            CONV_EACH(CALL, taps, count)
#undef CALL
            for (int i = 0; keep && g->d_last && i < count; i++) {
                const int64_t slot = p + i - (length - past);
                if (slot < 0) continue;
                const float *more = g->d_last + (q * past + slot) * s->channels;
                for (int64_t c = from; c < to; c++) dx[i][c] += more[c];
            }
        }
        for (int64_t slot = 0; !first && g->d_state && slot < past; slot++) {
            float *owed = g->d_state + (q * past + slot) * s->channels;
            for (int64_t k = past - slot; k <= past; k++) /* the position past - slot before the first one */
                for (int64_t c = from; c < to; c++)
                    owed[c] += s->weight[(past - k) * s->padded + c] * next[(k - past + slot) * CONV_CHANNELS + c - from];
        }
        token = end;
    }
    for (int64_t tap = 0; tap <= taps; tap++)
        memcpy(g->partial + (segment * (taps + 1) + tap) * s->channels + from, total + tap * CONV_CHANNELS,
               (to - from) * sizeof(float));
}

/* The last inputs of each sequence, or the gradient that a state which outlived its sequence hands back. */
static void conv_last_state(const Conv *s, float *last) {
    for (int64_t q = 0; q < s->sequences; q++)
        for (int64_t slot = 0; slot < s->past; slot++)
            memcpy(last + (q * s->past + slot) * s->channels,
                   conv_input(s, q, s->edges[q + 1] - s->edges[q] - s->past + slot), s->channels * sizeof(float));
}

/* bias, state and last may be NULL; rows of x lie x_row apart. */
int EXPORT(conv_forward)(const float *x, const float *weight, const float *bias, const float *state,
                         const int64_t *edges, float *y, float *last, int64_t x_row, int64_t sequences,
                         int64_t channels, int64_t taps, int64_t reverse, int64_t silu) {
    const int64_t padded = round_up((int)channels), tokens = edges[sequences];
    float *weights = conv_weights(weight, bias, channels, taps, padded);
    if (!weights) return 1;
    const Conv s = {x,     weights,   weights + taps * padded, state,  weights + (taps + 1) * padded, edges,
                    x_row, sequences, tokens,                  channels, padded, taps - 1, reverse, silu};
    const int64_t segments = (tokens + CONV_SEGMENT - 1) / CONV_SEGMENT;
    const int64_t blocks = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
    int failed = 0;
#pragma omp parallel if (tokens * channels > CONV_WORTH_THREADS)
    {
        const float **rows = malloc((taps + CONV_TILE) * sizeof(float *));
        if (!rows)
#pragma omp atomic write
            failed = 1;
#pragma omp barrier
        if (!failed) {
#pragma omp for
            for (int64_t task = 0; task < segments * blocks; task++)
                conv_forward_task(&s, task / blocks, task % blocks, y, rows);
        }
        free(rows);
    }
    if (last) conv_last_state(&s, last);
    free(weights);
    return failed;
}

/* bias, state, dy, d_last and d_state may be NULL; d_weight is [taps + 1][channels], the bias last. */
int EXPORT(conv_backward)(const float *x, const float *weight, const float *bias, const float *state,
                          const int64_t *edges, const float *dy, const float *d_last, float *dx, float *d_state,
                          float *d_weight, int64_t x_row, int64_t sequences, int64_t channels, int64_t taps,
                          int64_t reverse, int64_t silu) {
    const int64_t padded = round_up((int)channels), tokens = edges[sequences], past = taps - 1;
    const int64_t segments = (tokens + CONV_SEGMENT - 1) / CONV_SEGMENT;
    const int64_t blocks = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
    float *weights = conv_weights(weight, bias, channels, taps, padded);
    float *partial = workspace((segments + 1) * (taps + 1) * channels);
    int failed = !weights || !partial;
    if (!failed) {
        const Conv s = {x,     weights,   weights + taps * padded, state,  weights + (taps + 1) * padded, edges,
                        x_row, sequences, tokens,                  channels, padded, past, reverse, silu};
        const ConvGradients g = {dy, d_last, dx, d_state, partial};
        for (int64_t q = 0; d_state && q < sequences; q++) { /* what of the state is still in the last state */
            const int64_t length = edges[q + 1] - edges[q];
            for (int64_t slot = 0; slot < past; slot++) {
                float *to = d_state + (q * past + slot) * channels;
                if (d_last && slot >= length)
                    memcpy(to, d_last + (q * past + slot - length) * channels, channels * sizeof(float));
                else memset(to, 0, channels * sizeof(float));
            }
        }
#pragma omp parallel if (tokens * channels > CONV_WORTH_THREADS)
        {
            const float **rows = malloc((taps + CONV_TILE) * sizeof(float *));
            float *scratch = workspace(conv_backward_floats(&s));
            if (!rows || !scratch)
#pragma omp atomic write
                failed = 1;
#pragma omp barrier
            if (!failed) {
#pragma omp for
                for (int64_t task = 0; task < segments * blocks; task++)
                    conv_backward_task(&s, &g, task / blocks, task % blocks, rows, scratch);
            }
            free(scratch);
            free(rows);
        }
        memset(d_weight, 0, (taps + 1) * channels * sizeof(float));
        for (int64_t segment = 0; segment < segments; segment++)
            for (int64_t i = 0; i < (taps + 1) * channels; i++)
                d_weight[i] += partial[segment * (taps + 1) * channels + i];
    }
    free(partial);
    free(weights);
    return failed;
}

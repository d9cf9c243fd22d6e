/* mLSTM, chunkwise, forward and exact backward; the formulas stand at the head of kernels/mlstm_chunkwise.py.

   One task is one head of one sequence: its chunks run one after the other with the state in cache, so a token's row of
   q, k, v and h moves between memory and cache once. Tasks are independent, hence no result depends on the number of
   threads. Rows are copied into working space chunk by chunk, filled up with zeros to whole vectors, in running order;
   that is all there is to direction, odd sizes and strides. Only the lower triangle of the products inside a chunk is
   computed. The backward computes P again, and takes the state at the start of each chunk from the forward. */

/* Widths of a head as they are and as whole vectors, and the chunks of one sequence. */
typedef struct {
    int qk, v, qk_padded, v_padded;
} Sizes;

/* The gates of a chunk. b, u and reach are relative to its start; u_j - reach_i is a small difference of large numbers,
   so each is kept as two floats. */
typedef struct {
    float *u, *u_rest;         /* log i_j - b_j */
    float *reach, *reach_rest; /* m_i - b_i */
    float *floor;              /* exp(-m_i) */
    float *start;              /* exp(b_i + m0 - m_i) */
    float *write;              /* exp(b_L + u_j - m_L) */
    float keep, m_end;         /* exp(b_L + m0 - m_L), m_L */
    int peak;                  /* which token made m_L, -1 where m0 did */
} Gates;

INLINE void split(double x, float *high, float *low) {
    *high = (float)x;
    *low = isfinite(*high) ? (float)(x - *high) : 0.0f;
}

/* log_input and log_forget are read `stride` floats apart, which is negative when the sequence runs backwards. */
static void mlstm_gates(Gates *g, const float *log_input, const float *log_forget, ptrdiff_t stride, int length,
                        double m0) {
    double b = 0, peak = -INFINITY, u[length];
    g->peak = -1;
    for (int i = 0; i < length; i++) {
        b += log_forget[i * stride];
        u[i] = log_input[i * stride] - b;
        if (!(u[i] <= peak) && peak == peak) { /* a NaN stays to the end, as in a running maximum of tensors */
            peak = u[i];
            if (peak > m0) g->peak = i;
        }
        double reach = peak > m0 || peak != peak ? peak : m0;
        split(u[i], g->u + i, g->u_rest + i);
        split(reach, g->reach + i, g->reach_rest + i);
        g->floor[i] = (float)-(b + reach);
        g->start[i] = (float)(m0 - reach);
    }
    g->m_end = (float)(b + (peak > m0 || peak != peak ? peak : m0)); /* rounded: the state belongs to this very m */
    g->keep = (float)exp(b + m0 - g->m_end);
    for (int i = 0; i < length; i++) g->write[i] = (float)(b + u[i] - g->m_end);
    for (int i = length; i < round_up(length); i++) g->u[i] = g->u_rest[i] = g->floor[i] = g->start[i] = g->write[i] = 0;
    for (int i = 0; i < length; i += LANES) {
        store(g->floor + i, vec_exp(load(g->floor + i)));
        store(g->start + i, vec_exp(load(g->start + i)));
        store(g->write + i, vec_exp(load(g->write + i)));
    }
}

/* Columns of row i that its strip computes. */
INLINE int strip_end(int i, int length) {
    int end = i - i % ROWS + ROWS;
    return end < length ? end : length;
}

/* exp(u_j - reach_i) for columns j to j + LANES, 0 above the diagonal. */
INLINE vec decay(const Gates *g, int i, int j) {
    vec exponent = (load(g->u + j) - g->reach[i]) + (load(g->u_rest + j) - g->reach_rest[i]);
    vec_int column;
    for (int p = 0; p < LANES; p++) column[p] = j + p;
    return choose(column > i, (vec){0}, vec_exp_below(exponent));
}

/* S = Q K^T, at and below the diagonal. */
static void lower_scores(const float *q, const float *k_turned, int length, Sizes w, float *s, int row) {
    for (int i = 0; i < length; i += ROWS) {
        int end = strip_end(i, length);
        strip(end - i, round_up(end), w.qk_padded, (Operand){q + i * w.qk_padded, w.qk_padded, 1}, k_turned, row,
              s + i * row, row, 0);
    }
}

/* C (+)= lower B, where lower is zero above the diagonal. */
static void lower_product(const float *lower, int row, int length, const float *b, int n, float *c, int add) {
    for (int i = 0; i < length; i += ROWS) {
        int end = strip_end(i, length);
        strip(end - i, n, end, (Operand){lower + i * row, row, 1}, b, n, c + i * n, n, add);
    }
}

/* C (+)= lower^T B. */
static void lower_turned_product(const float *lower, int row, int length, const float *b, int n, float *c, int add) {
    for (int j = 0; j < length; j += ROWS) {
        int end = strip_end(j, length);
        strip(end - j, n, length - j, (Operand){lower + j * row + j, 1, row}, b + j * n, n, c + j * n, n, add);
    }
}

/* What all tasks share. Tensors are float32; a row of q, k, v or dh is one token and begins `*_row` floats after the one
   before, heads side by side in it. States: [sequences, heads, qk, v], [.., qk], [..]; a NULL state is zero. */
typedef struct {
    const float *q, *k, *v, *log_input, *log_forget;
    int64_t q_row, k_row, v_row;
    const float *C_first, *n_first, *m_first;
    float *C_starts, *n_starts, *m_starts; /* state before every chunk but the first, [chunks, heads, padded] */
    const int64_t *order, *edges, *chunks, *slots; /* sequences longest first; boundaries; chunks; first stored chunk */
    int64_t heads;
    Sizes w;
    int reverse;
} Batch;

/* Where a chunk's rows lie. */
typedef struct {
    int64_t first, step; /* token of its first row in running order; 1 or -1 */
    int length;
} Rows;

INLINE Rows rows_of(const Batch *b, int64_t sequence, int64_t chunk) {
    int64_t start = b->edges[sequence], end = b->edges[sequence + 1], chunks = b->chunks[sequence];
    int64_t size = (end - start + chunks - 1) / chunks, at = chunk * size;
    Rows rows = {b->reverse ? end - 1 - at : start + at, b->reverse ? -1 : 1, 0};
    int64_t left = end - start - at;
    rows.length = (int)(left < size ? (left > 0 ? left : 0) : size);
    return rows;
}

/* Where this thread most likely goes on: from a chunk to the next in its direction, or at the end of the sequence to the
   same rows of the next head. Row i of what will be read there is asked for while row i is at work here. */
typedef struct {
    int64_t token, head;
} Ahead;

INLINE Ahead ahead_of(const Batch *b, int64_t head, Rows r, int i, int chunks_left, int direction) {
    if (chunks_left) return (Ahead){r.first + r.step * (i + (int64_t)direction * r.length), head};
    return (Ahead){r.first + r.step * i, head + 1 < b->heads ? head + 1 : head};
}

INLINE void prefetch_inputs(const Batch *b, Ahead to) {
    prefetch_row(b->q + to.token * b->q_row + to.head * b->w.qk, b->w.qk);
    prefetch_row(b->k + to.token * b->k_row + to.head * b->w.qk, b->w.qk);
    prefetch_row(b->v + to.token * b->v_row + to.head * b->w.v, b->w.v);
}

INLINE void gather(float *to, const float *from, int64_t row, int64_t offset, Rows r, int width, int padded) {
    for (int i = 0; i < r.length; i++)
        copy_row(to + (int64_t)i * padded, from + (r.first + r.step * i) * row + offset, width, padded);
}

static void unpack_state(const float *C, const float *n, Sizes w, float *C_padded, float *n_padded) {
    for (int d = 0; d < w.qk; d++) copy_row(C_padded + d * w.v_padded, C + (int64_t)d * w.v, w.v, w.v_padded);
    memset(C_padded + w.qk * w.v_padded, 0, sizeof(float) * (w.qk_padded - w.qk) * w.v_padded);
    copy_row(n_padded, n, w.qk, w.qk_padded);
}

/* Working space: one piece after the other. */
INLINE float *take(float **space, int floats) {
    float *piece = *space;
    *space += (floats + 15) / 16 * 16;
    return piece;
}
INLINE void take_gates(Gates *g, float **space, int columns) {
    float **parts[] = {&g->u, &g->u_rest, &g->reach, &g->reach_rest, &g->floor, &g->start, &g->write};
    for (int i = 0; i < 7; i++) *parts[i] = take(space, columns);
}

static void mlstm_forward_task(const Batch *b, int64_t sequence, int64_t head, int longest, float *space, float *h,
                               float *C_last, float *n_last, float *m_last, int64_t *peak_last) {
    const Sizes w = b->w;
    const int row = round_up(longest);
    const float root = 1.0f / sqrtf((float)w.qk);
    Gates g;
    take_gates(&g, &space, row);
    float *q = take(&space, longest * w.qk_padded), *k = take(&space, longest * w.qk_padded);
    float *k_turned = take(&space, w.qk_padded * row), *v = take(&space, longest * w.v_padded);
    float *p = take(&space, longest * row), *numerator = take(&space, longest * w.v_padded);
    float *C = take(&space, w.qk_padded * w.v_padded), *n = take(&space, w.qk_padded);
    float m = 0;
    int64_t one = sequence * b->heads + head, peak = -1, done = 0;
    int carries = b->C_first != NULL;
    if (carries) {
        unpack_state(b->C_first + one * w.qk * w.v, b->n_first + one * w.qk, w, C, n);
        m = b->m_first[one];
    } else {
        memset(C, 0, sizeof(float) * w.qk_padded * w.v_padded);
        memset(n, 0, sizeof(float) * w.qk_padded);
    }
    for (int64_t chunk = 0; chunk < b->chunks[sequence]; chunk++) {
        Rows r = rows_of(b, sequence, chunk);
        if (!r.length) break;
        if (chunk && b->C_starts) {
            int64_t slot = (b->slots[sequence] + chunk - 1) * b->heads + head;
            memcpy(b->C_starts + slot * w.qk_padded * w.v_padded, C, sizeof(float) * w.qk_padded * w.v_padded);
            memcpy(b->n_starts + slot * w.qk_padded, n, sizeof(float) * w.qk_padded);
            b->m_starts[slot] = m;
        }
        int64_t gate = r.first * b->heads + head;
        mlstm_gates(&g, b->log_input + gate, b->log_forget + gate, r.step * b->heads, r.length, m);
        gather(q, b->q, b->q_row, head * w.qk, r, w.qk, w.qk_padded);
        gather(k, b->k, b->k_row, head * w.qk, r, w.qk, w.qk_padded);
        gather(v, b->v, b->v_row, head * w.v, r, w.v, w.v_padded);
        scale(q, root, r.length * w.qk_padded);
        transpose(k, w.qk_padded, r.length, w.qk_padded, k_turned, row);
        lower_scores(q, k_turned, r.length, w, p, row);
        if (carries) product(r.length, w.v_padded, w.qk, (Operand){q, w.qk_padded, 1}, C, w.v_padded, numerator, w.v_padded, 0);
        float inverse[r.length];
        for (int i = 0; i < r.length; i++) {
            prefetch_inputs(b, ahead_of(b, head, r, i, chunk + 1 < b->chunks[sequence], 1));
            prefetch_write(h + ((r.first + r.step * i) * b->heads + head) * w.v, w.v);
            vec total = {0};
            for (int j = 0; j < strip_end(i, r.length); j += LANES) {
                vec x = load(p + i * row + j) * decay(&g, i, j);
                store(p + i * row + j, x);
                total += x;
            }
            float denominator = sum(total);
            if (carries) {
                scale(numerator + i * w.v_padded, g.start[i], w.v_padded);
                denominator += g.start[i] * dot(q + i * w.qk_padded, n, w.qk_padded);
            }
            float size = fabsf(denominator);
            inverse[i] = 1.0f / (size > g.floor[i] || size != size ? size : g.floor[i]);
        }
        lower_product(p, row, r.length, v, w.v_padded, numerator, carries);
        for (int i = 0; i < r.length; i++) {
            scale(numerator + i * w.v_padded, inverse[i], w.v_padded);
            write_row(h + ((r.first + r.step * i) * b->heads + head) * w.v, numerator + i * w.v_padded, w.v);
        }
        if (g.peak >= 0) peak = done + g.peak;
        done += r.length;
        m = g.m_end;
        if (chunk + 1 < b->chunks[sequence] || C_last) {
            scale(C, g.keep, w.qk * w.v_padded);
            scale(n, g.keep, w.qk_padded);
            for (int j = 0; j < r.length; j++) {
                scale(k + j * w.qk_padded, g.write[j], w.qk_padded);
                add_scaled(n, k + j * w.qk_padded, 1.0f, w.qk_padded);
            }
            product(w.qk, w.v_padded, r.length, (Operand){k, 1, w.qk_padded}, v, w.v_padded, C, w.v_padded, 1);
            carries = 1;
        }
    }
    if (!C_last) return;
    for (int d = 0; d < w.qk; d++)
        memcpy(C_last + (one * w.qk + d) * w.v, C + d * w.v_padded, sizeof(float) * w.v);
    memcpy(n_last + one * w.qk, n, sizeof(float) * w.qk);
    m_last[one] = m;
    peak_last[one] = peak;
}

static void mlstm_backward_task(const Batch *b, int64_t sequence, int64_t head, int longest, float *space,
                                const float *h, const float *dh, int64_t dh_row, const float *dC_last,
                                const float *dn_last, const float *dm_last, const int64_t *peak_last, float *dq,
                                float *dk, float *dv, float *dlog_input, float *dlog_forget, float *dC_first,
                                float *dn_first) {
    const Sizes w = b->w;
    const int row = round_up(longest), state = w.qk_padded * w.v_padded;
    const float root = 1.0f / sqrtf((float)w.qk);
    Gates g;
    take_gates(&g, &space, row);
    float *q = take(&space, longest * w.qk_padded), *k = take(&space, longest * w.qk_padded);
    float *k_turned = take(&space, w.qk_padded * row), *v = take(&space, longest * w.v_padded);
    float *v_turned = take(&space, w.v_padded * row), *dnum = take(&space, longest * w.v_padded);
    float *d = take(&space, longest * row), *p = take(&space, longest * row), *ds = take(&space, longest * row);
    float *dq_rows = take(&space, longest * w.qk_padded), *dk_rows = take(&space, longest * w.qk_padded);
    float *dv_rows = take(&space, longest * w.v_padded), *written = take(&space, longest * w.qk_padded);
    float *C = take(&space, state), *n = take(&space, w.qk_padded), *turned = take(&space, state);
    float *dC = take(&space, state), *dn = take(&space, w.qk_padded), *du = take(&space, row);
    int64_t one = sequence * b->heads + head;
    int flows = dC_last != NULL;
    if (flows)
        unpack_state(dC_last + one * w.qk * w.v, dn_last + one * w.qk, w, dC, dn);
    else {
        memset(dC, 0, sizeof(float) * state);
        memset(dn, 0, sizeof(float) * w.qk_padded);
    }
    int64_t done = b->edges[sequence + 1] - b->edges[sequence];
    for (int64_t chunk = b->chunks[sequence] - 1; chunk >= 0; chunk--) {
        Rows r = rows_of(b, sequence, chunk);
        if (!r.length) continue;
        const int length = r.length;
        done -= length;
        float m = 0;
        int carries = 1;
        if (chunk) {
            int64_t slot = (b->slots[sequence] + chunk - 1) * b->heads + head;
            memcpy(C, b->C_starts + slot * state, sizeof(float) * state);
            memcpy(n, b->n_starts + slot * w.qk_padded, sizeof(float) * w.qk_padded);
            m = b->m_starts[slot];
        } else if (b->C_first) {
            unpack_state(b->C_first + one * w.qk * w.v, b->n_first + one * w.qk, w, C, n);
            m = b->m_first[one];
        } else
            carries = 0;
        int64_t gate = r.first * b->heads + head;
        mlstm_gates(&g, b->log_input + gate, b->log_forget + gate, r.step * b->heads, length, m);
        gather(q, b->q, b->q_row, head * w.qk, r, w.qk, w.qk_padded);
        gather(k, b->k, b->k_row, head * w.qk, r, w.qk, w.qk_padded);
        gather(v, b->v, b->v_row, head * w.v, r, w.v, w.v_padded);
        scale(q, root, length * w.qk_padded);
        transpose(k, w.qk_padded, length, w.qk_padded, k_turned, row);
        transpose(v, w.v_padded, length, w.v_padded, v_turned, row);
        lower_scores(q, k_turned, length, w, p, row);

        /* P, the denominator, and the gradients of numerator and denominator. */
        float dden[length];
        double drow[length];
        for (int i = 0; i < length; i++) {
            prefetch_inputs(b, ahead_of(b, head, r, i, chunk > 0, -1));
            vec total = {0};
            for (int j = 0; j < strip_end(i, length); j += LANES) {
                vec decayed = decay(&g, i, j), x = load(p + i * row + j) * decayed;
                store(d + i * row + j, decayed);
                store(p + i * row + j, x);
                total += x;
            }
            float denominator = sum(total);
            if (carries) denominator += g.start[i] * dot(q + i * w.qk_padded, n, w.qk_padded);
            float size = fabsf(denominator), floor = g.floor[i];
            float inverse = 1.0f / (size > floor || size != size ? size : floor);
            float *dnum_row = dnum + i * w.v_padded;
            int64_t token = r.first + r.step * i;
            copy_row(dnum_row, dh + token * dh_row + head * w.v, w.v, w.v_padded);
            const float *h_row = h + (token * b->heads + head) * w.v;
            float along = 0;
            int c = 0;
            vec sums = {0};
            for (; c + LANES <= w.v; c += LANES) sums += load(h_row + c) * load(dnum_row + c);
            for (; c < w.v; c++) along += h_row[c] * dnum_row[c];
            along += sum(sums);
            dden[i] = size > floor ? -along * inverse * (denominator > 0 ? 1.0f : -1.0f) : 0.0f;
            scale(dnum_row, inverse, w.v_padded);
        }

        /* Inside the chunk. */
        for (int i = 0; i < length; i += ROWS) {
            int end = strip_end(i, length);
            strip(end - i, round_up(end), w.v_padded, (Operand){dnum + i * w.v_padded, w.v_padded, 1}, v_turned, row,
                  ds + i * row, row, 0);
        }
        if (chunk > 1) {
            int64_t next = (b->slots[sequence] + chunk - 2) * b->heads + head;
            prefetch_row(b->C_starts + next * state, state);
        }
        memset(du, 0, sizeof(float) * row);
        for (int i = 0; i < length; i++) {
            Ahead to = ahead_of(b, head, r, i, chunk > 0, -1);
            prefetch_row(h + (to.token * b->heads + to.head) * w.v, w.v);
            prefetch_row(dh + to.token * dh_row + to.head * w.v, w.v);
            int64_t at = (r.first + r.step * i) * b->heads + head;
            prefetch_write(dq + at * w.qk, w.qk);
            prefetch_write(dk + at * w.qk, w.qk);
            prefetch_write(dv + at * w.v, w.v);
            vec total = {0};
            for (int j = 0; j < strip_end(i, length); j += LANES) {
                vec_int column;
                for (int c = 0; c < LANES; c++) column[c] = j + c;
                vec dp = choose(column > i, (vec){0}, load(ds + i * row + j) + dden[i]);
                vec x = dp * load(p + i * row + j);
                total += x;
                store(du + j, load(du + j) + x);
                store(ds + i * row + j, dp * load(d + i * row + j));
            }
            drow[i] = sum(total);
        }
        lower_turned_product(p, row, length, dnum, w.v_padded, dv_rows, 0);
        lower_turned_product(ds, row, length, q, w.qk_padded, dk_rows, 0);

        /* What came in from before. */
        if (carries) {
            transpose(C, w.v_padded, w.qk_padded, w.v_padded, turned, w.qk_padded);
            product(length, w.qk_padded, w.v, (Operand){dnum, w.v_padded, 1}, turned, w.qk_padded, dq_rows, w.qk_padded, 0);
            for (int i = 0; i < length; i++) {
                float *meet = dq_rows + i * w.qk_padded;
                add_scaled(meet, n, dden[i], w.qk_padded);
                scale(meet, g.start[i], w.qk_padded);
                drow[i] += dot(meet, q + i * w.qk_padded, w.qk_padded);
            }
        }
        lower_product(ds, row, length, k, w.qk_padded, dq_rows, carries);

        /* What goes on to after. */
        if (flows) {
            transpose(dC, w.v_padded, w.qk_padded, w.v_padded, turned, w.qk_padded);
            product(length, w.qk_padded, w.v, (Operand){v, w.v_padded, 1}, turned, w.qk_padded, written, w.qk_padded, 0);
            double dwritten = 0;
            for (int j = 0; j < length; j++) {
                float *written_row = written + j * w.qk_padded, *k_row = k + j * w.qk_padded;
                add_scaled(written_row, dn, 1.0f, w.qk_padded);
                scale(written_row, g.write[j], w.qk_padded);
                add_scaled(dk_rows + j * w.qk_padded, written_row, 1.0f, w.qk_padded);
                float dwrite = dot(written_row, k_row, w.qk_padded);
                du[j] += dwrite;
                dwritten += dwrite;
                scale(k_row, g.write[j], w.qk_padded);
            }
            product(length, w.v_padded, w.qk, (Operand){k, w.qk_padded, 1}, dC, w.v_padded, dv_rows, w.v_padded, 1);
            double dkeep = 0;
            if (carries) {
                for (int c = 0; c < w.qk; c++) dkeep += dot(dC + c * w.v_padded, C + c * w.v_padded, w.v_padded);
                dkeep += dot(dn, n, w.qk_padded);
            }
            drow[length - 1] += dwritten + dkeep * g.keep;
        }

        double later = 0, dm = dm_last ? dm_last[one] : 0;
        for (int i = length - 1; i >= 0; i--) {
            int64_t token = r.first + r.step * i, at = token * b->heads + head;
            scale(dq_rows + i * w.qk_padded, root, w.qk_padded);
            write_row(dq + at * w.qk, dq_rows + i * w.qk_padded, w.qk);
            write_row(dk + at * w.qk, dk_rows + i * w.qk_padded, w.qk);
            write_row(dv + at * w.v, dv_rows + i * w.v_padded, w.v);
            later += drow[i] - du[i];
            int64_t ahead = peak_last ? done + i - peak_last[one] : 0;
            dlog_input[at] = (float)(du[i] + (peak_last && ahead == 0 ? dm : 0));
            dlog_forget[at] = (float)(later + (peak_last && ahead > 0 ? dm : 0));
        }

        if (chunk || b->C_first) {
            if (flows) {
                scale(dC, g.keep, w.qk * w.v_padded);
                scale(dn, g.keep, w.qk_padded);
            }
            for (int i = 0; i < length; i++) {
                scale(q + i * w.qk_padded, g.start[i], w.qk_padded);
                add_scaled(dn, q + i * w.qk_padded, dden[i], w.qk_padded);
            }
            product(w.qk, w.v_padded, length, (Operand){q, 1, w.qk_padded}, dnum, w.v_padded, dC, w.v_padded, 1);
            flows = 1;
        }
    }
    if (!dC_first) return;
    for (int c = 0; c < w.qk; c++) memcpy(dC_first + (one * w.qk + c) * w.v, dC + c * w.v_padded, sizeof(float) * w.v);
    memcpy(dn_first + one * w.qk, dn, sizeof(float) * w.qk);
}

static Batch mlstm_batch(const float *q, const float *k, const float *v, const float *log_input,
                         const float *log_forget, int64_t q_row, int64_t k_row, int64_t v_row, const float *C_first,
                         const float *n_first, const float *m_first, float *C_starts, float *n_starts, float *m_starts,
                         const int64_t *order, const int64_t *edges, const int64_t *chunks, const int64_t *slots,
                         int64_t heads, int64_t qk, int64_t v_dim, int64_t reverse) {
    return (Batch){.q = q, .k = k, .v = v, .log_input = log_input, .log_forget = log_forget, .q_row = q_row,
                   .k_row = k_row, .v_row = v_row, .C_first = C_first, .n_first = n_first, .m_first = m_first,
                   .C_starts = C_starts, .n_starts = n_starts, .m_starts = m_starts, .order = order, .edges = edges,
                   .chunks = chunks, .slots = slots, .heads = heads,
                   .w = {(int)qk, (int)v_dim, round_up((int)qk), round_up((int)v_dim)}, .reverse = (int)reverse};
}

static size_t mlstm_space(Sizes w, int64_t longest) {
    size_t row = round_up((int)longest), squares = 3 * longest * row;
    size_t rows = longest * (5 * (size_t)w.qk_padded + 3 * (size_t)w.v_padded) + row * (w.qk_padded + w.v_padded);
    return squares + rows + 3 * (size_t)w.qk_padded * w.v_padded + 2 * w.qk_padded + 8 * row + 32 * 16;
}

/* All heads of a sequence to one thread, where there are sequences enough: their rows lie side by side. */
static int tasks_in_a_row(int64_t sequences, int64_t heads, int64_t threads) {
    return sequences >= 4 * threads ? (int)heads : 1;
}

int EXPORT(mlstm_forward)(const float *q, const float *k, const float *v, const float *log_input,
                          const float *log_forget, int64_t q_row, int64_t k_row, int64_t v_row, const float *C_first,
                          const float *n_first, const float *m_first, float *C_starts, float *n_starts,
                          float *m_starts, const int64_t *order, const int64_t *edges, const int64_t *chunks,
                          const int64_t *slots, int64_t heads, int64_t qk, int64_t v_dim, int64_t reverse,
                          int64_t sequences, int64_t longest, int64_t threads, float *h, float *C_last, float *n_last,
                          float *m_last, int64_t *peak_last) {
    Batch b = mlstm_batch(q, k, v, log_input, log_forget, q_row, k_row, v_row, C_first, n_first, m_first, C_starts,
                          n_starts, m_starts, order, edges, chunks, slots, heads, qk, v_dim, reverse);
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        float *space = workspace(mlstm_space(b.w, longest));
        if (!space) failed = 1;
#pragma omp for schedule(dynamic, tasks_in_a_row(sequences, heads, threads))
        for (int64_t task = 0; task < sequences * heads; task++)
            if (space)
                mlstm_forward_task(&b, order[task / heads], task % heads, (int)longest, space, h, C_last, n_last,
                                   m_last, peak_last);
        free(space);
    }
    return failed;
}

int EXPORT(mlstm_backward)(const float *q, const float *k, const float *v, const float *log_input,
                           const float *log_forget, int64_t q_row, int64_t k_row, int64_t v_row, const float *C_first,
                           const float *n_first, const float *m_first, float *C_starts, float *n_starts,
                           float *m_starts, const int64_t *order, const int64_t *edges, const int64_t *chunks,
                           const int64_t *slots, int64_t heads, int64_t qk, int64_t v_dim, int64_t reverse,
                           int64_t sequences, int64_t longest, int64_t threads, const float *h, const float *dh,
                           int64_t dh_row, const float *dC_last, const float *dn_last, const float *dm_last,
                           const int64_t *peak_last, float *dq, float *dk, float *dv, float *dlog_input,
                           float *dlog_forget, float *dC_first, float *dn_first) {
    Batch b = mlstm_batch(q, k, v, log_input, log_forget, q_row, k_row, v_row, C_first, n_first, m_first, C_starts,
                          n_starts, m_starts, order, edges, chunks, slots, heads, qk, v_dim, reverse);
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        float *space = workspace(mlstm_space(b.w, longest));
        if (!space) failed = 1;
#pragma omp for schedule(dynamic, tasks_in_a_row(sequences, heads, threads))
        for (int64_t task = 0; task < sequences * heads; task++)
            if (space)
                mlstm_backward_task(&b, order[task / heads], task % heads, (int)longest, space, h, dh, dh_row, dC_last,
                                    dn_last, dm_last, peak_last, dq, dk, dv, dlog_input, dlog_forget, dC_first,
                                    dn_first);
        free(space);
    }
    return failed;
}

/* What attention.h and attention_pairs.h cut their work into: 64 queries of a head against 64 keys at a time, one query
   in each lane. */

enum { QUERIES = 64, KEYS = 64, STEP = 16 };

/* Numbers of one call, in the order in which kernels/attention_native.py writes them. */
typedef struct {
    int64_t sequences, heads, kv_heads, dim, v_dim, causal, window;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head; /* strides */
} Attention;

typedef struct {
    const Attention *a;
    const float *q, *k, *v; /* of the first query, key and value of one head in one sequence */
    int queries, keys, lead; /* lead: tokens of the prefix */
} Part;

static Part attention_part(const Attention *a, const float *q, const float *k, const float *v, const int64_t *edges,
                           const int64_t *key_starts, const int64_t *key_lengths, const int64_t *prefix, int64_t s,
                           int64_t head) {
    int64_t shared = head / (a->heads / a->kv_heads), keys = key_lengths[s];
    return (Part){a,
                  q + edges[s] * a->q_token + head * a->q_head,
                  k + key_starts[s] * a->k_token + shared * a->k_head,
                  v + key_starts[s] * a->v_token + shared * a->v_head,
                  edges[s + 1] - edges[s],
                  keys,
                  prefix[s] < keys ? prefix[s] : keys};
}

/* The keys that the queries at positions [i0, i1) may see lie in [first, last). */
typedef struct {
    int i0, i1, first, last;
} Range;

static Range visible_range(const Part *p, int begin) {
    int64_t count = p->queries - begin < QUERIES ? p->queries - begin : QUERIES, window = p->a->window;
    int64_t i0 = p->keys - p->queries + begin, i1 = i0 + count;
    int64_t first = i0 - window + 1 > 0 ? i0 - window + 1 : 0, last = p->a->causal ? i1 : i1 - 1 + window;
    if (last > p->keys) last = p->keys;
    if (i0 < p->lead) {
        first = 0;
        if (last < p->lead) last = p->lead;
    }
    return (Range){i0, i1, first, last};
}

/* Keys [j, j + size) against a block of queries: those in the first `skip` lanes see none of them. */
typedef struct {
    int size, skip, masked;
} Block;

static Block next_block(const Part *p, Range r, int j) {
    int causal = p->a->causal && !(j < p->lead && r.i0 < p->lead);
    int64_t window = p->a->window;
    int size = causal && j + KEYS - 1 > r.i0 ? STEP : KEYS;
    if (size > r.last - j) size = r.last - j;
    int end = j + size;
    int masked = (p->a->causal && end - 1 > r.i0) || r.i1 - 1 - j >= window || end - 1 - r.i0 >= window;
    if (r.i1 <= p->lead && end <= p->lead) masked = 0;
    return (Block){size, causal && j > r.i0 ? (j - r.i0) / LANES * LANES : 0, masked};
}

/* to[columns][QUERIES] = scale * from[rows][columns], transposed, zeros up to the next full vector. */
static void turn_in(const float *from, ptrdiff_t from_row, int rows, int columns, float scale, float *to) {
    for (int r = 0; r < rows; r += LANES) {
        int c = 0;
        for (; c + LANES <= columns; c += LANES) {
            vec row[LANES];
            for (int i = 0; i < LANES; i++)
                row[i] = r + i < rows ? load(from + (r + i) * from_row + c) * scale : (vec){0};
            transpose_lanes(row);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * QUERIES + r, row[i]);
        }
        for (; c < columns; c++)
            for (int i = 0; i < LANES; i++)
                to[c * QUERIES + r + i] = r + i < rows ? from[(r + i) * from_row + c] * scale : 0;
    }
}

/* to[rows][columns] = from[columns][QUERIES], transposed. */
static void turn_out(const float *from, int rows, int columns, float *to, ptrdiff_t to_row) {
    for (int r = 0; r < rows; r += LANES) {
        int c = 0, count = rows - r < LANES ? rows - r : LANES;
        for (; c + LANES <= columns; c += LANES) {
            vec row[LANES];
            for (int i = 0; i < LANES; i++) row[i] = load(from + (c + i) * QUERIES + r);
            transpose_lanes(row);
            for (int i = 0; i < count; i++) store(to + (r + i) * to_row + c, row[i]);
        }
        for (; c < columns; c++)
            for (int i = 0; i < count; i++) to[(r + i) * to_row + c] = from[c * QUERIES + r + i];
    }
}

/* Minus infinity wherever a query does not see a key. */
static void hide(const Part *p, Range r, Block b, int j, float *s) {
    const int causal = p->a->causal, lead = p->lead, n = round_up(r.i1 - r.i0);
    const int window = p->a->window < INT32_MAX ? p->a->window : INT32_MAX;
    for (int c = b.skip; c < n; c += LANES) {
        vec_int i;
        for (int lane = 0; lane < LANES; lane++) i[lane] = r.i0 + c + lane;
        for (int row = 0; row < b.size; row++) {
            vec_int distance = i - (j + row), seen = (distance < window) & (distance > -window);
            if (causal) seen &= distance >= 0;
            if (j + row < lead) seen |= i < lead;
            float *at = s + row * QUERIES + c;
            store(at, choose(seen, load(at), all(-INFINITY)));
        }
    }
}

static void fetch(const float *from, ptrdiff_t from_row, int rows, int columns) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c += 16) __builtin_prefetch(from + r * from_row + c, 0, 2);
}

/* Blocks of queries before each sequence and in all, [sequences + 1]; NULL when there is no memory. */
static int64_t *block_starts(const Attention *a, const int64_t *edges) {
    int64_t *starts = malloc((a->sequences + 1) * sizeof(int64_t));
    if (!starts) return NULL;
    starts[0] = 0;
    for (int64_t s = 0; s < a->sequences; s++)
        starts[s + 1] = starts[s] + (edges[s + 1] - edges[s] + QUERIES - 1) / QUERIES;
    return starts;
}

/* The sequence that piece number `piece` belongs to, where sequence s has the pieces starts[s] to starts[s + 1] - 1. */
static int64_t owner(const int64_t *starts, int64_t sequences, int64_t piece) {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] <= piece) low = middle;
        else high = middle;
    }
    return low;
}

/* Block-diagonal maps with blocks of 4: y[map][t][4 b + o] = sum_i weight[map][i][4 b + o] x[t][4 b + i].

   A vector holds LANES / 4 blocks; input i of each block is spread over the block's four lanes. The weights of a vector
   stay in registers for GROUP_TOKENS rows. `width` is a multiple of LANES; rows of x may be apart, the rest is contiguous. */

enum { GROUP_TOKENS = 8, SUM_PIECES = 32 }; /* sums over tokens go by a fixed number of pieces, whatever the threads */

#if LANES == 16
#define SPREAD_ORDER(i) i, i, i, i, i + 4, i + 4, i + 4, i + 4, i + 8, i + 8, i + 8, i + 8, i + 12, i + 12, i + 12, i + 12
#elif LANES == 8
#define SPREAD_ORDER(i) i, i, i, i, i + 4, i + 4, i + 4, i + 4
#else
#define SPREAD_ORDER(i) i, i, i, i
#endif
#define SPREAD(x, i) SHUFFLE(x, x, SPREAD_ORDER(i))

/* to[size] = the sum of all pieces. */
static void add_pieces(const float *parts, int64_t size, float *to) {
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < size; c += LANES) {
        vec total = {0};
        for (int64_t p = 0; p < SUM_PIECES; p++) total += load(parts + p * size + c);
        store(to + c, total);
    }
}

/* Forward: one input, several outputs. Backward: several inputs (dy), their sum (dx), with weights transposed. */
int EXPORT(block_linear)(int64_t tokens, int64_t width, int64_t inputs, int64_t outputs, const float **x, int64_t x_row,
                         const float *weight, float **y) {
    int64_t groups = (tokens + GROUP_TOKENS - 1) / GROUP_TOKENS;
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        int64_t first = group * GROUP_TOKENS, last = first + GROUP_TOKENS < tokens ? first + GROUP_TOKENS : tokens;
        for (int64_t out = 0; out < outputs; out++)
            for (int64_t in = 0; in < inputs; in++)
                for (int64_t c = 0; c < width; c += LANES) {
                    const float *w = weight + (out * inputs + in) * 4 * width + c;
                    vec w0 = load(w), w1 = load(w + width), w2 = load(w + 2 * width), w3 = load(w + 3 * width);
                    for (int64_t t = first; t < last; t++) {
                        vec line = load(x[in] + t * x_row + c);
                        vec total = in ? load(y[out] + t * width + c) : (vec){0};
                        total += SPREAD(line, 0) * w0;
                        total += SPREAD(line, 1) * w1;
                        total += SPREAD(line, 2) * w2;
                        total += SPREAD(line, 3) * w3;
                        store(y[out] + t * width + c, total);
                    }
                }
    }
    return 0;
}

/* dweight[map][i][4 b + o] = sum_t dy[map][t][4 b + o] x[t][4 b + i]. */
int EXPORT(block_linear_weight)(int64_t tokens, int64_t width, int64_t maps, const float *x, int64_t x_row,
                                const float **dy, float *dweight) {
    int64_t size = maps * 4 * width, piece = (tokens + SUM_PIECES - 1) / SUM_PIECES;
    float *parts = workspace(SUM_PIECES * size);
    if (!parts) return 1;
    memset(parts, 0, SUM_PIECES * size * sizeof(float));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < SUM_PIECES; p++) {
        int64_t end = (p + 1) * piece < tokens ? (p + 1) * piece : tokens;
        for (int64_t first = p * piece; first < end; first += GROUP_TOKENS) {
            int64_t last = first + GROUP_TOKENS < end ? first + GROUP_TOKENS : end;
            for (int64_t map = 0; map < maps; map++)
                for (int64_t c = 0; c < width; c += LANES) {
                    float *to = parts + p * size + map * 4 * width + c;
                    vec w0 = load(to), w1 = load(to + width), w2 = load(to + 2 * width), w3 = load(to + 3 * width);
                    for (int64_t t = first; t < last; t++) {
                        vec line = load(x + t * x_row + c), d = load(dy[map] + t * width + c);
                        w0 += SPREAD(line, 0) * d;
                        w1 += SPREAD(line, 1) * d;
                        w2 += SPREAD(line, 2) * d;
                        w3 += SPREAD(line, 3) * d;
                    }
                    store(to, w0), store(to + width, w1), store(to + 2 * width, w2), store(to + 3 * width, w3);
                }
        }
    }
    add_pieces(parts, size, dweight);
    free(parts);
    return 0;
}

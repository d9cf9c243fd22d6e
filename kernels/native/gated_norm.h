/* out = (norm(h) * weight + skip * skip_weight) * gate's activation, norm over each head by itself.

   One pass over a head's channels for its mean and variance, one for the rest; a head stays in L1. `gate` and its
   gradient may have rows apart. skip may be NULL. `silu`: the activation is x sigmoid(x), else sigmoid(x). head_dim is a
   multiple of LANES. */

INLINE void mean_and_scale(const float *h, int64_t head_dim, float eps, float *mean, float *scale) {
    vec total = {0}, squares = {0};
    for (int64_t c = 0; c < head_dim; c += LANES) total += load(h + c);
    *mean = sum(total) / head_dim;
    for (int64_t c = 0; c < head_dim; c += LANES) {
        vec centred = load(h + c) - *mean;
        squares += centred * centred;
    }
    *scale = 1.0f / sqrtf(sum(squares) / head_dim + eps);
}

int EXPORT(gated_norm)(int64_t tokens, int64_t heads, int64_t head_dim, const float *h, const float *weight,
                       const float *skip, const float *skip_weight, const float *gate, int64_t gate_row, int64_t silu,
                       float eps, float *out) {
    int64_t width = heads * head_dim;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t first = 0; first < width; first += head_dim) {
            float mean, scale;
            mean_and_scale(h + t * width + first, head_dim, eps, &mean, &scale);
            for (int64_t c = first; c < first + head_dim; c += LANES) {
                vec y = (load(h + t * width + c) - mean) * scale * load(weight + c);
                if (skip) y += load(skip + t * width + c) * load(skip_weight + c);
                vec g = load(gate + t * gate_row + c), s = vec_sigmoid(g);
                store(out + t * width + c, y * (silu ? g * s : s));
            }
        }
    return 0;
}

int EXPORT(gated_norm_backward)(int64_t tokens, int64_t heads, int64_t head_dim, const float *h, const float *weight,
                                const float *skip, const float *skip_weight, const float *gate, int64_t gate_row,
                                int64_t silu, float eps, const float *dout, float *dh, float *dweight, float *dskip,
                                float *dskip_weight, float *dgate) {
    int64_t width = heads * head_dim, piece = (tokens + SUM_PIECES - 1) / SUM_PIECES;
    float *parts = workspace(SUM_PIECES * 2 * width);
    if (!parts) return 1;
    memset(parts, 0, SUM_PIECES * 2 * width * sizeof(float));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < SUM_PIECES; p++) {
        float *weight_part = parts + p * width, *skip_part = parts + (SUM_PIECES + p) * width;
        int64_t end = (p + 1) * piece < tokens ? (p + 1) * piece : tokens;
        for (int64_t t = p * piece; t < end; t++)
            for (int64_t first = 0; first < width; first += head_dim) {
                float mean, scale;
                mean_and_scale(h + t * width + first, head_dim, eps, &mean, &scale);
                vec total = {0}, along = {0}; /* of the gradient of the normed head, and its product with that head */
                for (int64_t c = first; c < first + head_dim; c += LANES) {
                    int64_t at = t * width + c;
                    vec normed = (load(h + at) - mean) * scale, w = load(weight + c), y = normed * w;
                    vec g = load(gate + t * gate_row + c), s = vec_sigmoid(g), d = load(dout + at);
                    vec dy = d * (silu ? g * s : s);
                    if (skip) {
                        vec line = load(skip + at), by = load(skip_weight + c);
                        y += line * by;
                        store(dskip + at, dy * by);
                        store(skip_part + c, load(skip_part + c) + dy * line);
                    }
                    store(dgate + at, d * y * (silu ? s * (1.0f + g * (1.0f - s)) : s * (1.0f - s)));
                    store(weight_part + c, load(weight_part + c) + dy * normed);
                    vec dnormed = dy * w;
                    store(dh + at, dnormed);
                    total += dnormed;
                    along += dnormed * normed;
                }
                float mean_total = sum(total) / head_dim, mean_along = sum(along) / head_dim;
                for (int64_t c = first; c < first + head_dim; c += LANES) {
                    int64_t at = t * width + c;
                    vec normed = (load(h + at) - mean) * scale;
                    store(dh + at, scale * (load(dh + at) - mean_total - normed * mean_along));
                }
            }
    }
    add_pieces(parts, width, dweight);
    if (skip) add_pieces(parts + SUM_PIECES * width, width, dskip_weight);
    free(parts);
    return 0;
}

/* y = x / sqrt(mean(x^2) + eps) * weight, one pass over a row that stays in L1. */

INLINE float rms_scale(const float *x, int64_t width, float eps) {
    vec squares[4] = {{0}};
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vec part = load(x + c + i * LANES);
            squares[i] += part * part;
        }
    for (; c < width; c += LANES) {
        vec part = load_some(x + c, width - c);
        squares[0] += part * part;
    }
    return 1.0f / sqrtf(sum(squares[0] + squares[1] + squares[2] + squares[3]) / width + eps);
}

INLINE void rms_row(const float *x, const float *weight, int64_t width, float eps, float *y) {
    const float scale = rms_scale(x, width, eps);
    for (int64_t c = 0; c < width; c += LANES)
        store_some(y + c, load_some(x + c, width - c) * scale * load_some(weight + c, width - c), width - c);
}

int EXPORT(rms_norm)(int64_t tokens, int64_t width, const float *x, const float *weight, float eps, float *y) {
#pragma omp parallel for schedule(static) if (tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) rms_row(x + t * width, weight, width, eps, y + t * width);
    return 0;
}

/* The width is a multiple of LANES. */
int EXPORT(rms_norm_backward)(int64_t tokens, int64_t width, const float *x, const float *weight, float eps,
                              const float *dy, float *dx, float *dweight) {
    int64_t piece = (tokens + SUM_PIECES - 1) / SUM_PIECES;
    float *parts = workspace(SUM_PIECES * width);
    if (!parts) return 1;
    memset(parts, 0, SUM_PIECES * width * sizeof(float));
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < SUM_PIECES; p++) {
        float *part = parts + p * width;
        int64_t end = (p + 1) * piece < tokens ? (p + 1) * piece : tokens;
        for (int64_t t = p * piece; t < end; t++) {
            const float *row = x + t * width, *d = dy + t * width, scale = rms_scale(row, width, eps);
            vec along = {0}; /* of the gradient of the normed row and that row */
            for (int64_t c = 0; c < width; c += LANES) {
                vec normed = load(row + c) * scale, line = load(d + c);
                store(part + c, load(part + c) + line * normed);
                along += line * load(weight + c) * normed;
            }
            float mean = sum(along) / width;
            for (int64_t c = 0; c < width; c += LANES)
                store(dx + t * width + c, scale * (load(d + c) * load(weight + c) - load(row + c) * scale * mean));
        }
    }
    add_pieces(parts, width, dweight);
    free(parts);
    return 0;
}

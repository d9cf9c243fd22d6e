/* What stands between the two maps of a feed-forward, in one pass.

   y = gelu(x), or gated y = act(gate) * up, where gate and up are the halves of a row of x. `kind`: 0 silu, 1 gelu. */

enum { WORTH_THREADS = 32768 }; /* numbers, fewer of which one thread has done before another has woken up */

/* The activation and its slope. */
INLINE vec activated(int gelu, vec x) { return gelu ? vec_gelu(x) : x * vec_sigmoid(x); }
INLINE vec activated_slope(int gelu, vec x, vec *slope) {
    if (gelu) {
        vec below = vec_erf(x * 0.70710678118654752f) * 0.5f + 0.5f;
        *slope = below + x * vec_exp_below(x * x * -0.5f) * 0.39894228040143268f;
        return x * below;
    }
    vec s = vec_sigmoid(x);
    *slope = s * (1.0f + x * (1.0f - s));
    return x * s;
}

INLINE void activate_row(int gelu, int gated, int64_t inner, const float *x, float *y) {
    int64_t c = 0;
    for (; c + LANES <= inner; c += LANES) {
        vec part = activated(gelu, load(x + c));
        store(y + c, gated ? part * load(x + inner + c) : part);
    }
    if (c < inner) {
        vec part = activated(gelu, load_some(x + c, inner - c));
        store_some(y + c, gated ? part * load_some(x + inner + c, inner - c) : part, inner - c);
    }
}

/* x [tokens][inner, or twice as many when gated], y [tokens][inner]. */
int EXPORT(activation)(int64_t tokens, int64_t inner, int64_t gelu, int64_t gated, const float *x, float *y) {
    const int64_t row = gated ? 2 * inner : inner;
#pragma omp parallel for schedule(static) if (tokens * inner > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        if (gelu && gated) activate_row(1, 1, inner, x + t * row, y + t * inner);
        else if (gelu) activate_row(1, 0, inner, x + t * row, y + t * inner);
        else activate_row(0, 1, inner, x + t * row, y + t * inner);
    }
    return 0;
}

INLINE void activate_row_backward(int gelu, int gated, int64_t inner, const float *x, const float *dy, float *dx) {
    for (int64_t c = 0; c < inner; c += LANES) {
        const int64_t left = inner - c;
        vec slope, y = activated_slope(gelu, load_some(x + c, left), &slope), d = load_some(dy + c, left);
        if (gated) {
            store_some(dx + inner + c, d * y, left);
            d *= load_some(x + inner + c, left);
        }
        store_some(dx + c, d * slope, left);
    }
}

int EXPORT(activation_backward)(int64_t tokens, int64_t inner, int64_t gelu, int64_t gated, const float *x,
                                const float *dy, float *dx) {
    const int64_t row = gated ? 2 * inner : inner;
#pragma omp parallel for schedule(static) if (tokens * inner > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        if (gelu && gated) activate_row_backward(1, 1, inner, x + t * row, dy + t * inner, dx + t * row);
        else if (gelu) activate_row_backward(1, 0, inner, x + t * row, dy + t * inner, dx + t * row);
        else activate_row_backward(0, 1, inner, x + t * row, dy + t * inner, dx + t * row);
    }
    return 0;
}

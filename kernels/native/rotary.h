/* Rotary positions, one pass: y_i = x_i cos + x_partner sin, the sign of the sine standing with it.

   An angle counts in quarter turns. It is formed and brought to half a turn in float64, since positions are large, and
   the rest is float32: sine and cosine on [-pi / 4, pi / 4] by polynomials (Cephes, Moshier 1992), to 1e-7. They are
   made once per token and serve all of its heads, so that the pass runs at the speed of reading x and writing y. */

INLINE vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

/* Of position * turns[lane]: turns counts full turns per position. */
INLINE void sine_cosine(double position, const double *turns, vec *sine, vec *cosine) {
    vec_double angle = *(const vec_double_any *)turns * position;
    angle -= (angle + 6755399441055744.0) - 6755399441055744.0; /* 1.5 * 2^52: the nearest integer */
    vec quarters = __builtin_convertvector(angle * 4.0, vec), whole = nearest(quarters);
    vec_int quadrant = __builtin_convertvector(whole, vec_int);
    vec x = (quarters - whole) * 1.5707963267948966f, z = x * x;
    vec s = x + x * z * ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f);
    vec c = 1.0f - z * 0.5f + z * z * ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f);
    vec_int odd = (quadrant & 1) != 0;
    *sine = (vec)((vec_int)choose(odd, c, s) ^ ((quadrant & 2) << 30));
    *cosine = (vec)((vec_int)choose(odd, s, c) ^ (((quadrant + 1) & 2) << 30));
}

/* y[tokens][heads][dim] = x turned; turns[round_up(dim / 2)]; `direction` -1 turns back. */
EXPORT(int rotary)(const float *x, const int64_t *positions, const double *turns, float *y, int64_t tokens,
                   int64_t heads, int64_t dim, int64_t x_token, int64_t x_head, int64_t interleaved, float direction) {
    const int half = dim / 2;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *sine = workspace(2 * round_up(half) + 2 * dim), *cosine = sine + round_up(half);
        float *cos_of = cosine + round_up(half), *sin_of = cos_of + dim;
        failed = !sine;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            if (!sine) continue;
            for (int j = 0; j < half; j += LANES) {
                vec s, c;
                sine_cosine(positions[t], turns + j, &s, &c);
                store(sine + j, s * direction);
                store(cosine + j, c);
            }
            for (int j = 0; interleaved && j < half; j++) {
                cos_of[2 * j] = cos_of[2 * j + 1] = cosine[j];
                sin_of[2 * j] = -sine[j], sin_of[2 * j + 1] = sine[j];
            }
            for (int64_t h = 0; h < heads; h++) {
                const float *from = x + t * x_token + h * x_head;
                float *to = y + (t * heads + h) * dim;
                int i = 0;
                if (interleaved) {
                    for (; i + LANES <= dim; i += LANES) {
                        vec here = load(from + i);
                        store(to + i, here * load(cos_of + i) + SHUFFLE(here, here, EACH(ACROSS, 1)) * load(sin_of + i));
                    }
                    for (; i < dim; i++) to[i] = from[i] * cos_of[i] + from[i ^ 1] * sin_of[i];
                } else {
                    for (; i < half; i += LANES) {
                        const int left = half - i;
                        vec a = load_some(from + i, left), b = load_some(from + i + half, left);
                        vec c = load(cosine + i), s = load(sine + i);
                        store_some(to + i, a * c - b * s, left);
                        store_some(to + i + half, b * c + a * s, left);
                    }
                }
            }
        }
        free(sine);
    }
    return failed;
}

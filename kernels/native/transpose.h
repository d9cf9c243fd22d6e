/* Transpose LANES x LANES in registers: at each width, swap what stands off the diagonal (Eklundh 1972). */
#define LOW(lane, width) ((lane) & (width) ? LANES + (lane) - (width) : (lane))
#define HIGH(lane, width) ((lane) & (width) ? LANES + (lane) : (lane) + (width))
#define OTHER(lane, width) ((lane) ^ (width))
#define FOUR(pick, l, w) pick(l, w), pick(l + 1, w), pick(l + 2, w), pick(l + 3, w)
#if LANES == 16
#define EACH(pick, w) FOUR(pick, 0, w), FOUR(pick, 4, w), FOUR(pick, 8, w), FOUR(pick, 12, w)
#elif LANES == 8
#define EACH(pick, w) FOUR(pick, 0, w), FOUR(pick, 4, w)
#else
#define EACH(pick, w) FOUR(pick, 0, w)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif

INLINE void transpose_lanes(vec *row) {
    vec upper, lower;
#define STAGE(width)                                                                                               \
    for (int r = 0; r < LANES; r++)                                                                                \
        if (!(r & width)) {                                                                                        \
            upper = row[r], lower = row[r + width];                                                                \
            row[r] = SHUFFLE(upper, lower, EACH(LOW, width));                                                      \
            row[r + width] = SHUFFLE(upper, lower, EACH(HIGH, width));                                             \
        }
#if LANES == 16
    STAGE(8)
#endif
#if LANES >= 8
    STAGE(4)
#endif
    STAGE(2)
    STAGE(1)
#undef STAGE
}

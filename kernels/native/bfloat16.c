/* Products of bfloat16 pairs for AVX-512 with BF16 (Cooper Lake 2020, Zen 4 2022). */
#include <stdint.h>
#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif
#define VARIANT bfloat16
#define LANES 16
#define VECTORS 4
#define PAIRS
#define MULTIPLY_ADD(a, b, c) ((vec)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)))
#include "simd.h"

/* The upper halves of all words, in order: bfloat16 neighbours. */
#define UPPER_HALVES                                                                                               \
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, \
        59, 61, 63
typedef int16_t vec_short __attribute__((vector_size(LANES * 4)));
INLINE vec upper_halves(vec_int low, vec_int high) {
#ifdef __clang__
    return (vec)__builtin_shufflevector((vec_short)low, (vec_short)high, UPPER_HALVES);
#else
    return (vec)__builtin_shuffle((vec_short)low, (vec_short)high, (vec_short){UPPER_HALVES});
#endif
}

#include "linear.h"
#include "attention_pairs.h" /* after linear.h, whose pairs it takes */
#include "some_rows.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

/* Whether this processor runs them. */
__attribute__((visibility("default"))) int native_bfloat16(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

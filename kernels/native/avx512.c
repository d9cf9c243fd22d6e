/* Every kernel for AVX-512 (x86-64-v4: Skylake-X 2017, Zen 4 2022). */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define VARIANT avx512
#define LANES 16
#define VECTORS 4
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

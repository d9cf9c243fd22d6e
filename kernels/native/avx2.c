/* Every kernel for AVX2 with FMA (x86-64-v3: Haswell 2013, Zen 2017). */
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VARIANT avx2
#define LANES 8
#define VECTORS 2
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

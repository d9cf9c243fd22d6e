/* Every kernel for the instructions that any machine of this architecture has. */
#define VARIANT baseline
#define LANES 4
#ifdef __aarch64__
#define VECTORS 4
#else
#define VECTORS 2
#endif
#include "kernels.h"

/* A checksum of the sources, so that a library of older ones is not called with newer arguments. */
__attribute__((visibility("default"))) unsigned native_version(void) { return NATIVE_VERSION; }

/* The best variant that this processor runs: 0 baseline, 1 AVX2 with FMA, 2 AVX-512. */
__attribute__((visibility("default"))) int native_level(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

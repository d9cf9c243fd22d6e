/* What is not a kernel: how fresh memory is handed out. */
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Back a buffer with pages of 2 MB where the system is willing; elsewhere, or when it is not, nothing happens. */
__attribute__((visibility("default"))) int native_huge_pages(void *at, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, first = ((uintptr_t)at + page - 1) / page * page;
    madvise((void *)first, (uintptr_t)at + bytes - first, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
    return 0;
}

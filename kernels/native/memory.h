/* Fresh memory for large outputs.

   An allocator gives every block above 32 MB to the kernel back and takes it anew, and each of its 4 kB pages then costs
   a fault at first touch: for a kernel that runs at memory speed, more than the work. Where the system offers pages of
   2 MB on request, this requests them for what is about to be written. */
#ifndef MEMORY_H
#define MEMORY_H
#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

static inline void prefer_large_pages(void *at, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20, first = (uintptr_t)at;
    const uintptr_t start = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    if (bytes >= 32 << 20 && start < end) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}
#endif

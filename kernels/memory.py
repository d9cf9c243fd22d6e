"""Freed memory is kept for the next call."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed blocks of up to 1 GiB instead of handing them back to the system at once.

    A step on a CPU frees and takes the same tensors again and again; the page faults of that were 15-20% of the time of
    a small model's training (measured on two cores, glibc 2.36). It holds for the process, so importing does not do
    it: training and inference do, and scripts may. Only glibc on Linux has the switch.

    Returns:
        whether the C library took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(which, _BYTES) == 1 for which in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))

"""The native CPU path: C for AVX-512, AVX2 and any other processor, compiled when the package is built.

Nothing is compiled at run time, and nothing needs it: where it was not built (no compiler, another platform),
``variant()`` is None and the torch backends serve. The library knows neither Python nor torch; it is reached through
ctypes, shares torch's OpenMP threads, and is safe to call from several threads.

``PROCESSIVE_NATIVE`` in the environment names the variant to use instead of the best one the processor runs:
``avx512``, ``avx2``, ``baseline``, or ``off``.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch  # before the library: both then share one OpenMP runtime and its threads
from torch import Tensor

from ...errors import ConfigError

VARIANTS = ("baseline", "avx2", "avx512")  # by the level that the library reports
MOST_LANES = 16  # floats in the widest vector
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_LARGE = 2**22  # bytes from which a tensor asks for huge pages


@cache
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    files = sorted(folder.glob("_native*.so"))
    try:
        library = ctypes.CDLL(str(files[0])) if files else None
    except OSError:  # built for another machine; ``backends`` then says that there are none
        return None
    sources = sorted(path for kind in ("*.c", "*.h") for path in folder.glob(kind))  # of a checkout; a wheel has none
    if library is not None and sources:
        version = getattr(library, "native_version", int)() & 0xFFFFFFFF
        if version != zlib.crc32(b"".join(path.read_bytes() for path in sources)):
            raise ConfigError(
                f"{files[0]} was built from other sources than those beside it. Build it again: "
                "python setup.py build_ext --inplace --force"
            )
    return library


@cache
def variant() -> str | None:
    """Return the instruction set in use: ``"avx512"``, ``"avx2"``, ``"baseline"``, or None without native kernels.

    Raises:
        ConfigError: ``PROCESSIVE_NATIVE`` names something else, or more than this processor has.
    """
    library, wanted = _library(), os.environ.get("PROCESSIVE_NATIVE")
    if wanted == "off":
        return None
    usable = () if library is None else VARIANTS[: library.native_level() + 1]
    if wanted is None:
        return usable[-1] if usable else None
    if wanted not in usable:
        raise ConfigError(f"PROCESSIVE_NATIVE is {wanted!r}; here it can be {', '.join((*usable, 'off'))}.")
    return wanted


def lanes() -> int:
    """Return how many floats a vector of the variant in use holds; the kernels pad rows to a multiple of it."""
    return {"baseline": 4, "avx2": 8, "avx512": 16}[variant() or "baseline"]


@cache
def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 pairs and the library may use that."""
    library = _library()
    return variant() == "avx512" and library is not None and bool(library.native_bfloat16())


@cache
def function(name: str, signature: str, variant_name: str | None = None) -> Callable[..., int]:
    """Return a native function that takes pointers (``p``), 64-bit integers (``i``) and floats (``f``).

    It is of the variant in use, or of ``"bfloat16"`` where ``has_bfloat16()``. Its result is 0, or 1 where it found no
    memory for its working space, which raises.

    Raises:
        MemoryError: when called.
    """
    found = getattr(_library(), f"{name}_{variant_name or variant()}")
    found.argtypes = [_TYPES[letter] for letter in signature.replace(" ", "")]
    found.restype = ctypes.c_int
    found.errcheck = _checked
    result: Callable[..., int] = found
    return result


@cache
def address(name: str, variant_name: str) -> int | None:
    """Return where a function of a variant begins, for a native function that calls it; None where it does not run."""
    if variant_name == "bfloat16" and not has_bfloat16():
        return None
    return ctypes.cast(getattr(_library(), f"{name}_{variant_name}"), ctypes.c_void_p).value


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor on the CPU; every output of a native kernel is made here.

    A large one asks the system for huge pages: to touch fresh memory 4 KiB at a time took half of the time of an mLSTM
    over 16,384 tokens (measured on two cores: 298,000 tokens/s forward without, 551,000 with).
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _LARGE:
        _huge_pages()(tensor.data_ptr(), tensor.nbytes)
    return tensor


@cache
def _huge_pages() -> Callable[[int, int], int]:
    found = getattr(_library(), "native_huge_pages")  # noqa: B009 - the library may be None where nothing calls this
    found.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    result: Callable[[int, int], int] = found
    return result


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, or None for None."""
    return None if x is None else x.data_ptr()


def _checked(result: int, *_: object) -> int:
    if result:
        raise MemoryError("A native kernel found no memory for its working space.")
    return result


def readable(x: Tensor | None, dtypes: tuple[torch.dtype, ...] | None = None) -> bool:
    """Tell whether native functions can read ``x`` as it lies: on the CPU, contiguous, float32 or of ``dtypes``."""
    return x is None or (x.is_cpu and x.dtype in (dtypes or (torch.float32,)) and x.is_contiguous())

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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError

if TYPE_CHECKING:
    import torch

VARIANTS = ("baseline", "avx2", "avx512")  # by the level that the library reports
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@cache
def _library() -> ctypes.CDLL | None:
    import torch  # noqa: F401 - its OpenMP runtime is loaded first, so that both share one pool of threads

    files = sorted(Path(__file__).parent.glob("_native*.so"))
    try:
        return ctypes.CDLL(str(files[0])) if files else None
    except OSError:  # built for another machine
        return None


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


@cache
def function(name: str, signature: str) -> Callable[..., int]:
    """Return a native function that takes pointers (``p``), 64-bit integers (``i``) and floats (``f``).

    Its result is 0, or 1 where it found no memory for its working space, which raises.

    Raises:
        MemoryError: when called.
    """
    found = getattr(_library(), f"{name}_{variant()}")
    found.argtypes = [_TYPES[letter] for letter in signature.replace(" ", "")]
    found.restype = ctypes.c_int
    found.errcheck = _checked
    result: Callable[..., int] = found
    return result


def _checked(result: int, *_: object) -> int:
    if result:
        raise MemoryError("A native kernel found no memory for its working space.")
    return result


def address(x: torch.Tensor | None) -> int | None:
    """Return where a native function finds ``x``, NULL for None."""
    return None if x is None else x.data_ptr()


def readable(x: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] | None = None) -> bool:
    """Tell whether native functions can read ``x`` as it lies: on the CPU, contiguous, float32 or of ``dtypes``."""
    import torch

    return x is None or (x.is_cpu and x.dtype in (dtypes or (torch.float32,)) and x.is_contiguous())

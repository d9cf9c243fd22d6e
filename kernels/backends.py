"""Which implementation of a kernel runs, and how to ask.

Every public kernel takes ``backend="auto"`` or a name listed by ``available_backends``. The choice depends on the
device, the dtype and the processor alone, so it is the same in every run on a machine, and ``chosen_backend`` tells it
beforehand. For ``linear`` the dtype is that of the operands: bfloat16 stands for ``precision="bf16"``.

- ``torch``: everywhere, every dtype.
- ``native``: C on a CPU, for float32 and narrower; see ``kernels.native``.
- ``onednn``: a private operator of torch on a CPU, of ``linear`` alone.
- ``triton``: on a GPU, for float32 and narrower; on a CPU only for tests, interpreted (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from ..errors import ConfigError
from . import cpu, native

_BACKENDS: dict[str, tuple[str, ...]] = {  # the preferred one first
    "mlstm": ("triton", "native", "torch"),
    "slstm": ("triton", "native", "torch"),
    "attention": ("native", "torch"),
    "causal_conv1d": ("native", "torch"),
    "rotary": ("native", "torch"),
    "linear": ("native", "onednn", "torch"),
    "block_linear": ("native", "torch"),
    "gated_norm": ("native", "torch"),
    "activation": ("native", "torch"),
    "rms_norm": ("native", "torch"),
    "decoding": ("native", "torch"),  # one token of each sequence through a block, see backbones.decoding
}


def available_backends(kernel_name: str) -> tuple[str, ...]:
    """Return the backends of a kernel that this machine has, the preferred one first.

    Raises:
        ConfigError: there is no such kernel.
    """
    return tuple(backend for backend in _backends(kernel_name) if _missing(backend) is None)


def chosen_backend(kernel_name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that ``backend="auto"`` means for tensors of this device and dtype.

    Raises:
        ConfigError: there is no such kernel.
    """
    return choose_backend(kernel_name, "auto", torch.device(device), dtype)


def choose_backend(kernel_name: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return ``requested``, or what "auto" means.

    Raises:
        ConfigError: there is no such kernel, or it has no such backend here or for such tensors.
    """
    backends = _backends(kernel_name)
    if requested == "auto" and torch.compiler.is_compiling():
        return "torch"  # which the compiler can read
    if requested == "auto":
        return next(
            name
            for name in backends
            if _missing(name) is None and _serves(kernel_name, name, device, dtype) and _pays(kernel_name, name, dtype)
        )
    if requested not in backends:
        raise ConfigError(
            f"Kernel {kernel_name!r} has no backend {requested!r}; there are: auto, {', '.join(backends)}."
        )
    missing = _missing(requested)
    if missing is not None:
        raise ConfigError(f"The backend {requested!r} is not to be had here: {missing}.")
    interpreted = requested == "triton" and _interpreted() and dtype != torch.float64
    if not interpreted and not _serves(kernel_name, requested, device, dtype):
        raise ConfigError(f"The backend {requested!r} does not take {dtype} on {device}; backend='auto' finds one.")
    return requested


def check_precision(precision: str) -> None:
    """Raise where products cannot be asked for in this precision.

    Raises:
        ConfigError: it is neither "float32" nor "bf16".
    """
    if precision not in ("float32", "bf16"):
        raise ConfigError(f"The precision of products is 'float32' or 'bf16', not {precision!r}.")


def _backends(kernel_name: str) -> tuple[str, ...]:
    if kernel_name not in _BACKENDS:
        raise ConfigError(f"There is no kernel {kernel_name!r}; the kernels are {', '.join(_BACKENDS)}.")
    return _BACKENDS[kernel_name]


def _missing(backend: str) -> str | None:
    """Why this machine does not have a backend, or None."""
    if backend == "native" and native.variant() is None:
        return "the native kernels were not built or cannot be loaded, or PROCESSIVE_NATIVE is off"
    if backend == "onednn" and not _has_onednn():
        return "this torch has no oneDNN operator for linear maps"
    if backend == "triton" and not _has_triton():
        return "Triton is not installed (pip install 'processive[gpu]')"
    if backend == "triton" and not torch.cuda.is_available() and not _interpreted():
        return "there is no GPU, and TRITON_INTERPRET=1 is not set"
    return None


def _serves(kernel: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend takes such tensors."""
    if backend == "torch":
        return True
    if backend == "native" and kernel == "linear" and dtype == torch.bfloat16 and not native.has_bfloat16():
        return False
    return dtype != torch.float64 and device.type == ("cuda" if backend == "triton" else "cpu")


def _pays(kernel_name: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend beats torch's own on this processor (measured on Zen 4; Intel's MKL and AMX need no help)."""
    if kernel_name != "linear" or backend == "torch":
        return True
    if dtype == torch.bfloat16:
        return backend == "native" and "amx_bf16" not in cpu.flags()
    return cpu.vendor() in cpu.AMD and "avx2" in cpu.flags()


@cache
def _has_onednn() -> bool:
    """Whether torch's private operator exists and works."""
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    try:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, torch.ones(4), "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # another torch: no operator, no oneDNN, another signature
        return False
    return torch.equal(y, torch.full((2, 4), 4.0))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"

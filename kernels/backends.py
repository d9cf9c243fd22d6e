"""Which implementation of a kernel runs, and how to ask.

Every public kernel takes ``backend="auto"`` or a name listed by ``available_backends``. The choice depends on the
device and dtype alone, so it is the same in every run, and ``chosen_backend`` tells it beforehand.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError

_BACKENDS: dict[str, tuple[str, ...]] = {
    "mlstm": ("torch",),
    "slstm": ("torch",),
    "attention": ("torch",),
    "causal_conv1d": ("torch",),
    "rotary": ("torch",),
}


def available_backends(kernel_name: str) -> tuple[str, ...]:
    """Return the backends of a kernel, the preferred one first.

    Raises:
        ConfigError: there is no such kernel.
    """
    if kernel_name not in _BACKENDS:
        raise ConfigError(f"There is no kernel {kernel_name!r}; the kernels are {', '.join(_BACKENDS)}.")
    return _BACKENDS[kernel_name]


def chosen_backend(kernel_name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that ``backend="auto"`` means for tensors of this device and dtype.

    Raises:
        ConfigError: there is no such kernel.
    """
    return choose_backend(kernel_name, "auto", torch.device(device), dtype)


def choose_backend(kernel_name: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return ``requested``, or what "auto" means.

    Raises:
        ConfigError: there is no such kernel, or it has no such backend.
    """
    del device, dtype  # the torch backend serves them all
    backends = available_backends(kernel_name)
    if requested == "auto":
        return backends[0]
    if requested not in backends:
        raise ConfigError(
            f"Kernel {kernel_name!r} has no backend {requested!r}; there are: auto, {', '.join(backends)}."
        )
    return requested

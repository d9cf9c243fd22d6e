"""The activation of a feed-forward in one pass.

    gelu     y = x N(x)               N: the normal distribution's share below x
    geglu    y = gate N(gate) up      gate, up: the halves of a row
    swiglu   y = gate sigmoid(gate) up

Floor per output in float32: 8 bytes (gelu: read, write) or 12 (gated), and 12 or 20 more in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, ShapeError
from . import native
from .backends import choose_backend

KINDS = {"gelu": (True, False), "geglu": (True, True), "swiglu": (False, True)}  # GELU or SiLU, gated or not


def activation(
    x: Float[Tensor, "tokens channels"], kind: str, *, backend: str = "auto"
) -> Float[Tensor, "tokens inner"]:
    """Return the activation of ``x``; a gated one halves the channels, gate first.

    Raises:
        ConfigError: unknown ``kind`` or ``backend``, or the native kernel is asked for and ``x`` is not float32.
        ShapeError: a gated row has no halves.
    """
    if kind not in KINDS:
        raise ConfigError(f"There is no activation {kind!r}; there are {', '.join(KINDS)}.")
    gelu, gated = KINDS[kind]
    if gated and x.shape[1] % 2:
        raise ShapeError("x", tuple(x.shape), "an even number of channels")
    chosen = choose_backend("activation", backend, x.device, x.dtype)
    if backend == "native" and x.dtype != torch.float32:
        raise ConfigError("The native activation takes float32.")
    if chosen == "torch" or x.dtype != torch.float32 or not x.numel():
        act = F.gelu if gelu else F.silu
        if not gated:
            return act(x)
        gate, up = x.chunk(2, dim=1)
        return act(gate) * up
    y: Tensor = _Activation.apply(x, gelu, gated)  # type: ignore[no-untyped-call]
    return y


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool, gated: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.kind = gelu, gated
        y = native.empty(len(x), x.shape[1] // (2 if gated else 1))
        native.function("activation", "iiii pp")(*y.shape, gelu, gated, x.data_ptr(), y.data_ptr())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), native.empty(*x.shape)
        run = native.function("activation_backward", "iiii ppp")
        run(*dy.shape, *ctx.kind, x.data_ptr(), dy.data_ptr(), dx.data_ptr())
        return dx, None, None

"""RMSNorm in one pass.

    y = x / sqrt(mean(x^2) + eps) * weight

Source: Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.
Floor per channel in float32: 8 bytes forward (read, write), and 12 more in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from . import native
from .backends import choose_backend
from .packing import expect_shape


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float | int, *, backend: str = "auto"
) -> Float[Tensor, "*tokens width"]:
    """Norm the last axis.

    The native kernel has float32 and a width of a multiple of 16; "auto" leaves the rest to torch.

    Raises:
        ShapeError: the arguments disagree.
        ConfigError: unknown ``backend``, or the native kernel is asked for and does not have it.
    """
    width = x.shape[-1]
    expect_shape("weight", weight, (width,))
    chosen = choose_backend("rms_norm", backend, x.device, x.dtype)
    fits = width and not width % 16 and x.dtype == weight.dtype == torch.float32
    if backend == "native" and not fits:
        raise ConfigError("The native rms_norm takes float32 and a width that 16 divides.")
    if chosen == "torch" or not fits or not x.numel():
        return F.rms_norm(x, (width,), weight, eps)
    y: Tensor = _RMSNorm.apply(x.reshape(-1, width), weight, float(eps))  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = native.empty(*x.shape)
        native.function("rms_norm", "ii pp f p")(*x.shape, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dy, dx, dweight = dy.contiguous(), native.empty(*x.shape), native.empty(*weight.shape)
        run = native.function("rms_norm_backward", "ii pp f ppp")
        run(*x.shape, x.data_ptr(), weight.data_ptr(), ctx.eps, dy.data_ptr(), dx.data_ptr(), dweight.data_ptr())
        return dx, dweight, None

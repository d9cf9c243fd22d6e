"""Linear maps of a few rows at the speed of memory, with weights that may be narrower than what they meet.

    y = norm(x) W^T + bias + residual        norm: a layer norm, or none

``x`` and ``y`` are float32. A bfloat16 ``W`` is half as much to read: few rows (decoding) meet it widened, which is
exact; many rows (reading a prompt) are rounded to bfloat16 themselves, for a product at the speed of bfloat16.

Floor: 2 in out FLOP per row, and W read once: 4 in out bytes, or 2 in out. Reached of what memory gives: 0.9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from . import native
from .linear import fused_linear
from .packing import expect_shape

FEW = 6  # rows up to which this product is the quickest: the reading of W is all that counts
WEIGHTS = (torch.float32, torch.bfloat16)


class Norm(NamedTuple):
    """A layer norm: weight and bias [width], and epsilon."""

    weight: Tensor
    bias: Tensor | None
    eps: float


def linear_rows(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    *,
    norm: Norm | None = None,
    residual: Float[Tensor, "rows outputs"] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """Return ``norm(x) W^T + bias + residual`` in the dtype of ``x``, for few rows without a gradient natively.

    Raises:
        ShapeError: the arguments disagree.
    """
    (outputs, inputs), rows = weight.shape, len(x)
    expect_shape("x", x, (rows, inputs))
    for name, tensor, shape in (
        ("bias", bias, (outputs,)),
        ("norm.weight", norm and norm.weight, (inputs,)),
        ("norm.bias", norm and norm.bias, (inputs,)),
        ("residual", residual, (rows, outputs)),
    ):
        if tensor is not None:
            expect_shape(name, tensor, shape)
    if rows and rows <= FEW and _readable(x, bias, residual, *(norm[:2] if norm else ()), weight=weight):
        return native_rows(x, weight, bias, norm=norm, residual=residual, out=x.new_empty(rows, outputs))
    if norm is not None:
        x = F.layer_norm(x, (inputs,), norm.weight, norm.bias, norm.eps)
    if weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and x.is_cpu:
        return fused_linear(x, weight, bias, residual=residual)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def native_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Norm | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """Write ``norm(x) W^T + bias + residual`` to ``out``, which may be ``residual``; nothing is checked."""
    (outputs, inputs), rows = weight.shape, len(x)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    call = native.function("linear_rows", "ppppppp iiiii f")
    tensors = (x, weight, bias, norm_weight, norm_bias, residual, out)
    sizes = (rows, inputs, outputs, weight.dtype == torch.bfloat16, torch.get_num_threads())
    call(*map(native.pointer, tensors), *sizes, eps)
    return out


def _readable(*tensors: Tensor | None, weight: Tensor) -> bool:
    """Tell whether the native product can read these operands and nobody asks for a gradient."""
    if native.variant() is None or not native.readable(weight, WEIGHTS) or not all(map(native.readable, tensors)):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, *tensors)))

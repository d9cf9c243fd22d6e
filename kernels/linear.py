"""Linear maps: torch's own, or on a CPU the native matrix product or oneDNN's where that is quicker.

    y = x W^T + b          dx = dy W          dW = dy^T x          db = sum of dy
    fused_linear: act(x W^T + b) + residual, in one pass where no gradient is recorded

Float32 is exact float32. With ``precision="bf16"`` the operands of all three products are rounded to bfloat16, their
sums, y and the gradients stay float32, and so do the weights.

Floor: 2 in out FLOP per token, three times that with the backward. Reached by the native product, of the peak of one
Zen 4 core (110 GFLOP/s float32, 220 bfloat16), 3,200 tokens, 512 to 2,048 and 1,024 to 512: forward 0.98 and 0.96, dx
0.98 and 0.91, dW 0.91 and 0.85. oneDNN: 0.91, 0.94 and 0.82 in float32; MKL, which takes a slow path on AMD: 0.80.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, ShapeError
from . import native
from .activation import activation as apply_activation
from .backends import available_backends, check_precision, choose_backend
from .packing import expect_shape

SOME_TOKENS = 32  # up to so many a bfloat16 weight is read once and never packed
SOME_TOKENS_FLOAT32 = 24  # and a float32 one
FEW_TOKENS = 128  # fewer: packing the weights costs more than it saves


def linear(
    x: Float[Tensor, "*tokens channels"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " rows"] | None = None,
    *,
    precision: str = "float32",
    backend: str = "auto",
) -> Float[Tensor, "*tokens outputs"]:
    """Return ``x W^T + b``, whatever autocast says.

    ``precision="bf16"`` rounds the operands to bfloat16 and returns float32. Tensors of other dtypes than float32 go to
    torch. With ``backend="auto"`` fewer than 128 tokens go to oneDNN where the native product would take more: where
    there are more than 24, or gradients are recorded.

    Raises:
        ShapeError: the arguments disagree.
        ConfigError: unknown ``precision`` or ``backend``.
    """
    outputs, inputs = weight.shape
    _expect(x, weight, bias)
    check_precision(precision)
    operands = torch.bfloat16 if precision == "bf16" else x.dtype
    chosen = choose_backend("linear", backend, x.device, operands)
    tokens = x.shape[:-1].numel()
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    some = tokens <= SOME_TOKENS_FLOAT32 and precision == "float32" and not recorded
    fits = all(t is None or t.dtype == torch.float32 for t in (x, weight, bias))
    if backend not in ("auto", "torch") and not fits:
        raise ConfigError(f"The backend {backend!r} takes float32 tensors; backend='auto' finds another.")
    if backend == "auto" and chosen == "native" and tokens < FEW_TOKENS and not some:
        chosen = "onednn" if precision == "float32" and "onednn" in available_backends("linear") else "torch"
    if not fits or not tokens * inputs * outputs:
        chosen = "torch"
    if chosen == "torch":
        return _torch(x, weight, bias, precision)
    rows = x.reshape(-1, inputs)
    if chosen == "native" and some:
        return _some_rows(rows, weight, bias, None).view(*x.shape[:-1], outputs)
    y = _product(rows, weight, bias, chosen, precision)
    return y.view(*x.shape[:-1], outputs)


def fused_linear(
    x: Float[Tensor, "tokens inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " rows"] | None = None,
    *,
    activation: str | None = None,
    residual: Float[Tensor, "tokens outputs"] | None = None,
    precision: str = "float32",
) -> Float[Tensor, "tokens outputs"]:
    """Return ``act(x W^T + b) + residual``, where ``activation`` is None or ``"gelu"``.

    The native product adds, activates and adds again while its sums lie in cache; where it does not serve, or gradients
    are recorded, it is one thing after the other. ``weight`` may be bfloat16, which asks for ``precision="bf16"``.

    Raises:
        ShapeError, ConfigError: as ``linear``.
    """
    _expect(x, weight, bias)
    if residual is not None:
        expect_shape("residual", residual, (len(x), len(weight)))
    if activation not in (None, "gelu"):
        raise ConfigError(f"The activation of a linear map is None or 'gelu', not {activation!r}.")
    narrow = weight.dtype == torch.bfloat16 and x.dtype == torch.float32
    operands = torch.bfloat16 if narrow or precision == "bf16" else x.dtype
    others = [x, *(t for t in (bias, residual) if t is not None)]
    fits = all(t.dtype == torch.float32 for t in others) and (narrow or weight.dtype == torch.float32)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *others))
    served = not recorded and fits and choose_backend("linear", "auto", x.device, operands) == "native"
    paired = not narrow or (weight.shape[1] % 2 == 0 and weight.is_contiguous())
    if served and paired and weight.numel() and len(x) >= FEW_TOKENS:
        bf16 = operands == torch.bfloat16
        return _native_product(_strided(x), _strided(weight), bias, bf16, gelu=activation == "gelu", residual=residual)
    if served and paired and narrow and weight.numel() and 0 < len(x) <= SOME_TOKENS:
        y = _some_rows(x, weight, bias, residual if activation is None else None)
        if activation is None:
            return y
    elif narrow:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.bfloat16(), weight).float()
        y = y if bias is None else y + bias
    else:
        y = linear(x, weight, bias, precision=precision)
    y = y if activation is None else apply_activation(y, activation)
    return y if residual is None else y + residual


def _some_rows(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``x W^T + bias + residual`` for some rows and a ``W``, float32 or whole pairs of bfloat16, that is not packed."""
    (rows, inputs), outputs = x.shape, len(weight)
    y = native.empty(rows, outputs)
    tensors = [None if t is None else t.contiguous() for t in (x, weight, bias, residual)]
    call = native.function("linear_some", "ppppp iiii", "bfloat16" if weight.dtype == torch.bfloat16 else None)
    call(*map(native.pointer, tensors), y.data_ptr(), rows, inputs, outputs, torch.get_num_threads())
    return y


def _expect(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        got = tuple(x.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
        raise ShapeError("x, weight, bias", got, "[..., inputs], [outputs, inputs], [outputs]")


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if precision == "float32":
            return F.linear(x, weight, bias)
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y + bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, precision: str) -> Tensor:
    """``x W^T + b`` of rows, recorded only where gradients are: an autograd function costs as much as a few rows."""
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, weight, bias, backend, precision)  # type: ignore[no-untyped-call]
        return y
    return _unrecorded(x, weight, bias, backend, precision)


def _unrecorded(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, precision: str) -> Tensor:
    product = _native_product if backend == "native" else _onednn_product
    return product(_strided(x), _strided(weight), bias, precision == "bf16")


class _Linear(torch.autograd.Function):
    """The map and, through itself, its derivatives of any order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, precision: str) -> Tensor:
        return _unrecorded(x, weight, bias, backend, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.path = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            _product(dy, weight.t(), None, *ctx.path) if needs_x else None,
            _product(dy.t(), x.t(), None, *ctx.path) if needs_weight else None,
            dy.sum(0) if needs_bias else None,
            None,
            None,
        )


# torch asks for it at each call, and to find it out takes as long as a product of a few rows.
_Linear.forward.__signature__ = inspect.signature(_Linear.forward)  # type: ignore[attr-defined]


def _strided(x: Tensor) -> Tensor:
    """``x``, copied where its neighbours lie side by side in neither dimension."""
    return x if 1 in x.stride() else x.contiguous()


def _native_product(
    a: Tensor, b: Tensor, bias: Tensor | None, bf16: bool, *, gelu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """``act(a b^T + bias) + residual``; ``a`` and ``b`` may be transposed views, or bfloat16 with rows of pairs."""
    (m, k), n = a.shape, len(b)
    c, narrow = native.empty(m, n), (a.dtype == torch.bfloat16, b.dtype == torch.bfloat16)
    bias = None if bias is None else bias.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    product = native.function("matrix_product", "iii pii piii pi ppii", "bfloat16" if bf16 else None)
    product(
        *(m, n, k, a.data_ptr(), a.stride(0) >> narrow[0], a.stride(1)),
        *(b.data_ptr(), b.stride(1), b.stride(0) >> narrow[1], narrow[0] + 2 * narrow[1]),
        *(c.data_ptr(), n, native.pointer(bias), native.pointer(residual)),
        *(0 if residual is None else residual.stride(0), gelu),
    )
    return c


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None, bf16: bool) -> Tensor:
    """``a b^T + bias``; both may be transposed views."""
    if not bf16:
        c: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return c
    c = torch.ops.mkldnn._linear_pointwise(a.bfloat16(), b.bfloat16(), None, "none", [], "").float()
    return c if bias is None else c.add_(bias)

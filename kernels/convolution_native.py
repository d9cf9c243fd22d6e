"""The causal convolution's native backend, and its place in autograd. ``native/convolution.h`` does the work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native


class Options(NamedTuple):
    """What is no tensor of numbers.

    Attributes:
        edges: sequence boundaries, int64 on the CPU, contiguous.
        return_state: whether the last inputs are wanted.
        reverse: each sequence runs from its last token to its first.
        silu: y * sigmoid(y) follows.
    """

    edges: Tensor
    return_state: bool
    reverse: bool
    silu: bool


def convolution_native(
    x: Float[Tensor, "tokens channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None,
    state: Float[Tensor, "sequences past channels"] | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Return y and, when asked, the last inputs; every tensor is float32 on the CPU."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, state)):
        outputs: tuple[Tensor, Tensor | None] = _Convolution.apply(options, x, weight, bias, state)  # type: ignore[no-untyped-call]
        return outputs
    return _forward(options, *_laid_out(x, weight, bias, state))


def _laid_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Copy what does not lie as C reads it; rows of x, as of one half of a projection, may lie apart."""
    return (
        x if x.stride(1) == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if state is None else state.contiguous(),
    )


def _forward(
    options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    edges, return_state, reverse, silu = options
    channels, taps = weight.shape
    y = native.empty(*x.shape)
    last = native.empty(len(edges) - 1, taps - 1, channels) if return_state else None
    native.function("conv_forward", "pppp p pp iiiiii")(
        *map(native.pointer, (x, weight, bias, state, edges, y, last)),
        *(x.stride(0), len(edges) - 1, channels, taps, reverse, silu),
    )
    return y, last


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        inputs = _laid_out(*tensors)
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _forward(options, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, state = ctx.saved_tensors
        edges, _, reverse, silu = ctx.options
        channels, taps = weight.shape
        dy, d_last = (None if d is None else d.contiguous() for d in (dy, d_last))
        dx, d_state = native.empty(*x.shape), None if state is None else native.empty(*state.shape)
        d_weight = native.empty(taps + 1, channels)
        native.function("conv_backward", "pppp p pp ppp iiiiii")(
            x.data_ptr(),
            weight.data_ptr(),
            native.pointer(bias),
            native.pointer(state),
            edges.data_ptr(),
            native.pointer(dy),
            native.pointer(d_last),
            dx.data_ptr(),
            native.pointer(d_state),
            d_weight.data_ptr(),
            x.stride(0),
            len(edges) - 1,
            channels,
            taps,
            reverse,
            silu,
        )
        return None, dx, d_weight[:taps].T, None if bias is None else d_weight[taps], d_state

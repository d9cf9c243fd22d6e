"""The native attention kernel as a torch function; the C, and how it works, is in ``native/attention*.h``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native


class Sizes(NamedTuple):
    """Of each sequence: its queries, the row of its first key, its keys, and how many of these are its prefix."""

    lengths: NDArray[np.int64]
    key_starts: NDArray[np.int64]
    key_lengths: NDArray[np.int64]
    prefixes: NDArray[np.int64]


def native_attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "keys kv_heads dim"],
    v: Float[Tensor, "keys kv_heads v_dim"],
    sizes: Sizes,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    precision: str,
) -> Float[Tensor, "tokens heads v_dim"]:
    """Attend; arguments as ``attention`` has checked them.

    Pairs of bfloat16 are multiplied where no gradient is recorded, heads are even and there is more than decoding.
    """
    call, inputs = _Call.of(sizes, causal, window, scale), [x.float() for x in (q, k, v)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    paired = precision == "bf16" and native.has_bfloat16() and not recorded and q.shape[2] % 2 == 0
    if not paired or sizes.lengths.max() == 1:
        exact: Tensor = _Attention.apply(*inputs, call)  # type: ignore[no-untyped-call]
        return exact.to(q.dtype)
    y = _in_pairs(inputs[0], inputs[1], inputs[2], call)
    alone = sizes.lengths == 1  # they get what they get in a batch of their own
    if alone.any():
        rows = torch.from_numpy(call.edges[0][:-1][alone])
        call = _Call.of(Sizes(*(part[alone] for part in sizes)), causal, window, scale)
        y[rows] = _Attention.apply(inputs[0][rows], *inputs[1:], call)  # type: ignore[no-untyped-call]
    return y.to(q.dtype)


class _Call(NamedTuple):
    """What is no tensor; ``edges`` are the boundaries of the queries, then ``Sizes`` of keys and prefixes."""

    edges: tuple[NDArray[np.int64], ...]
    causal: bool
    window: int | None
    scale: float

    @classmethod
    def of(cls, sizes: Sizes, causal: bool, window: int | None, scale: float) -> _Call:
        edges = np.concatenate(([0], np.cumsum(sizes.lengths)))
        return cls((edges, *sizes[1:]), causal, window, scale)


def _layout(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> NDArray[np.int64]:
    """``Attention`` of ``native/attention_blocks.h``."""
    (tokens, heads, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[2]
    all_seen = tokens + len(k) + 1
    seen = all_seen if call.window is None else min(call.window, all_seen)
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    return np.array([len(call.edges[0]) - 1, heads, kv_heads, dim, v_dim, call.causal, seen, *strides], np.int64)


def _along(x: Tensor) -> Tensor:
    """``x``, copied where the channels of a head do not lie side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _in_pairs(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
    q, k, v = map(_along, (q, k, v))
    y, layout = native.empty(*q.shape[:2], v.shape[2]), _layout(q, k, v, call)
    native.function("attention_forward", "ppp pppp p f p", "bfloat16")(
        *(x.data_ptr() for x in (q, k, v)),
        *(array.ctypes.data for array in (*call.edges, layout)),
        call.scale,
        y.data_ptr(),
    )
    return y


class _Attention(torch.autograd.Function):
    """Keeps the inputs, the output, and two numbers per row of the scores: their maximum and 1 / the sum of exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        q, k, v = map(_along, (q, k, v))
        (tokens, heads, _), v_dim = q.shape, v.shape[2]
        layout = _layout(q, k, v, call)
        y, stats = native.empty(tokens, heads, v_dim), native.empty(2, heads, tokens)
        native.function("attention_forward", "ppp pppp p f pp")(
            *(x.data_ptr() for x in (q, k, v)),
            *(array.ctypes.data for array in (*call.edges, layout)),
            call.scale,
            y.data_ptr(),
            stats.data_ptr(),
        )
        ctx.save_for_backward(q, k, v, y, stats)
        ctx.call, ctx.layout = call, layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, stats = ctx.saved_tensors
        dq, dk, dv = (native.empty(*x.shape) for x in (q, k, v))
        if ctx.call.edges[2].sum() < len(k):  # rows without a key
            dk, dv = dk.zero_(), dv.zero_()
        native.function("attention_backward", "ppp pppp p f ppp ppp")(
            *(x.data_ptr() for x in (q, k, v)),
            *(array.ctypes.data for array in (*ctx.call.edges, ctx.layout)),
            ctx.call.scale,
            *(x.data_ptr() for x in (y, stats, dy.contiguous(), dq, dk, dv)),
        )
        return dq, dk, dv, None

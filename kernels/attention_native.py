"""The native attention kernel as a torch function; the C, and how it works, is in ``native/attention.h``."""

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
) -> Float[Tensor, "tokens heads v_dim"]:
    """Attend in float32; arguments as ``attention`` has checked them."""
    edges = np.concatenate(([0], np.cumsum(sizes.lengths)))
    y: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        *(x.float() for x in (q, k, v)), _Call((edges, *sizes[1:]), causal, window, scale)
    )
    return y.to(q.dtype)


class _Call(NamedTuple):
    """What is no tensor; ``edges`` are the boundaries of the queries, then ``Sizes`` of keys and prefixes."""

    edges: tuple[NDArray[np.int64], ...]
    causal: bool
    window: int | None
    scale: float


class _Attention(torch.autograd.Function):
    """Keeps the inputs, the output, and two numbers per row of the scores: their maximum and 1 / the sum of exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        (tokens, heads, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[2]
        all_seen = tokens + len(k) + 1
        seen = all_seen if call.window is None else min(call.window, all_seen)
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        layout = np.array([len(call.edges[0]) - 1, heads, kv_heads, dim, v_dim, call.causal, seen, *strides], np.int64)
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

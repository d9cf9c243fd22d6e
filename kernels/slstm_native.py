"""The sLSTM's native backend: what C wants to see, and its place in autograd. ``native/slstm.h`` does the work."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native

SAVED = 6  # numbers per token and unit that the backward needs, as in slstm.h
NONE: tuple[None, ...] = (None,) * 4  # a state that is not there


def slstm_native(
    gates: Float[Tensor, "tokens 4 heads head_dim"],
    recurrent: Float[Tensor, "4 heads head_dim head_dim"],
    edges: Int[Tensor, " boundaries"],
    state: tuple[Tensor, ...] | None,
    *,
    return_state: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Return y and, when asked, the four parts of the last state; everything float32, ``edges`` int64 on the CPU."""
    inputs = (gates, recurrent, *(state or ()))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        outputs: tuple[Tensor, ...] = _SLSTM.apply(edges, reverse, return_state, *inputs)  # type: ignore[no-untyped-call]
        return outputs
    y, last, _ = _forward(edges, reverse, [x.contiguous() for x in inputs], return_state=return_state, save=False)
    return (y, *last)


def _forward(
    edges: Tensor, reverse: bool, inputs: list[Tensor], *, return_state: bool, save: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    gates, recurrent, *state = inputs
    tokens, _, heads, head_dim = gates.shape
    sequences = len(edges) - 1
    y = native.empty(tokens, heads, head_dim)
    last = [native.empty(sequences, heads, head_dim) for _ in range(4)] if return_state else []
    saved = (
        native.empty(tokens * heads * SAVED * (-(-head_dim // native.MOST_LANES) * native.MOST_LANES)) if save else None
    )
    native.function("slstm_forward", "ppp pppp p pppp p iiii")(
        *map(native.pointer, (gates, recurrent, edges, *(state or NONE), y, *(last or NONE), saved)),
        *(sequences, heads, head_dim, reverse),
    )
    return y, last, saved


class _SLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edges: Tensor, reverse: bool, return_state: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(x.contiguous() for x in inputs)
        y, last, saved = _forward(edges, reverse, list(inputs), return_state=return_state, save=True)
        _, recurrent, *state = inputs
        ctx.save_for_backward(edges, recurrent, y, saved, *state, *last[1:3])
        ctx.reverse, ctx.with_state = reverse, bool(state)
        ctx.set_materialize_grads(False)
        return (y, *last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        edges, recurrent, y, saved, *states = ctx.saved_tensors
        state, last = (states[:4], states[4:]) if ctx.with_state else ([], states)
        tokens, heads, head_dim = y.shape
        upstream = [None if x is None else x.contiguous() for x in (dy, *(d_last or NONE))]
        d_gates = native.empty(tokens, 4, heads, head_dim)
        d_recurrent = native.empty(*recurrent.shape) if ctx.needs_input_grad[4] else None
        d_state = [native.empty(*part.shape) for part in state]
        native.function("slstm_backward", "pp ppp p pp p p pppp p p pppp iiii")(
            *map(native.pointer, (recurrent, edges, *(state or NONE)[:3], y, *(last or NONE)[:2], saved)),
            *map(native.pointer, (*upstream, d_gates, d_recurrent, *(d_state or NONE))),
            *(len(edges) - 1, heads, head_dim, ctx.reverse),
        )
        return None, None, None, d_gates, d_recurrent, *d_state

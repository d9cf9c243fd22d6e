"""What every packed kernel needs: checked boundaries, running order, and moves between layouts.

Kernels that walk along time work in *rounds*: round ``r`` holds the ``r``-th step (or chunk) of every sequence that has
one. Sequences stand longest first, so a round is a prefix of the one before it, its rows are one contiguous slice, and
a loop over rounds needs no gather, no mask and no padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ShapeError


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ShapeError`` unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(name, tuple(tensor.shape), shape)


def sequence_lengths(
    cu_seqlens: Int[Tensor, " boundaries"] | None, tokens: int, name: str = "cu_seqlens"
) -> NDArray[np.int64]:
    """Return the length of each sequence; without ``cu_seqlens`` all tokens are one sequence.

    Raises:
        ShapeError: ``cu_seqlens`` does not run from 0 to ``tokens`` without falling.
    """
    if cu_seqlens is None:
        return np.array([tokens], dtype=np.int64)
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ShapeError(name, tuple(cu_seqlens.shape), "[sequences + 1]")
    edges = cu_seqlens.detach().cpu().numpy().astype(np.int64)
    lengths = np.diff(edges)
    if edges[0] != 0 or edges[-1] != tokens or (lengths < 0).any():
        raise ShapeError(name, f"boundaries {edges[:3]}..{edges[-1]}", f"a rise from 0 to {tokens} tokens")
    return lengths


def boundaries(cu_seqlens: Int[Tensor, " boundaries"] | None, tokens: int) -> Int[Tensor, " boundaries"]:
    """Return ``cu_seqlens`` as native kernels read it: int64, contiguous, on the CPU."""
    if cu_seqlens is None:
        return torch.tensor([0, tokens])
    return cu_seqlens.detach().to("cpu", torch.int64).contiguous()


def running_positions(lengths: NDArray[np.int64], reverse: bool) -> NDArray[np.int64]:
    """Return how many tokens of its own sequence each token has behind it, in running direction."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return np.repeat(lengths - 1, lengths) - positions if reverse else positions


class Rounds(NamedTuple):
    """Rows of (sequence, unit) pairs, round after round.

    Attributes:
        order: the sequences, most units first, [sequences].
        rank: place of each sequence in ``order``, [sequences].
        counts: how many sequences take part in each round, falling.
        starts: the first row of each round.
    """

    order: NDArray[np.int64]
    rank: NDArray[np.int64]
    counts: list[int]
    starts: NDArray[np.int64]


def rounds(units: NDArray[np.int64]) -> Rounds:
    """Lay sequences of so many units (tokens or chunks) out in rounds."""
    order = np.argsort(-units, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ended = np.cumsum(np.bincount(units)) if len(units) else np.zeros(0, np.int64)
    counts = len(units) - ended[:-1]
    return Rounds(order, rank, counts.tolist(), np.cumsum(counts) - counts)


def round_rows(lengths: NDArray[np.int64], plan: Rounds, reverse: bool) -> NDArray[np.int64]:
    """Return the row of each token where every unit is one token."""
    if not lengths.sum():
        return np.zeros(0, np.int64)
    return plan.starts[running_positions(lengths, reverse)] + np.repeat(plan.rank, lengths)


class _Spread(torch.autograd.Function):
    """Rows to their slots; the gradient comes back by a gather, not by a scattered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, slots: int, fill: float) -> Tensor:
        ctx.save_for_backward(slot)
        return x.new_full((slots, *x.shape[1:]), fill).index_copy_(0, slot, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        return collect(grad, slot), None, None, None


class _Collect(torch.autograd.Function):
    """Slots to rows, the adjoint of ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.slots = len(x)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        return spread(grad, slot, ctx.slots), None


def spread(
    x: Shaped[Tensor, "rows ..."], slot: Int[Tensor, " rows"], slots: int, fill: float = 0.0
) -> Shaped[Tensor, "slots ..."]:
    """Write row ``r`` of ``x`` to ``slot[r]`` of a new tensor of ``slots`` rows; the others hold ``fill``.

    No two rows may share a slot.
    """
    out: Tensor = _Spread.apply(x, slot, slots, fill)  # type: ignore[no-untyped-call]
    return out


def collect(x: Shaped[Tensor, "slots ..."], slot: Int[Tensor, " rows"]) -> Shaped[Tensor, "rows ..."]:
    """Read ``x[slot]`` back; no slot may be read twice."""
    out: Tensor = _Collect.apply(x, slot)  # type: ignore[no-untyped-call]
    return out


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gates, normalisers and states for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32

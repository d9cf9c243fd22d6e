"""sLSTM: the scalar-memory LSTM of xLSTM, on packed sequences, with state, in both directions.

    i~, f~, z~, o~ = gates_t + R y_{t-1}                      (R block-diagonal: a matrix per gate and head)
    l = logsigmoid(f~) + m_{t-1}      m_t = i~ where n_{t-1} = 0, else max(i~, l)
    i = exp(i~ - m_t)                 f = min(1, exp(l - m_t))
    c_t = f c_{t-1} + i tanh(z~)      n_t = f n_{t-1} + i      y_t = sigmoid(o~) c_t / n_t

The state starts at zero. There is no epsilon, so y does not depend on m and the gradient is the exact one.

Source: Beck et al. 2024, xLSTM (arXiv:2405.04517), equations 8-18.
Floor per token and head: 8 head_dim^2 FLOP forward, 24 head_dim^2 with the backward, one step after the other, and
20 head_dim bytes in float32 (read four gates, write y); R stays in cache. The native backend on two Zen 4 cores (220
GFLOP/s), best seen, 8 sequences of 1,024, 4 heads of 64: forward 115 GFLOP/s (880,000 tokens/s), half of the floor:
the gates' functions take a third as long as the products; with the backward 60 GFLOP/s (150,000 tokens/s), a quarter,
which also writes and reads back 6 numbers per token and unit and writes 4 gradients.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from .backends import choose_backend
from .packing import boundaries, collect, expect_shape, gate_dtype, round_rows, rounds, sequence_lengths, spread
from .slstm_native import slstm_native


class SLSTMState(NamedTuple):
    """What an sLSTM remembers; each [sequences, heads, head_dim].

    Attributes:
        y: the last output, which the recurrence reads.
        c: cell, times exp(-m).
        n: normaliser, times exp(-m).
        m: stabiliser.
    """

    y: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


@overload
def slstm(
    gates: Float[Tensor, "tokens 4 heads head_dim"],
    recurrent: Float[Tensor, "4 heads head_dim head_dim"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: SLSTMState | None = None,
    return_state: Literal[False] = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "tokens heads head_dim"]: ...


@overload
def slstm(
    gates: Float[Tensor, "tokens 4 heads head_dim"],
    recurrent: Float[Tensor, "4 heads head_dim head_dim"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: SLSTMState | None = None,
    return_state: Literal[True],
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "tokens heads head_dim"], SLSTMState]: ...


def slstm(
    gates: Float[Tensor, "tokens 4 heads head_dim"],
    recurrent: Float[Tensor, "4 heads head_dim head_dim"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "tokens heads head_dim"] | tuple[Float[Tensor, "tokens heads head_dim"], SLSTMState]:
    """Run an sLSTM over packed sequences; with ``return_state`` also return each sequence's last state.

    ``gates`` are pre-activations W x + b in the order input, forget, cell, output; ``recurrent`` is indexed
    [gate, head, out, in]. Everything runs in float32 (float64 for float64 input); y has the dtype of ``gates``. With
    ``reverse`` each sequence runs from its last token to its first. A sequence without tokens hands its state on.

    Raises:
        ShapeError: the arguments disagree, or ``cu_seqlens`` does not end at ``tokens``.
        ConfigError: unknown ``backend``.
    """
    tokens, _, heads, head_dim = gates.shape
    expect_shape("gates", gates, (tokens, 4, heads, head_dim))
    expect_shape("recurrent", recurrent, (4, heads, head_dim, head_dim))
    lengths = sequence_lengths(cu_seqlens, tokens)
    if initial_state is not None:
        for name, part in zip(SLSTMState._fields, initial_state, strict=True):
            expect_shape(f"initial_state.{name}", part, (len(lengths), heads, head_dim))
    chosen = choose_backend("slstm", backend, gates.device, gates.dtype)

    dtype = gate_dtype(gates.dtype)
    state = None if initial_state is None else tuple(part.to(dtype) for part in initial_state)
    with torch.autocast(gates.device.type, enabled=False):
        if chosen == "native":
            edges = boundaries(cu_seqlens, tokens)
            y, *last = slstm_native(
                gates.to(dtype), recurrent.to(dtype), edges, state, return_state=return_state, reverse=reverse
            )
        elif chosen == "triton" and tokens:
            from . import triton

            y, last = triton.slstm(gates.to(dtype), recurrent.to(dtype), state, lengths=lengths, reverse=reverse)
        else:
            y, last = _torch(gates.to(dtype), recurrent.to(dtype), lengths, state, reverse)
    y = y.to(gates.dtype)
    return (y, SLSTMState(*last)) if return_state else y


def _torch(
    gates: Tensor, recurrent: Tensor, lengths: NDArray[np.int64], initial: tuple[Tensor, ...] | None, reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run everywhere: a loop over rounds, each some torch calls."""
    tokens, _, heads, head_dim = gates.shape
    plan = rounds(lengths)
    row = torch.from_numpy(round_rows(lengths, plan, reverse)).to(gates.device)
    order, rank = (torch.from_numpy(index).to(gates.device) for index in (plan.order, plan.rank))
    if initial is None:
        state = [gates.new_zeros(len(lengths), heads, head_dim) for _ in SLSTMState._fields]
    else:
        state = [part.index_select(0, order) for part in initial]
    y_by_round, last = _loop(spread(gates, row, tokens), recurrent, state, plan.counts)
    return collect(y_by_round, row), [part.index_select(0, rank) for part in last]


def _loop(gates: Tensor, recurrent: Tensor, state: list[Tensor], counts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Walk the rounds; ``gates`` [tokens, 4, heads, head_dim] and ``state`` in their order."""
    heads, head_dim = gates.shape[2:]
    by_head = gates.permute(2, 0, 1, 3).reshape(heads, -1, 4 * head_dim)
    mixing = recurrent.permute(1, 3, 0, 2).reshape(heads, head_dim, 4 * head_dim)  # [head, in, gate and out]
    y, c, n, m = (part.transpose(0, 1) for part in state)
    outputs, finished = [], []
    for step in torch.split(by_head, counts, 1) if counts else ():  # its backward is one join, a slice's a full copy
        count = step.shape[1]
        if count < y.shape[1]:
            finished.append(tuple(part[:, count:] for part in (y, c, n, m)))
            y, c, n, m = (part[:, :count] for part in (y, c, n, m))
        raw = torch.baddbmm(step, y, mixing)
        i_raw, f_raw, z_raw, o_raw = raw.chunk(4, -1)
        kept = logsigmoid(f_raw) + m
        m = torch.where(n == 0, i_raw, torch.maximum(i_raw, kept))
        write = torch.exp(i_raw - m)
        keep = torch.exp((kept - m).clamp(max=0.0))
        c = keep * c + write * torch.tanh(z_raw)
        n = keep * n + write
        y = torch.sigmoid(o_raw) * c / n
        outputs.append(y)
    finished.append((y, c, n, m))
    last = [torch.cat(parts, 1).transpose(0, 1) for parts in zip(*finished[::-1], strict=True)]
    joined = torch.cat(outputs, 1) if outputs else by_head[..., :head_dim]
    return joined.transpose(0, 1), last

"""The sLSTM on a GPU: one program per head and 16 sequences, with the loop over time inside.

The formulas stand in ``kernels/slstm.py``. c, n and m of every token are kept for the backward; its pre-activations are
computed again, and the gradient of the recurrent matrices is one product, both over all tokens at once.

Made for heads of 64 and less, whose four matrices are at most 64 KB and stay on the processor. Wider heads pass y
through memory in parts of 64, and read R from the second-level cache in every step. Not timed yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import slstm_kernels as kernels

_ROWS = 16  # sequences in a program: the smallest matrix product there is


class _Layout(NamedTuple):
    order: Tensor  # the sequences, longest first
    firsts: Tensor  # the token that each starts with
    lengths: Tensor
    started: Tensor  # the sequences that have tokens
    step: int  # from a token to the next, 1 or -1


def slstm(
    gates: Tensor, recurrent: Tensor, state: tuple[Tensor, ...] | None, *, lengths: NDArray[np.int64], reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return y and the last y, c, n and m, all float32, with the shapes of ``kernels/slstm.py``; at least one token."""
    starts = np.cumsum(lengths) - lengths
    firsts = starts + lengths - 1 if reverse else starts
    tables = np.argsort(-lengths, kind="stable"), firsts, lengths, np.flatnonzero(lengths)
    order, first, length, started = (torch.from_numpy(table).to(gates.device) for table in tables)
    layout = _Layout(order, first, length, started, -1 if reverse else 1)
    inputs = [x.contiguous() for x in (gates, recurrent, *(state or ()))]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.cuda.device(gates.device if gates.is_cuda else -1):
        y, *last = _SLSTM.apply(*inputs, *([] if state else [None] * 4), layout, save)  # type: ignore[no-untyped-call]
    return y, last


class _SLSTM(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        gates: Tensor,
        recurrent: Tensor,
        y_first: Tensor | None,
        c_first: Tensor | None,
        n_first: Tensor | None,
        m_first: Tensor | None,
        layout: _Layout,
        save: bool,
    ) -> tuple[Tensor, ...]:
        tokens, _, heads, head_dim = gates.shape
        sequences = len(layout.order)
        y = gates.new_empty(tokens, heads, head_dim)
        c, n, m = (gates.new_empty(tokens if save else 0, heads, head_dim) for _ in range(3))
        last = [gates.new_empty(sequences, heads, head_dim) for _ in range(4)]
        kernels.forward_kernel[(triton.cdiv(sequences, _ROWS) * heads,)](
            gates, recurrent, *layout[:3], y_first, c_first, n_first, m_first, y, c, n, m, *last, sequences, heads,
            STEP=layout.step, HAS_FIRST=y_first is not None, SAVE=save, **_blocks(head_dim),
        )  # fmt: skip
        ctx.save_for_backward(gates, recurrent, y_first, c_first, n_first, m_first, y, c, n, m, last[1], last[2])
        ctx.layout = layout
        return y, *last

    @staticmethod
    @once_differentiable
    def backward(  # noqa: PLR0917
        ctx: Any, dy: Tensor, dy_last: Tensor, dc_last: Tensor, dn_last: Tensor, dm_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        gates, recurrent, y_first, c_first, n_first, m_first, y, c, n, m, c_last, n_last = ctx.saved_tensors
        layout = ctx.layout
        tokens, _, heads, head_dim = gates.shape
        before = y.roll(layout.step, 0)
        before[layout.firsts[layout.started]] = 0.0 if y_first is None else y_first[layout.started]
        by_head = before.transpose(0, 1)  # [heads, tokens, in]
        mixed = torch.bmm(by_head, recurrent.permute(1, 3, 0, 2).reshape(heads, head_dim, -1))
        raw = gates + mixed.view(heads, tokens, 4, head_dim).permute(1, 2, 0, 3)
        last = dy_last, dc_last, dn_last, dm_last - c_last * dc_last - n_last * dn_last
        draw = torch.empty_like(gates)
        dfirst = [None if y_first is None else torch.empty_like(y_first) for _ in range(4)]
        kernels.backward_kernel[(triton.cdiv(len(layout.order), _ROWS) * heads,)](
            raw, recurrent, *layout[:3], c_first, n_first, m_first, c, n, m, dy.contiguous(),
            *(x.contiguous() for x in last), draw, *dfirst, len(layout.order), heads, STEP=layout.step,
            HAS_FIRST=y_first is not None, **_blocks(head_dim),
        )  # fmt: skip
        drecurrent = torch.bmm(draw.permute(2, 1, 3, 0).reshape(heads, -1, tokens), by_head)
        return draw, drecurrent.view(heads, 4, head_dim, head_dim).transpose(0, 1), *dfirst, None, None


def _blocks(head_dim: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(head_dim))
    return {"DIM": head_dim, "BLOCK": block, "PART": min(block, 64), "ROWS": _ROWS, "num_warps": 8, "num_stages": 1}

"""The mLSTM on a GPU: two levels, as TFLA (Beck et al. 2025, arXiv:2503.14376), with the exact backward.

A recurrent kernel writes the state before every chunk; then all chunks run in parallel, each in blocks of queries that
walk over blocks of keys, so that a chunk can be longer than a block and fewer states go through memory. The formulas
stand in ``kernels/mlstm_chunkwise.py``. Two things are done otherwise: sums over a row or column of X = dP * P are
taken as q . dq and k . dk, and the gradient of the last m is carried to the one input gate that made it.

The matrix products run in bfloat16 for bfloat16 input, in TF32 for float16 (whose range the backward leaves) and in
full float32 for float32, each summed in float32. C is kept in the dtype of the products between the kernels; it is
float32 while it is carried, and where it is handed out.

Floor per token and head in bfloat16, forward: 2 L (qk_dim + v_dim) / 2 + 4 qk_dim v_dim FLOP at chunk length L, and
2 (2 qk_dim + 2 v_dim) + 4 qk_dim v_dim / L bytes; the backward has 2.5 times the FLOP. Not timed yet.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import mlstm_kernels as kernels

State = tuple[Tensor, Tensor, Tensor]

_SHORT, _LONG = 64, 256  # the shortest and the longest chunk


class _Layout(NamedTuple):
    """Chunks aligned to sequences, and the constants that the kernels are compiled for."""

    chunks: Tensor  # first token, length, its position, sequence, [chunks, 4]
    edges: Tensor  # first chunk of each sequence, and the end, [sequences + 1]
    ends: Tensor  # slot of each sequence's last state
    length: int  # of the longest chunk, rounded up to a power of two
    step: int  # from a token to the next, 1 or -1
    has_first: bool  # an initial state is given
    has_last: bool  # the last state is asked for
    carries: bool  # some chunk starts with a state

    @property
    def sequences(self) -> int:
        return len(self.ends)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    *,
    lengths: NDArray[np.int64],
    state: State | None,
    return_state: bool,
    reverse: bool,
) -> tuple[Tensor, State | None]:
    """Return ``h``, and with ``return_state`` C, n and m of every sequence.

    q, k [tokens, heads, qk_dim] and v [tokens, heads, v_dim] in their own dtypes, log gates [tokens, heads] and state
    in float32; at least one token.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    exact = "tf32" if dtype == torch.float16 else "ieee"
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    inputs = [x.to(work).contiguous() for x in (q, k, v)] + [x.contiguous() for x in (log_input, log_forget)]
    first: list[Any] = [] if state is None else [part.contiguous() for part in state]
    with torch.cuda.device(q.device if q.is_cuda else -1):
        if np.all(lengths == 1) and not (torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *first))):
            h, last = _step(*inputs, state=first)
            return h.to(v.dtype), last
        layout = _layout(lengths, q, v, reverse=reverse, has_first=state is not None, has_last=return_state)
        h, *parts = _Chunkwise.apply(*inputs, *(first or [None] * 3), layout, exact)  # type: ignore[no-untyped-call]
        C, n, m = parts
    return h.to(v.dtype), (C, n, m) if return_state else None


def _layout(
    lengths: NDArray[np.int64], q: Tensor, v: Tensor, *, reverse: bool, has_first: bool, has_last: bool
) -> _Layout:
    """Cut the sequences into chunks.

    A chunk of length L costs L (qk_dim + v_dim) / 2 products per token and moves 4 qk_dim v_dim / L bytes of state.
    """
    longest = int(lengths.max())
    limit = _LONG if q.shape[-1] * v.shape[-1] >= 128 * 128 else _SHORT * 2
    length = min(limit, max(16, triton.next_power_of_2(longest)))
    counts = -(-lengths // length)
    edges = np.concatenate([[0], np.cumsum(counts)])
    sequence = np.repeat(np.arange(len(lengths)), counts)
    position = (np.arange(len(sequence)) - edges[sequence]) * length
    starts = np.cumsum(lengths) - lengths
    first = starts[sequence] + (lengths[sequence] - 1 - position if reverse else position)
    size = np.minimum(lengths[sequence] - position, length)
    chunks = np.stack([first, size, position, sequence], 1)
    table, cuts, ends = (torch.from_numpy(x).to(q.device) for x in (chunks, edges, edges[1:] + np.arange(len(lengths))))
    return _Layout(
        chunks=table,
        edges=cuts,
        ends=ends,
        length=length,
        step=-1 if reverse else 1,
        has_first=has_first,
        has_last=has_last,
        carries=has_first or longest > length,
    )


class _Blocks(NamedTuple):
    """Sizes of a program's blocks: of the dimensions of keys and of values, and of tokens."""

    k: int
    v: int
    tokens: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 8 if max(self.k, self.v) > 64 else 4, "num_stages": 2}


def _blocks(q: Tensor, v: Tensor, layout: _Layout, widest: int) -> _Blocks:
    """Return blocks of at most 64 tokens and ``widest`` dimensions, half of both in float32.

    With 128 dimensions that is 130 KB of shared memory on Hopper and 90 KB on others, as the compiler reports.
    """
    halves = 2 if q.dtype == torch.float32 else 1
    k, v_block = (max(16, min(widest // halves, triton.next_power_of_2(x.shape[-1]))) for x in (q, v))
    return _Blocks(k, v_block, min(layout.length, 64 // halves))


class _Chunkwise(torch.autograd.Function):
    """q, k, v, the log gates, the initial state or three Nones, and what the launch needs."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_input: Tensor,
        log_forget: Tensor,
        C_first: Tensor | None,
        n_first: Tensor | None,
        m_first: Tensor | None,
        layout: _Layout,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (tokens, heads, qk_dim), v_dim = q.shape, v.shape[-1]
        chunks, slots = len(layout.chunks), len(layout.chunks) + layout.sequences
        empty = log_input.new_empty  # in float32
        b, u, peak = (empty(heads, tokens, dtype=torch.float64) for _ in range(3))
        top = empty(chunks, heads, dtype=torch.int32)
        kernels.gates_kernel[(chunks * heads,)](
            log_input, log_forget, layout.chunks, b, u, peak, top, tokens, heads, STEP=layout.step, LENGTH=layout.length
        )
        flows = layout.carries or layout.has_last
        C = q.new_empty(slots if flows else 0, heads, qk_dim, v_dim)
        n, m = empty(slots if flows else 0, heads, qk_dim), log_input.new_zeros(slots, heads)
        C_last = empty(layout.sequences if layout.has_last else 0, heads, qk_dim, v_dim)
        source = empty(layout.sequences, heads, dtype=torch.int64)
        if flows:
            size = _blocks(q, v, layout, 64)
            blocks = triton.cdiv(qk_dim, size.k) * triton.cdiv(v_dim, size.v)
            kernels.carry_kernel[(layout.sequences * heads * blocks,)](
                k, v, b, u, peak, top, layout.chunks, layout.edges, C_first, n_first, m_first, C, n, m, C_last, source,
                tokens, heads, QK=qk_dim, V=v_dim, BK=size.k, BV=size.v, BJ=size.tokens, STEP=layout.step,
                HAS_FIRST=layout.has_first, HAS_LAST=layout.has_last, PRECISION=precision, **size.options,
            )  # fmt: skip
        h, inverse, slope = torch.empty_like(v), empty(heads, tokens), empty(heads, tokens)
        size = _blocks(q, v, layout, 128)
        blocks = layout.length // size.tokens
        kernels.output_kernel[(chunks * heads * blocks * triton.cdiv(v_dim, size.v),)](
            q, k, v, b, u, peak, layout.chunks, C, n, m, h, inverse, slope, tokens, heads, 0.5 * math.log(qk_dim),
            QK=qk_dim, V=v_dim, BK=size.k, BV=size.v, BI=size.tokens, BJ=size.tokens, BLOCKS=blocks, STEP=layout.step,
            CARRIES=layout.carries, PRECISION=precision, **size.options,
        )  # fmt: skip
        n_last, m_last = (x.index_select(0, layout.ends) if layout.has_last else x[:0] for x in (n, m))
        ctx.save_for_backward(
            q, k, v, b, u, peak, C, n, m, h, inverse, slope, source, C_first, n_first, C_last, n_last
        )  # fmt: skip
        ctx.layout, ctx.precision = layout, precision
        return h, C_last, n_last, m_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dC_last: Tensor, dn_last: Tensor, dm_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, u, peak, C, n, m, h, inverse, slope, source, C_first, n_first, C_last, n_last = ctx.saved_tensors
        layout, precision = ctx.layout, ctx.precision
        (tokens, heads, qk_dim), v_dim = q.shape, v.shape[-1]
        chunks, half_log_qk = len(layout.chunks), 0.5 * math.log(qk_dim)
        flows = layout.carries or layout.has_last
        empty = inverse.new_empty
        dh, dC_last, dn_last = dh.contiguous(), dC_last.contiguous(), dn_last.contiguous()
        dden = torch.empty_like(inverse)
        rows, v_block = tokens * heads, min(128, triton.next_power_of_2(v_dim))
        kernels.denominator_kernel[(triton.cdiv(rows, 32),)](
            h, dh, inverse, slope, dden, rows, tokens, heads, V=v_dim, BV=v_block, ROWS=32
        )
        size = _blocks(q, v, layout, 64)
        blocks = triton.cdiv(qk_dim, size.k) * triton.cdiv(v_dim, size.v)
        dC, dn = torch.empty_like(C), torch.empty_like(n)
        dC_first, dn_first = (None if x is None else torch.empty_like(x) for x in (C_first, n_first))
        flow = empty(chunks if flows else 0, heads, blocks)
        if flows:
            kernels.carry_back_kernel[(layout.sequences * heads * blocks,)](
                q, dh, b, peak, inverse, dden, layout.chunks, layout.edges, C, n, m, dC_last, dn_last, dC, dn, dC_first,
                dn_first, flow, tokens, heads, half_log_qk, QK=qk_dim, V=v_dim, BK=size.k, BV=size.v, BI=size.tokens,
                STEP=layout.step, CARRIES=layout.carries, HAS_FIRST=layout.has_first, HAS_LAST=layout.has_last,
                PRECISION=precision, **size.options,
            )  # fmt: skip
        dm = None
        if layout.has_last:
            dm = dm_last - (C_last * dC_last).sum((-2, -1)) - (n_last * dn_last).sum(-1)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        size = _blocks(q, v, layout, 128)
        shares, blocks_v = triton.cdiv(qk_dim, size.k), triton.cdiv(v_dim, size.v)
        drow, du = (empty(shares, heads, tokens) for _ in range(2))
        pairs = chunks * heads * (layout.length // size.tokens)
        sizes: dict[str, Any] = {
            "QK": qk_dim, "V": v_dim, "BK": size.k, "BV": size.v, "BI": size.tokens, "BJ": size.tokens,
            "BLOCKS": layout.length // size.tokens, "STEP": layout.step, "PRECISION": precision, **size.options,
        }  # fmt: skip
        kernels.query_gradient_kernel[(pairs * shares,)](
            q, k, v, dh, u, peak, inverse, dden, layout.chunks, C, n, m, dq, drow, tokens, heads, half_log_qk,
            CARRIES=layout.carries, **sizes,
        )  # fmt: skip
        kernels.key_gradient_kernel[(pairs * shares,)](
            q, k, v, dh, b, u, peak, inverse, dden, layout.chunks, m, dC, dn, dk, du, tokens, heads, half_log_qk,
            FLOWS=flows, **sizes,
        )  # fmt: skip
        kernels.value_gradient_kernel[(pairs * blocks_v,)](
            q, k, dh, b, u, peak, inverse, layout.chunks, m, dC, dv, tokens, heads, half_log_qk, FLOWS=flows, **sizes
        )
        dlog_input, dlog_forget = (empty(tokens, heads) for _ in range(2))
        kernels.gates_gradient_kernel[(chunks * heads,)](
            drow, du, flow, dm, source, layout.chunks, dlog_input, dlog_forget, tokens, heads, shares, blocks,
            STEP=layout.step, LENGTH=layout.length, FLOWS=flows, HAS_FIRST=layout.has_first, HAS_LAST=layout.has_last,
        )  # fmt: skip
        dm_first = None
        if layout.has_first:
            dm_first = (C_first * dC_first).sum((-2, -1)) + (n_first * dn_first).sum(-1)
            if dm is not None:
                dm_first += torch.where(source < 0, dm, 0.0)
        return dq, dk, dv, dlog_input, dlog_forget, dC_first, dn_first, dm_first, None, None


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, *, state: list[Tensor]
) -> tuple[Tensor, State]:
    """One token for every sequence."""
    (sequences, heads, qk_dim), v_dim = q.shape, v.shape[-1]
    shapes = (sequences, heads, qk_dim, v_dim), (sequences, heads, qk_dim), (sequences, heads)
    C, n, m = state or [log_input.new_zeros(shape) for shape in shapes]
    h, (C_next, n_next, m_next) = torch.empty_like(v), (torch.empty_like(x) for x in (C, n, m))
    k_block = triton.next_power_of_2(qk_dim)
    v_block = min(triton.next_power_of_2(v_dim), max(8, 4096 // k_block))
    kernels.step_kernel[(sequences * heads * triton.cdiv(v_dim, v_block),)](
        q, k, v, log_input, log_forget, C, n, m, h, C_next, n_next, m_next, heads, qk_dim**-0.5, QK=qk_dim, V=v_dim,
        BK=k_block, BV=v_block,
    )  # fmt: skip
    return h, (C_next, n_next, m_next)

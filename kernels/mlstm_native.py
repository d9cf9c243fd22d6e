"""The native form of the mLSTM: the chunks of ``mlstm_chunkwise``, in C; see ``native/mlstm.h``.

Short sequences are one chunk, longer ones are cut into equal chunks of at most 48 tokens. The state's stabiliser m is a
maximum, so its gradient goes to whatever made it: the input gate of one token and the forget gates after that, or m of
the initial state. Since C and n are stored times exp(-m), dm also takes -<C, dC> - <n, dn> at the end of a sequence and
+<C, dC> + <n, dn> at its start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native

State = tuple[Tensor, Tensor, Tensor]

_CHUNK = 48  # eight strips of the native product's six rows
_LONGEST_SINGLE_CHUNK = 128
_BATCH = "ppppp iii ppp ppp pppp iiii iii"


def native_mlstm(
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

    q, k [tokens, heads, qk_dim], v [tokens, heads, v_dim], gates [tokens, heads] and state all are float32.
    """
    first = (None, None, None) if state is None else state
    h, C, n, m = _NativeMLSTM.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_input, log_forget, *first, lengths, return_state, reverse
    )
    return h, (C, n, m) if return_state else None


class _NativeMLSTM(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_input: Tensor,
        log_forget: Tensor,
        C: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        lengths: NDArray[np.int64],
        return_state: bool,
        reverse: bool,
    ) -> tuple[Tensor | None, ...]:
        (tokens, heads, qk_dim), v_dim, sequences = q.shape, v.shape[2], len(lengths)
        q, k, v = _rows(q), _rows(k), _rows(v)
        log_input, log_forget = log_input.contiguous(), log_forget.contiguous()
        first = tuple(None if part is None else part.contiguous() for part in (C, n, m))
        layout = _layout(lengths, qk_dim, v_dim)
        starts: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad):
            kept, lanes = layout[-1], native.lanes()
            padded_qk, padded_v = (-(-dim // lanes) * lanes for dim in (qk_dim, v_dim))
            shapes = (kept, heads, padded_qk, padded_v), (kept, heads, padded_qk), (kept, heads)
            starts = tuple(native.empty(*shape) for shape in shapes)
        h = native.empty(tokens, heads, v_dim)
        last: tuple[Tensor | None, ...] = (None, None, None)
        peak = None
        if return_state:
            shapes = (sequences, heads, qk_dim, v_dim), (sequences, heads, qk_dim), (sequences, heads)
            last = tuple(native.empty(*shape) for shape in shapes)
            peak = native.empty(sequences, heads, dtype=torch.int64)
        batch = _batch(q, k, v, log_input, log_forget, first, starts, layout, reverse)
        native.function("mlstm_forward", _BATCH + "ppppp")(*batch, *map(native.pointer, (h, *last, peak)))
        ctx.save_for_backward(q, k, v, log_input, log_forget, *first, *starts, h, *last[:2], peak)
        ctx.layout, ctx.reverse = layout, reverse
        return h, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dC: Tensor | None, dn: Tensor | None, dm: Tensor | None) -> Any:
        q, k, v, log_input, log_forget, *rest = ctx.saved_tensors
        first, starts, (h, C_last, n_last, peak) = tuple(rest[:3]), tuple(rest[3:6]), rest[6:]
        heads, qk_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
        dh = _rows(dh)
        if dC is not None and dn is not None and dm is not None:
            dC, dn = dC.contiguous(), dn.contiguous()
            dm = dm - _inner(C_last, dC) - _inner(n_last, dn)
        dq, dk, dv = (native.empty(len(q), heads, dim) for dim in (qk_dim, qk_dim, v_dim))
        dlog_input, dlog_forget = native.empty(*log_input.shape), native.empty(*log_input.shape)
        dfirst = tuple(None if part is None else native.empty(*part.shape) for part in first)
        batch = _batch(q, k, v, log_input, log_forget, first, starts, ctx.layout, ctx.reverse)
        outputs = (dq, dk, dv, dlog_input, dlog_forget, *dfirst[:2])
        native.function("mlstm_backward", _BATCH + "ppi pppp ppppp pp")(
            *batch,
            native.pointer(h),
            native.pointer(dh),
            dh.stride(0),
            *map(native.pointer, (dC, dn, dm, peak)),
            *map(native.pointer, outputs),
        )
        dC_first, dn_first, dm_first = dfirst
        if dC_first is not None and dn_first is not None:
            dm_first = _inner(first[0], dC_first) + _inner(first[1], dn_first)
            if dm is not None:
                dm_first += torch.where(peak < 0, dm, 0.0)
        return dq, dk, dv, dlog_input, dlog_forget, dC_first, dn_first, dm_first, None, None, None


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` itself where its heads lie side by side in each row, else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner product over all but the first two axes."""
    product: Tensor = torch.linalg.vecdot(x.flatten(2), y.flatten(2))
    return product


def _layout(lengths: NDArray[np.int64], qk_dim: int, v_dim: int) -> tuple[NDArray[np.int64], int, int]:
    """Return (order, edges, chunks and first kept state of each sequence), the longest chunk, and the kept states.

    One chunk of length L costs L (qk_dim + v_dim) products per token, shorter chunks cost _CHUNK (qk_dim + v_dim)
    + 2 qk_dim v_dim; a sequence becomes a single chunk where that is cheaper.
    """
    single = min(_CHUNK + 2 * qk_dim * v_dim // (qk_dim + v_dim), _LONGEST_SINGLE_CHUNK)
    chunks = np.where(lengths <= single, 1, -(-lengths // _CHUNK))
    kept = chunks - 1
    table = np.zeros((4, len(lengths) + 1), np.int64)
    table[0, :-1] = np.argsort(-lengths, kind="stable")
    np.cumsum(lengths, out=table[1, 1:])
    table[2, :-1] = chunks
    np.cumsum(kept, out=table[3, 1:])
    longest = int((-(-lengths // chunks)).max(initial=1))
    return table, longest, int(table[3, -1])


def _batch(  # noqa: PLR0917 - in the order in which C takes them
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    first: tuple[Tensor | None, ...],
    starts: tuple[Tensor | None, ...],
    layout: tuple[NDArray[np.int64], int, int],
    reverse: bool,
) -> tuple[int | None, ...]:
    """What both directions of differentiation are told, in the order of ``mlstm_batch``."""
    table, longest, _ = layout
    _, heads, qk_dim = q.shape
    return (
        *map(native.pointer, (q, k, v, log_input, log_forget)),
        *(x.stride(0) for x in (q, k, v)),
        *map(native.pointer, (*first, *starts)),
        *(row.ctypes.data for row in table),
        *(heads, qk_dim, v.shape[2], int(reverse)),
        *(table.shape[1] - 1, longest, torch.get_num_threads()),
    )

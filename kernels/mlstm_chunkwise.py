"""The chunkwise form of the mLSTM: matrix products inside chunks, a short recurrence between them, exact backward.

Chunks are aligned to sequences. With b the cumulative log forget gate inside a chunk (it restarts in every chunk, hence
in every sequence), u_j = log i_j - b_j, and C0, n0, m0 the state at the chunk's start:

    m_i = b_i + max(m0, max_{j<=i} u_j)
    P_ij = (q'_i . k_j) exp(b_i + u_j - m_i) for j <= i, else 0
    num_i = sum_j P_ij v_j + exp(b_i + m0 - m_i) C0^T q'_i         den_i: the same with v_j = 1, n0
    h_i = num_i / N_i,   N_i = max(|den_i|, exp(-m_i))
    C1 = exp(b_L + m0 - m_L) C0 + sum_j exp(b_L + u_j - m_L) k_j v_j^T               n1: the same with v_j = 1

Backward, with m a constant (h does not depend on it):

    dnum_i = dh_i / N_i        dden_i = -(dh_i . h_i) / N_i * sign(den_i), 0 where the floor holds
    dP_ij = dnum_i . v_j + dden_i, and from there as the formulas stand; X = dP * P gives the gates:
    db_i += sum_j X_ij,  du_j += sum_i X_ij,  dlog f_t = sum_{s>=t} db_s

The state does depend on m: it enters times exp(m0 - const) and leaves times exp(const - m), both 1 in value, and
autograd follows those factors (``_rescaled``). Work goes in blocks small enough for a cache, so nothing of size
tokens x chunk is ever stored; the backward computes P again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mlstm_layout import Group

State = tuple[Tensor, Tensor, Tensor]

_BLOCK = 2**19  # numbers per tensor in a block: 2 MB in float32


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    *,
    groups: list[Group],
    state: State | None,
    sequences: int,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """Return ``h``, and with ``return_state`` C, n and m of every sequence.

    q, k [tokens, heads, qk_dim], v [tokens, heads, v_dim], gates [tokens, heads] and state all have one dtype.
    """
    tokens, heads, qk_dim = q.shape
    rows = tokens * heads
    if state is None:
        shapes = (heads, qk_dim, v.shape[-1]), (heads, qk_dim), (heads,)
        first = tuple(q.new_zeros(sequences if return_state else 0, *shape) for shape in shapes)
    else:
        first = (*_rescaled(state[0], state[1], state[2] - state[2].detach()), state[2])
    flat = (
        q.reshape(rows, -1),
        k.reshape(rows, -1),
        v.reshape(rows, -1),
        log_input.reshape(rows),
        log_forget.reshape(rows),
    )
    h, C, n, m = _Chunkwise.apply(  # type: ignore[no-untyped-call]
        *flat, *first, groups, state is not None, return_state
    )
    h = h.view(tokens, heads, -1)
    if not return_state:
        return h, None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (log_input, log_forget, first[2])):
        m = _last_stabiliser(flat[3], flat[4], first[2], groups)
        C, n = _rescaled(C, n, m.detach() - m)
    return h, (C, n, m)


def _rescaled(C: Tensor, n: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the state by exp(shift); ``shift`` is 0 in value and stands there for its gradient."""
    if not shift.requires_grad:
        return C, n
    factor = torch.exp(shift)[..., None]
    return C * factor[..., None], n * factor


def _last_stabiliser(log_input: Tensor, log_forget: Tensor, m: Tensor, groups: list[Group]) -> Tensor:
    """Return m after each sequence, this time for autograd."""
    last = []
    for group in groups:
        _, u, total = _log_gates(log_input, log_forget, group)
        last.append(_stabilisers(total, u.amax(-1), m.index_select(0, group.members), group.counts)[-1])
    back = torch.cat([group.members for group in groups]).argsort()
    return torch.cat(last).index_select(0, back)


def _log_gates(log_input: Tensor, log_forget: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return b, u and b_L of each chunk, in float64: u_j + b_i is a small difference of large numbers."""
    precise = torch.float32 if log_input.device.type == "mps" else torch.float64
    source = group.source.flatten()
    shape = group.source.shape
    log_i = log_input.index_select(0, source).view(shape).masked_fill(group.padding, -math.inf)  # writes nothing
    log_f = log_forget.index_select(0, source).view(shape).masked_fill(group.padding, 0.0)  # forgets nothing
    b = log_f.to(precise).cumsum(-1)
    return b, log_i - b, b[..., -1]


def _stabilisers(total: Tensor, peak: Tensor, m: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return m at the start and end of every chunk, and after the last chunk of every sequence (in order of rounds).

    It is rounded to the dtype of the state, so that C * exp(m) is exact with the m that is handed out.
    """
    start, end, finished, row = [total[:0]], [total[:0]], [], 0
    for count in counts:
        finished.append(m[count:])
        m = m[:count]
        start.append(m.to(total.dtype))
        m = (total[row : row + count] + torch.maximum(start[-1], peak[row : row + count])).to(m.dtype)
        end.append(m.to(total.dtype))
        row += count
    finished.append(m)
    return torch.cat(start), torch.cat(end), torch.cat(finished[::-1])


class _Factors(NamedTuple):
    """The gates of a group as factors; [chunks, heads, chunk length] unless noted."""

    row: Tensor  # b_i - m_i, and log 1/sqrt(qk_dim), where it costs nothing
    u: Tensor
    floor: Tensor  # exp(-m_i)
    start: Tensor  # what q'_i is multiplied by before it meets the state: exp(b_i + m0 - m_i) / sqrt(qk_dim)
    write: Tensor  # exp(b_L + u_j - m_L)
    keep: Tensor  # exp(b_L + m0 - m_L), [chunks, heads]


def _factors(
    log_input: Tensor, log_forget: Tensor, m_first: Tensor, group: Group, qk_dim: int
) -> tuple[_Factors, Tensor]:
    """Return the factors, and m after the last chunk of every sequence."""
    dtype = log_input.dtype
    b, u, total = _log_gates(log_input, log_forget, group)
    m_start, m_end, m_last = _stabilisers(total, u.amax(-1), m_first, group.counts)
    reach = torch.maximum(u.cummax(-1).values, m_start[..., None])  # m_i - b_i
    row = -reach - 0.5 * math.log(qk_dim)
    leave = total - m_end
    return _Factors(
        row=row,
        u=u,
        floor=torch.exp(-(b + reach)).to(dtype),
        start=torch.exp(row + m_start[..., None]).to(dtype),
        write=torch.exp(leave[..., None] + u).to(dtype),
        keep=torch.exp(leave + m_start).to(dtype),
    ), m_last


def _blocks(group: Group, width: int) -> Iterator[slice]:
    """Cut the chunks of a group into blocks."""
    chunks, heads, length = group.source.shape
    step = max(1, _BLOCK // (heads * length * max(width, length)))
    return (slice(row, min(row + step, chunks)) for row in range(0, chunks, step))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` as [chunks * heads, chunk length, dim]."""
    return x.index_select(0, index.flatten()).view(-1, index.shape[-1], x.shape[-1])


def _decay(factors: _Factors, rows: slice, future: Tensor) -> Tensor:
    """exp(b_i + u_j - m_i) / sqrt(qk_dim), 0 for j > i, as [chunks * heads, chunk length, chunk length]."""
    exponent = (factors.row[rows, ..., None] + factors.u[rows, :, None]).to(future.dtype)
    return exponent.add_(future).exp_().flatten(0, 1)


def _future(group: Group, like: Tensor) -> Tensor:
    length = group.source.shape[-1]
    return like.new_full((length, length), -math.inf).triu_(1)


class _Chunkwise(torch.autograd.Function):
    """q, k [rows, qk_dim], v [rows, v_dim], gates [rows], with rows = tokens * heads; state per sequence."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_input: Tensor,
        log_forget: Tensor,
        C_first: Tensor,
        n_first: Tensor,
        m_first: Tensor,
        groups: list[Group],
        has_state: bool,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads, qk_dim, v_dim = groups[0].source.shape[1], q.shape[1], v.shape[1]
        h = v.new_empty(len(v) + 1, v_dim)  # the padding of all chunks is written to the last row
        C_last, n_last, m_last = (torch.empty_like(part) for part in (C_first, n_first, m_first))
        kept: list[Tensor] = []
        for group in groups:
            held, members = has_state or return_state, group.members
            m0 = m_first.index_select(0, members) if held else m_first.new_zeros(len(members), heads)
            factors, m = _factors(log_input, log_forget, m0, group, qk_dim)
            chunks = len(group.source)
            C_start, n_start = q.new_empty(0), q.new_empty(0)
            carries = has_state or len(group.counts) > 1
            if carries or return_state:
                C_update, n_update = q.new_empty(chunks, heads, qk_dim, v_dim), q.new_empty(chunks, heads, qk_dim)
                for rows in _blocks(group, max(qk_dim, v_dim)):
                    K, V = _gather(k, group.source[rows]), _gather(v, group.source[rows])
                    written = K.mul_(factors.write[rows].flatten(0, 1)[..., None]).transpose(1, 2)
                    torch.bmm(written, V, out=C_update[rows].flatten(0, 1))
                    torch.sum(written, 2, out=n_update[rows].flatten(0, 1))
                if held:
                    C, n = C_first.index_select(0, members), n_first.index_select(0, members)
                else:
                    C, n = q.new_zeros(len(members), heads, qk_dim, v_dim), q.new_zeros(len(members), heads, qk_dim)
                C_start = _carry(C_update, factors.keep[..., None, None], C, group.counts)
                n_start = _carry(n_update, factors.keep[..., None], n, group.counts)
                if return_state:
                    C_last[members], n_last[members], m_last[members] = C, n, m
            inverse, slope = torch.empty_like(factors.floor), torch.empty_like(factors.floor)
            future = _future(group, q)
            for rows in _blocks(group, max(qk_dim, v_dim)):
                Q, K, V = (_gather(x, group.source[rows]) for x in (q, k, v))
                P = torch.bmm(Q, K.transpose(1, 2)).mul_(_decay(factors, rows, future))
                numerator, denominator = torch.bmm(P, V), P.sum(-1)
                if carries:
                    Q = Q.mul_(factors.start[rows].flatten(0, 1)[..., None])
                    numerator.baddbmm_(Q, C_start[rows].flatten(0, 1))
                    denominator += torch.bmm(Q, n_start[rows].flatten(0, 1)[..., None])[..., 0]
                size, floor = denominator.abs(), factors.floor[rows].flatten(0, 1)
                inverse[rows] = torch.maximum(size, floor).reciprocal_().view_as(inverse[rows])
                slope[rows] = (denominator.sign() * (size > floor)).view_as(slope[rows])
                numerator *= inverse[rows].flatten(0, 1)[..., None]
                h.index_copy_(0, group.target[rows].flatten(), numerator.flatten(0, 1))
            kept += [*factors, inverse, slope, C_start, n_start]
        ctx.save_for_backward(q, k, v, h, *kept)
        ctx.groups, ctx.has_state, ctx.return_state = groups, has_state, return_state
        ctx.mark_non_differentiable(m_last)
        return h[:-1], C_last, n_last, m_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dC_last: Tensor, dn_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, h, *kept = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(len(x) + 1, x.shape[1]) for x in (q, k, v))
        dlog_input, dlog_forget = q.new_empty(len(q) + 1), q.new_empty(len(q) + 1)
        dC_first, dn_first = torch.zeros_like(dC_last), torch.zeros_like(dn_last)
        dh = dh.contiguous()
        dot = torch.linalg.vecdot(dh, h[:-1])
        for group in ctx.groups:
            factors, (inverse, slope, C_start, n_start), kept = _Factors(*kept[:6]), kept[6:10], kept[10:]
            carries = ctx.has_state or len(group.counts) > 1
            flows = carries or ctx.return_state
            width = max(q.shape[1], v.shape[1])
            inverse = inverse.masked_fill(group.padding, 0.0)
            dden = -dot.index_select(0, group.source.flatten()).view_as(inverse) * inverse * slope
            dC, dn = torch.zeros_like(C_start), torch.zeros_like(n_start)
            if flows:
                for rows in _blocks(group, width) if carries else ():
                    Q = (
                        _gather(q, group.source[rows])
                        .mul_(factors.start[rows].flatten(0, 1)[..., None])
                        .transpose(1, 2)
                    )
                    dnum = _gather(dh, group.source[rows]).mul_(inverse[rows].flatten(0, 1)[..., None])
                    torch.bmm(Q, dnum, out=dC[rows].flatten(0, 1))
                    dn[rows] = torch.bmm(Q, dden[rows].flatten(0, 1)[..., None]).view_as(dn[rows])
                if ctx.has_state or ctx.return_state:
                    dC_end, dn_end = dC_last.index_select(0, group.members), dn_last.index_select(0, group.members)
                else:
                    dC_end, dn_end = (x.new_zeros(len(group.members), *x.shape[1:]) for x in (C_start, n_start))
                _carry_back(dC, factors.keep[..., None, None], dC_end, group.counts)
                _carry_back(dn, factors.keep[..., None], dn_end, group.counts)
                if ctx.has_state:
                    dC_first[group.members], dn_first[group.members] = dC_end, dn_end
            future = _future(group, q)
            db, du = torch.empty_like(inverse), torch.empty_like(inverse)
            for rows in _blocks(group, width):
                target = group.target[rows].flatten()
                Q, K, V = (_gather(x, group.source[rows]) for x in (q, k, v))
                dnum = _gather(dh, group.source[rows]).mul_(inverse[rows].flatten(0, 1)[..., None])
                dden_rows = dden[rows].flatten(0, 1)[..., None]
                D = _decay(factors, rows, future)
                P = torch.bmm(Q, K.transpose(1, 2)).mul_(D)
                dP = torch.baddbmm(dden_rows, dnum, V.transpose(1, 2))
                dV = torch.bmm(P.transpose(1, 2), dnum)
                X = P.mul_(dP)
                drow, du_rows = X.sum(2), X.sum(1)
                dS = dP.mul_(D)
                dQ, dK = torch.bmm(dS, K), torch.bmm(dS.transpose(1, 2), Q)
                if carries:
                    start = factors.start[rows].flatten(0, 1)
                    meet = torch.bmm(dnum, C_start[rows].flatten(0, 1).transpose(1, 2))
                    meet.addcmul_(dden_rows, n_start[rows].flatten(0, 1)[:, None])
                    meet *= start[..., None]
                    dQ += meet
                    drow += torch.linalg.vecdot(meet, Q)
                if flows:
                    write = factors.write[rows].flatten(0, 1)
                    dC_rows, dn_rows = dC[rows].flatten(0, 1), dn[rows].flatten(0, 1)[:, None]
                    written = torch.baddbmm(dn_rows, V, dC_rows.transpose(1, 2)).mul_(write[..., None])
                    dK += written
                    dwrite = torch.linalg.vecdot(written, K)
                    du_rows += dwrite
                    dV.baddbmm_(K.mul_(write[..., None]), dC_rows)
                    dkeep = torch.linalg.vecdot(dC_rows.flatten(1), C_start[rows].flatten(2).flatten(0, 1))
                    dkeep += torch.linalg.vecdot(dn_rows[:, 0], n_start[rows].flatten(0, 1))
                    drow[:, -1] += dwrite.sum(-1) + dkeep * factors.keep[rows].flatten()
                db[rows], du[rows] = (drow - du_rows).view_as(db[rows]), du_rows.view_as(du[rows])
                for gradient, part in ((dq, dQ), (dk, dK), (dv, dV)):
                    gradient.index_copy_(0, target, part.flatten(0, 1))
            dlog_input.index_copy_(0, group.target.flatten(), du.flatten())
            later = db.flip(-1).cumsum(-1).flip(-1)
            dlog_forget.index_copy_(0, group.target.flatten(), later.flatten())
        state = (dC_first, dn_first) if ctx.has_state else (None, None)
        return dq[:-1], dk[:-1], dv[:-1], dlog_input[:-1], dlog_forget[:-1], *state, None, None, None, None


def _carry(update: Tensor, keep: Tensor, state: Tensor, counts: list[int]) -> Tensor:
    """Run state = keep * state + update over the rounds, in place; return the state before each, in place of update."""
    row = 0
    for count in counts:
        rows, active = slice(row, row + count), state[:count]
        after = torch.addcmul(update[rows], active, keep[rows])
        update[rows] = active
        active.copy_(after)
        row += count
    return update


def _carry_back(grad: Tensor, keep: Tensor, state: Tensor, counts: list[int]) -> None:
    """Turn the gradient of the states before each round into that of the updates, and that of the last into the first.

    Both in place.
    """
    row = len(grad)
    for count in reversed(counts):
        row -= count
        rows, active = slice(row, row + count), state[:count]
        before = torch.addcmul(grad[rows], active, keep[rows])
        grad[rows] = active
        active.copy_(before)

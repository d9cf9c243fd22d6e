"""Sequence parallelism: processes share the tokens of a batch, and exchange them for heads where tokens meet.

A process has some of the tokens (``sequences.share_batch``), and all that is done per token it does for those. Where
the tokens of a sequence mix, in attention, mLSTM and sLSTM, whose heads know nothing of each other, an exchange of all
with all gives it every token of heads / processes heads, the kernel runs as ever, and another exchange gives it back
its tokens with all heads (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509, section 3; here also for the cells
of an xLSTM). The causal convolution reaches over few tokens, so these alone come from the neighbours.

Nothing is approximated: outputs are those of one process to the last digits. With P processes each sends and receives,
per layer and forward pass, (P - 1) / P of its tokens' q, k, v, gates and outputs. An exchange is its own adjoint, so
the gradient of the sum of all processes' losses comes back by the same exchanges, and the sum over the processes of a
parameter's gradients is that of one process. Every process must do the same forward and backward passes, in one order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor

from ..sequences import SequenceShare


class _Exchange(torch.autograd.Function):
    """Rows to the processes they are for, ``send`` of them to each, and ``receive`` from each; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.back = receive, send, group
        y = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(dy, *ctx.back), None, None, None


def exchange(
    x: Shaped[Tensor, "sent ..."], send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> Shaped[Tensor, "received ..."]:
    """Send the first ``send[0]`` rows to process 0, the next to process 1, ...; return what comes, in the same order.

    Every process of the group must call it, with numbers that agree. The gradient of a row goes back where it is from.
    """
    y: Tensor = _Exchange.apply(x, send, receive, group)  # type: ignore[no-untyped-call]
    return y


def with_all_tokens(
    share: SequenceShare | None, run: Callable[..., Tensor], *inputs: Shaped[Tensor, "tokens _ ..."]
) -> Shaped[Tensor, "tokens _ ..."]:
    """Return ``run(*inputs)`` where ``run`` mixes tokens, but no heads; without a ``share`` it is just that.

    With one, ``inputs`` are of this process's tokens, each [tokens, heads, ...]; ``run`` gets them for all tokens of
    the batch and some heads, ``share_of_heads(share, heads)``, and what it returns [all_tokens, some_heads, ...] comes
    back as [tokens, heads, ...]. All inputs of one dtype are exchanged at once.

    An input may have fewer heads than the first, each for as many of its heads (grouped queries). They need not be
    divisible by the number of processes: each process gets those that its heads of the first input go with.

    Raises:
        ConfigError: the heads of the first input are not divisible by the number of processes; nothing is exchanged.
    """
    if share is None:
        return run(*inputs)
    share.check_heads(inputs[0].shape[1])
    # Key heads 0 1 2 for two processes: 0 0 1 | 1 2 2, so that each has whole heads, and its own.
    even = [
        x.repeat_interleave(share.of // math.gcd(share.of, x.shape[1]), dim=1) if x.shape[1] % share.of else x
        for x in inputs
    ]
    got = list(even)
    for dtype in dict.fromkeys(x.dtype for x in even):
        numbers = [n for n, x in enumerate(even) if x.dtype == dtype]
        for n, x in zip(numbers, _to_heads(share, [even[n] for n in numbers]), strict=True):
            got[n] = x
    return _to_tokens(share, run(*got))


def share_of_heads(share: SequenceShare | None, heads: int) -> slice:
    """Return which of ``heads`` heads this process has where it has all tokens."""
    if share is None:
        return slice(0, heads)
    each = heads // share.of
    return slice(share.rank * each, (share.rank + 1) * each)


def _to_heads(share: SequenceShare, inputs: list[Tensor]) -> list[Tensor]:
    """[tokens, heads, ...] of this process to [all_tokens, heads / processes, ...], of several tensors at once."""
    tokens, of = len(inputs[0]), share.of
    shapes = [(x.shape[1] // of, *x.shape[2:]) for x in inputs]
    widths = [math.prod(shape) for shape in shapes]
    parts = [x.reshape(tokens, of, width).transpose(0, 1) for x, width in zip(inputs, widths, strict=True)]
    rows = torch.cat(parts, dim=2).view(of * tokens, sum(widths))
    rows = _in_order(exchange(rows, [tokens] * of, share.counts, share.group), share)
    # Copies, so that what a kernel keeps of one of them for its backward does not keep them all.
    parts = [part.contiguous() for part in torch.split(rows, widths, dim=1)]
    return [part.view(len(part), *shape) for part, shape in zip(parts, shapes, strict=True)]


def _to_tokens(share: SequenceShare, x: Tensor) -> Tensor:
    """[all_tokens, heads / processes, ...] back to [tokens, heads, ...] of this process."""
    tokens, of = share.counts[share.rank], share.of
    rows = x if share.rows is None else x[share.rows]
    rows = exchange(rows, share.counts, [tokens] * of, share.group)
    return rows.view(of, tokens, *x.shape[1:]).transpose(0, 1).reshape(tokens, of * x.shape[1], *x.shape[2:])


def _in_order(rows: Tensor, share: SequenceShare) -> Tensor:
    """Rows of all processes, one after the other, in the order of the whole batch."""
    return rows if share.rows is None else rows[share.rows.argsort()]


def with_neighbours(
    share: SequenceShare, run: Callable[..., Tensor], x: Shaped[Tensor, "tokens channels"], *, reach: int, reverse: bool
) -> Shaped[Tensor, "tokens channels"]:
    """Return ``run(x, cu_seqlens=..., reverse=...)`` where each token looks at the ``reach`` tokens before it.

    ``run`` is given this process's tokens with as many before them (``reverse``: behind them), from the processes that
    have those, and the boundaries of the sequences among all these.
    """
    if share.strand is not None:  # the other strand's tokens stand in the order of their partners: it runs from the end
        own, other = x.chunk(2)
        ways = ((own, reverse), (other, not reverse))
        return torch.cat([with_neighbours(share.strand, run, half, reach=reach, reverse=way) for half, way in ways])
    begin, end = share.bounds[share.rank : share.rank + 2]
    wanted = [_halo(share, r, reach, reverse) for r in range(share.of)]
    owned = list(zip(share.bounds[:-1], share.bounds[1:], strict=True))
    given = [_overlap((begin, end), other) for other in wanted]
    taken = [_overlap(wanted[share.rank], other) for other in owned]
    rows = torch.cat([x[first - begin : last - begin] for first, last in given])
    halo = exchange(rows, [b - a for a, b in given], [b - a for a, b in taken], share.group)
    if reverse:
        edges = share.whole.cu_seqlens.clamp(begin, end + len(halo)) - begin
        return run(torch.cat((x, halo)), cu_seqlens=edges, reverse=True)[: len(x)]
    edges = share.whole.cu_seqlens.clamp(begin - len(halo), end) - (begin - len(halo))
    return run(torch.cat((halo, x)), cu_seqlens=edges, reverse=False)[len(halo) :]


def _halo(share: SequenceShare, rank: int, reach: int, reverse: bool) -> tuple[int, int]:
    """The tokens, from a first to before a last, that process ``rank`` needs beside its own."""
    begin, end = share.bounds[rank : rank + 2]
    if begin == end:
        return begin, begin
    return (end, min(end + reach, share.bounds[-1])) if reverse else (max(begin - reach, 0), begin)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    first = max(one[0], other[0])
    return first, max(first, min(one[1], other[1]))


def own_boundaries(share: SequenceShare) -> Int[Tensor, " boundaries"]:
    """Return the boundaries of the sequences among this process's tokens alone; a sequence may have none of them."""
    if share.strand is not None:
        own = own_boundaries(share.strand)
        return torch.cat((own, own[1:] + own[-1]))
    begin, end = share.bounds[share.rank : share.rank + 2]
    return share.whole.cu_seqlens.clamp(begin, end) - begin


def gather_tokens(
    hidden: Shaped[Tensor, "tokens ..."], share: SequenceShare | None
) -> Shaped[Tensor, "all_tokens ..."]:
    """Return per-token values of the whole batch, from those that each process has of its tokens.

    Differentiable: the gradient is that of the sum of what all processes make of it. So where each computes the same
    loss from it, as for a label of a sequence, the gradient is that of processes times the loss.
    """
    if share is None:
        return hidden
    every = exchange(torch.cat([hidden] * share.of), [len(hidden)] * share.of, share.counts, share.group)
    return _in_order(every, share)

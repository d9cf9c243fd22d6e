"""The other strand: a batch with the reverse complement of each sequence, and hidden states of both strands as one.

Reverse-complement parameter sharing (Zhou et al. 2022, https://proceedings.mlr.press/v165/zhou22a.html): the same
network reads both strands, and a token's hidden state holds what it gave on either. For ``f`` so made, ``f`` of the
reverse complement is ``f`` with its tokens and its channels in reverse order.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..sequences import PackedBatch, SequenceShare


def backwards(cu_seqlens: Int[Tensor, " boundaries"]) -> Int[Tensor, " tokens"]:
    """Return for each token the one that stands as far from its sequence's other end."""
    firsts_and_lasts = torch.repeat_interleave(cu_seqlens[:-1] + cu_seqlens[1:] - 1, cu_seqlens.diff())
    return firsts_and_lasts - torch.arange(len(firsts_and_lasts), device=cu_seqlens.device)


def twice(cu_seqlens: Int[Tensor, " boundaries"]) -> Int[Tensor, " both_boundaries"]:
    """Return the boundaries of the same sequences twice over."""
    return torch.cat((cu_seqlens, cu_seqlens[1:] + cu_seqlens[-1]))


def both_strands(batch: PackedBatch, complement: tuple[int, ...]) -> PackedBatch:
    """Return the sequences and, behind them, the reverse complement of each, at the same positions."""
    ids = torch.tensor(complement, device=batch.tokens.device)
    if batch.share is not None:
        return _share_of_both(batch, both_strands(batch.whole, complement), batch.share, ids)
    other = ids[batch.tokens[backwards(batch.cu_seqlens)]]
    return PackedBatch(
        torch.cat((batch.tokens, other)),
        twice(batch.cu_seqlens),
        torch.cat((batch.positions, batch.positions)),
        {name: torch.cat((value, value)) for name, value in batch.conditions.items()},
    )


def _share_of_both(batch: PackedBatch, both: PackedBatch, share: SequenceShare, ids: Tensor) -> PackedBatch:
    """One process's tokens and, behind them, what stands in their places on the other strand, in the same order."""
    partners = len(batch.whole.tokens) + backwards(batch.cu_seqlens)
    places = torch.arange(len(partners), device=partners.device)
    rows = [part[begin:end] for begin, end in pairwise(share.bounds) for part in (places, partners)]
    bounds = tuple(2 * edge for edge in share.bounds)
    shared = replace(share, whole=both, bounds=bounds, rows=torch.cat(rows), strand=share)
    tokens = torch.cat((batch.tokens, ids[batch.tokens]))
    return PackedBatch(tokens, both.cu_seqlens, shared.cut(both.positions), both.conditions, shared)


def joined_strands(
    hidden: Float[Tensor, "both_tokens width"], read: PackedBatch
) -> Float[Tensor, "tokens double_width"]:
    """Return for each token ``[state on its own strand; state on the other, channels reversed]``.

    ``hidden`` are the states of ``read``, which is what ``both_strands`` returned.
    """
    own, other = hidden.chunk(2)
    if read.share is None:
        other = hidden[backwards(read.cu_seqlens)[len(own) :]]
    return torch.cat((own, other.flip(-1)), dim=-1)

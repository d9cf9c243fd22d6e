"""Masked-token prediction of whole spans (SpanBERT, Joshi et al. 2020, section 3.1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...sequences import PackedBatch, Vocabulary
from .corruption import Ordinary, corrupted, uniform
from .objective import Objective

END, LONGEST = 0.2, 10  # chance that a span ends at a token, and most tokens of one: 3.8 on average


def span_masked(
    batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, share: float = 0.15
) -> Objective:
    """Choose spans until they hold ``share`` of the ordinary tokens, and predict these from the rest.

    Spans begin anywhere, their lengths are geometric with p = 0.2, at most 10 tokens; they end before a special token
    and at the end of their sequence. A span is masked (80%), replaced by random ordinary tokens (10%) or left
    (10%) as a whole. The last span is kept whole, so that up to 9 tokens more than ``share`` may be chosen.

    Raises:
        ConfigError: the vocabulary has no mask token or no ordinary token.
    """
    mask = vocabulary.require("mask")
    device, count = batch.tokens.device, len(batch.tokens)
    ordinary = Ordinary.of(vocabulary, device)
    rank = torch.randperm(count, generator=generator, device=generator.device).to(device)
    draw = uniform(count, generator, device) * (1 - (1 - END) ** LONGEST)
    lengths = (torch.log1p(-draw) / math.log1p(-END)).long() + 1
    fate = uniform(count, generator, device)
    allowed = ordinary.among(batch.tokens)
    first = spans_by_rank(batch, allowed, rank, lengths)
    budget = round(share * int(allowed.sum()))
    chosen = torch.zeros_like(allowed)
    if budget:
        chosen = first <= first[allowed].sort().values[budget - 1]
    by_rank = fate[first.clamp(max=max(count - 1, 0))]  # one fate for a span
    return Objective(
        corrupted(batch, chosen, by_rank, ordinary=ordinary, mask=mask, generator=generator),
        batch.tokens,
        chosen.float(),
    )


def spans_by_rank(
    batch: PackedBatch,
    allowed: Bool[Tensor, " tokens"],
    rank: Int[Tensor, " tokens"],
    lengths: Int[Tensor, " tokens"],
) -> Int[Tensor, " tokens"]:
    """Return for each token the lowest rank of a span that covers it; a token not allowed has the number of tokens.

    A span begins at every allowed token, has that token's rank and, as far as allowed tokens of its sequence go, its
    length.
    """
    count = len(rank)
    owner = batch.sequence_ids
    first = torch.where(allowed, rank, count)
    reaches = allowed
    for back in range(1, min(int(lengths.max()), count) if count else 0):
        # Spans that begin ``back`` tokens before: all between are allowed, and of one sequence.
        reaches = reaches[1:] & allowed[: count - back] & (owner[back:] == owner[: count - back])
        covers = reaches & (lengths[: count - back] > back)
        first[back:] = torch.where(covers, torch.minimum(first[back:], rank[: count - back]), first[back:])
    return first

"""Replaced-token detection without a second network: RTS and C-RTS (Di Liello et al. 2022, arXiv:2204.09300).

The targets are 1 where a token was replaced and 0 where it was not; a detector (``TaskHead`` with one output per token)
and ``binary_loss`` learn them. A token is never replaced by itself, so that no unchanged token is called replaced.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from ...errors import ConfigError
from ...sequences import PackedBatch, Vocabulary
from .corruption import Ordinary, uniform, with_tokens
from .objective import Objective


def replaced(
    batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, share: float = 0.15
) -> Objective:
    """Replace ``share`` of the ordinary tokens by others, drawn uniformly, and ask of each ordinary token if it was.

    Raises:
        ConfigError: the vocabulary has fewer than two ordinary tokens.
    """
    device = batch.tokens.device
    ordinary = Ordinary.of(vocabulary, device, least=2)
    allowed = ordinary.among(batch.tokens)
    chosen = (uniform(len(batch.tokens), generator, device) < share) & allowed
    others = ordinary.other_than(batch.tokens, generator)
    return Objective(with_tokens(batch, others.where(chosen, batch.tokens)), chosen.long(), allowed.float())


def cluster_replaced(
    batch: PackedBatch,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    *,
    clusters: Int[Tensor, " vocabulary"],
    counts: Float[Tensor, "clusters clusters"],
    share: float = 0.15,
    sharpness: float = 2.0,
) -> Objective:
    """As ``replaced``, with the other token from a cluster that the detector confuses with the token's own.

    The cluster is drawn by softmax(``sharpness`` * c), c being the row of ``counts`` of the token's own cluster, scaled
    to 0 to 1; the token is drawn uniformly in it, without the one that is replaced.

    Args:
        batch: the sequences.
        vocabulary: the tokens they are made of.
        generator: of every draw.
        clusters: the cluster of each token, from 0; special tokens have one too, which is not used.
        counts: how often tokens of one cluster passed for tokens of another, see ``count_confusions``; ones at first.
        share: of the ordinary tokens.
        sharpness: 0 draws every cluster alike.

    Raises:
        ConfigError: there are fewer than two ordinary tokens, or a cluster that ``counts`` does not have.
    """
    device = batch.tokens.device
    ordinary = Ordinary.of(vocabulary, device, least=2)
    low, high = (int(bound) for bound in torch.aminmax(clusters))
    if len(clusters) != len(vocabulary) or low < 0 or high >= len(counts):
        raise ConfigError(
            f"Each of the {len(vocabulary)} tokens needs a cluster from 0 to {len(counts) - 1}; clusters has "
            f"{len(clusters)}, from {low} to {high}."
        )
    own = clusters.to(device)[ordinary.ids]
    allowed = ordinary.among(batch.tokens)
    chosen = (uniform(len(batch.tokens), generator, device) < share) & allowed
    at = chosen.nonzero()[:, 0]
    tokens = batch.tokens.clone()
    if len(at):
        sizes = torch.bincount(own, minlength=len(counts))
        by_cluster = torch.argsort(own, stable=True)
        start = sizes.cumsum(0) - sizes
        within = torch.argsort(by_cluster) - start[own]  # the place of each ordinary token in its cluster
        number = torch.searchsorted(ordinary.ids, tokens[at])
        chances = cluster_chances(counts.to(device), sizes, sharpness)[own[number]]
        target = torch.multinomial(chances.to(generator.device), 1, generator=generator)[:, 0].to(device)
        same = target == own[number]
        others = sizes[target] - same.long()
        draw = (uniform(len(at), generator, device) * others).long().minimum(others - 1)
        draw += (same & (draw >= within[number])).long()
        tokens[at] = ordinary.ids[by_cluster[start[target] + draw]]
    return Objective(with_tokens(batch, tokens), chosen.long(), allowed.float())


def cluster_chances(
    counts: Float[Tensor, "clusters clusters"], sizes: Int[Tensor, " clusters"], sharpness: float
) -> Float[Tensor, "clusters clusters"]:
    """Return how likely a token of each cluster is to be replaced by one of each other; rows sum to 1.

    Every row of ``counts`` is scaled by its own lowest and highest. A cluster without another token has no chance.
    """
    low, high = counts.amin(1, keepdim=True), counts.amax(1, keepdim=True)
    scaled = (counts - low) / (high - low).clamp(min=1e-12)
    others = sizes[None] - torch.eye(len(sizes), dtype=sizes.dtype, device=sizes.device)
    return (sharpness * scaled).masked_fill(others < 1, float("-inf")).softmax(1)


def count_confusions(
    counts: Num[Tensor, "clusters clusters"],
    clusters: Int[Tensor, " vocabulary"],
    before: Int[Tensor, " tokens"],
    after: Int[Tensor, " tokens"],
    wrong: Bool[Tensor, " tokens"],
) -> Num[Tensor, "clusters clusters"]:
    """Return ``counts`` after a batch: for each replaced token 1 more where the detector was wrong, else 1 less.

    Args:
        counts: rows are clusters of the tokens before, columns of those after.
        clusters: the cluster of each token.
        before: the tokens of the batch.
        after: those that the detector read.
        wrong: where it was wrong.
    """
    at = before != after
    change = torch.where(wrong[at], 1, -1).to(counts.dtype)
    return counts.index_put((clusters[before[at]], clusters[after[at]]), change, accumulate=True)

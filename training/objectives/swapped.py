"""Swapped language modelling (SLM, Di Liello et al. 2022, arXiv:2204.09300): masked training without a mask token."""

from __future__ import annotations

import torch

from ...sequences import PackedBatch, Vocabulary
from .corruption import Ordinary, uniform, with_tokens
from .objective import Objective


def swapped(
    batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, share: float = 0.15
) -> Objective:
    """Put another ordinary token in place of ``share`` of the tokens and predict what stood there.

    The other token is drawn uniformly and is never the same one. Only the chosen positions have weight; a special token
    is never chosen and never put in.

    Raises:
        ConfigError: the vocabulary has fewer than two ordinary tokens.
    """
    device = batch.tokens.device
    ordinary = Ordinary.of(vocabulary, device, least=2)
    chosen = (uniform(len(batch.tokens), generator, device) < share) & ordinary.among(batch.tokens)
    others = ordinary.other_than(batch.tokens, generator)
    return Objective(with_tokens(batch, others.where(chosen, batch.tokens)), batch.tokens, chosen.float())

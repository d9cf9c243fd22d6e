"""Masked-token prediction (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ...sequences import PackedBatch, Vocabulary
from .objective import Objective

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the remaining tenth is left as it is


def masked(batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, share: float = 0.15) -> Objective:
    """Choose ``share`` of the tokens and predict them from the rest of their sequence.

    Of the chosen tokens 80% become the mask token, 10% a random ordinary token, 10% stay. Special tokens are never
    chosen and never put in. Only chosen positions have weight.

    Raises:
        ConfigError: the vocabulary has no mask token or no ordinary token.
    """
    mask = vocabulary.require("mask")
    device = batch.tokens.device
    ordinary = torch.tensor(sorted(set(range(len(vocabulary))) - vocabulary.special_ids), device=device)
    if not len(ordinary):
        raise ConfigError("Masked training needs tokens that are not special, and the vocabulary has none.")
    special = torch.tensor(sorted(vocabulary.special_ids), dtype=torch.int64, device=device)
    draw = torch.rand(len(batch.tokens), generator=generator, device=generator.device).to(device)
    chosen = (draw < share) & ~torch.isin(batch.tokens, special)
    # One draw decides both: given that it lies below share, draw / share is uniform again.
    fate = draw / share
    others = torch.randint(len(ordinary), (len(batch.tokens),), generator=generator, device=generator.device)
    tokens = torch.where(chosen & (fate < MASKED), mask, batch.tokens)
    replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
    tokens = torch.where(replaced, ordinary[others.to(device)], tokens)
    inputs = PackedBatch(tokens, batch.cu_seqlens, batch.positions, batch.conditions)
    return Objective(inputs, batch.tokens, chosen.float())

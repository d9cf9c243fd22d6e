"""Masked-token prediction (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import torch

from ...sequences import PackedBatch, Vocabulary
from .corruption import Ordinary, corrupted, uniform
from .objective import Objective


def masked(batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, share: float = 0.15) -> Objective:
    """Choose ``share`` of the tokens and predict them from the rest of their sequence.

    Of the chosen tokens 80% become the mask token, 10% a random ordinary token, 10% stay. Special tokens are never
    chosen and never put in. Only chosen positions have weight.

    Raises:
        ConfigError: the vocabulary has no mask token or no ordinary token.
    """
    mask = vocabulary.require("mask")
    ordinary = Ordinary.of(vocabulary, batch.tokens.device)
    draw = uniform(len(batch.tokens), generator, batch.tokens.device)
    chosen = (draw < share) & ordinary.among(batch.tokens)
    # One draw decides both: given that it lies below share, draw / share is uniform again.
    inputs = corrupted(batch, chosen, draw / share, ordinary=ordinary, mask=mask, generator=generator)
    return Objective(inputs, batch.tokens, chosen.float())

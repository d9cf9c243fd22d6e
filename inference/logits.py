"""Logits of each token of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models import LanguageModel
from .batches import conditioned, encode_all, evaluating, ordinary, packed


def logits(
    model: LanguageModel,
    records: Sequence[Any],
    *,
    conditions: Mapping[str, int] | None = None,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> list[NDArray[np.float32]]:
    """Return the logits at each token of each record; special tokens have no row.

    In a masked model they are for the token itself, which it has seen; in a causal one for the token after it.

    Args:
        model: the model.
        records: what its tokenizer encodes; None stands for a record that cannot be used.
        conditions: ids of conditions that the head of the model knows, for all records, such as ``{"species": 3}``.
        batch_tokens: most tokens of one packed batch; a longer record gets a batch of its own.
        progress: show a progress bar.

    Returns:
        float32 [tokens, vocabulary] of each record, without rows for None.

    Raises:
        ConfigError: the head knows no such condition.
        InputError: a record cannot be encoded, or a condition has no such id.
    """
    sequences = encode_all(model, records)
    results = [np.zeros((0, len(model.vocabulary)), np.float32) for _ in sequences]
    with evaluating(model):
        for group, plain in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="logits"):
            batch = conditioned(model, plain, conditions)
            rows = batch.split(model.logits(model.backbone(batch)[0], batch).float())
            kept = batch.split(ordinary(model, batch.tokens))
            for index, row, here in zip(group, rows, kept, strict=True):
                results[index] = row[here].cpu().numpy()
    return results

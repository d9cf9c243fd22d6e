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
        batch_tokens: most tokens of one packed batch; a causal model reads a longer record in pieces of so many.
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
        for group, pieces in packed(model, sequences, batch_tokens=batch_tokens, progress=progress, label="logits"):
            parts: list[list[NDArray[np.float32]]] = [[] for _ in group]
            state = None
            for piece in pieces:
                batch = conditioned(model, piece, conditions)
                more = piece is not pieces[-1]
                hidden, state = model.backbone(batch, state, return_state=more, reuse_state=state is not None)
                rows = batch.split(model.logits(hidden, batch).float())
                kept = batch.split(ordinary(model, batch.tokens))
                for part, row, here in zip(parts, rows, kept, strict=True):
                    part.append(row[here].cpu().numpy())
            for index, part in zip(group, parts, strict=True):
                results[index] = np.concatenate(part)
    return results

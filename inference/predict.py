"""What a model that has learned from labels says of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..models import LanguageModel, TaskConfig
from .batches import encode_all, evaluating, ordinary, packed


def predict(
    model: LanguageModel, records: Sequence[Any], *, batch_tokens: int = 8192, progress: bool = False
) -> NDArray[np.float64] | list[NDArray[np.float64]]:
    """Return what the task head of ``model`` answers for each record, in their order.

    Numbers are in the unit of the labels, yes-or-no answers the probability of yes, classes the probability of each.

    Args:
        model: one with a task head (``models.add_task``), trained on ``training.Labelled``.
        records: what its tokenizer encodes; None stands for a record that cannot be used.
        batch_tokens: most tokens of one packed batch; a longer record is read whole.
        progress: show a progress bar.

    Returns:
        float64 [records] where there is one number or one question, else [records, names]; a row of NaN for None. Of a
        model that answers at each token, a list of such arrays, [tokens] or [tokens, names], special tokens left out.

    Raises:
        ConfigError: the model has no task head.
        InputError: a record cannot be encoded.
    """
    config = task_of(model)
    sequences = encode_all(model, records)
    longest = max((len(sequence) for sequence in sequences if sequence is not None), default=1)
    by_token = config.level == "token"
    rows = [np.full((0, len(config.names)) if by_token else (len(config.names),), np.nan) for _ in sequences]
    with evaluating(model):
        room = max(batch_tokens, longest)  # none is read in pieces: the head averages over all tokens of a sequence
        groups = packed(model, sequences, batch_tokens=room, progress=progress, label="predicting")
        for group, (batch,) in groups:
            hidden, _ = model.backbone(batch)
            assert model.task is not None
            answers = config.read(model.task(hidden, batch, model.vocabulary))
            if by_token:
                kept = batch.split(ordinary(model, batch.tokens))
                each = [part[here] for part, here in zip(batch.split(answers), kept, strict=True)]
            else:
                each = list(answers)
            for index, answer in zip(group, each, strict=True):
                rows[index] = answer.cpu().numpy()
    if len(config.names) == 1:
        rows = [row[..., 0] for row in rows]
    if by_token:
        return rows
    return np.stack(rows) if rows else np.zeros((0,) if len(config.names) == 1 else (0, len(config.names)))


def task_of(model: LanguageModel) -> TaskConfig:
    """Return what the task head of a model answers.

    Raises:
        ConfigError: the model has none.
    """
    if model.task_config is None:
        raise ConfigError(
            "The model has learned no labels, so it predicts none: training.SequencePredictor fits one, or "
            "models.add_task and training.train."
        )
    return model.task_config

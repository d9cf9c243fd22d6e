"""Data that says what is taught of it: labels, and preferences. ``train`` takes it in the place of token sequences.

>>> data = Labelled.encode(model.tokenizer, sequences, activity)        # NaN: not measured
>>> models.add_task(model, data.task("activity"))
>>> train(model, data, TrainingConfig(epochs=20), out="runs/activity")
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, InputError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch, Tokenizer
from .objectives import Objective

Tokens = NDArray[np.integer] | Sequence[int]


class TaughtObjective(ABC):
    """What one batch teaches beside tokens: a loss that needs more of the model than its logits."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """How much the batch counts: the loss of several is the sum of their losses over the sum of their weights."""

    @abstractmethod
    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the weighted sum of the losses (nats, or squared deviations)."""


AnyObjective = Objective | TaughtObjective


class Taught(Sequence[NDArray[np.integer]], ABC):
    """Token sequences that come with what is taught of them, in units that stand in one batch.

    To the packing a unit is one sequence, all of its own laid end to end; ``teach`` cuts it again.

    Attributes:
        in_order: whether a batch is taught by what the batches before it have left, so that one process reads them all.
    """

    in_order: ClassVar[bool] = False

    def __init__(self, sequences: Sequence[Tokens], units: Sequence[NDArray[np.int64]] | None = None) -> None:
        """``units`` are the numbers of the sequences that stay together; None: each stands alone."""
        if not len(sequences):
            raise InputError("There is nothing to train on: there is no sequence.")
        self.sequences, self._units = sequences, units

    def __len__(self) -> int:
        return len(self.sequences) if self._units is None else len(self._units)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.integer]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.integer]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._units is None:
            return np.asarray(self.sequences[index])
        return np.concatenate([np.asarray(self.sequences[int(row)]) for row in self._units[index]])

    def teach(self, batch: PackedBatch, indices: Sequence[int] | NDArray[np.integer]) -> TaughtBatch:
        """Return the batch of the units ``indices`` with the sequences in them apart, and this beside them."""
        if self._units is None:
            rows = np.asarray(indices, np.int64)
        else:
            rows = np.concatenate([self._units[int(unit)] for unit in indices])
        lengths = torch.tensor([len(self.sequences[int(row)]) for row in rows], dtype=torch.int64)
        cut = PackedBatch.from_lengths(batch.tokens, lengths)
        return TaughtBatch(cut.tokens, cut.cu_seqlens, cut.positions, batch.conditions, source=self, rows=rows)

    @abstractmethod
    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> TaughtObjective:
        """Return what a batch of the sequences ``rows`` teaches ``model``."""

    @abstractmethod
    def check(self, model: Trainable) -> None:
        """Raise ConfigError where ``model`` cannot learn this."""

    @abstractmethod
    def untaught(self, model: Trainable) -> list[torch.nn.Module]:
        """The parts of ``model`` that this does not reach; they are frozen meanwhile."""

    @abstractmethod
    def digest(self) -> bytes:
        """A hash of what is taught, without the tokens."""


@dataclass(frozen=True)
class TaughtBatch(PackedBatch):
    """A batch with the data that it came from.

    Attributes:
        source: the data.
        rows: numbers of the batch's sequences there, [sequences].
    """

    source: Taught | None = None
    rows: NDArray[np.int64] | None = None

    def objective(self, model: Trainable) -> TaughtObjective:
        """Return what the batch teaches ``model``."""
        assert self.source is not None and self.rows is not None
        return self.source.objective(self, self.rows, model)


def language_model(model: Trainable) -> LanguageModel:
    """Return ``model``, which is a language model.

    Raises:
        ConfigError: it is another one.
    """
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"A language model is taught this, and {model.name} is of the class {type(model).__name__}.")
    return model


def check_taught(sequences: object, validation: object, model: Trainable, *, max_length: int | None) -> bool:
    """Tell whether the data says itself what is taught.

    Raises:
        ConfigError: the model cannot learn it; a sequence would be cut; or training and validation are of two kinds.
    """
    parts = getattr(sequences, "sources", ())
    if any(isinstance(part, Taught) for part in parts):
        raise ConfigError("A mixture is of plain token sequences; labels and preferences are trained on by themselves.")
    if not isinstance(sequences, Taught):
        if isinstance(validation, Taught):
            raise ConfigError(f"Validation is {type(validation).__name__}, and what is trained on is plain sequences.")
        return False
    for data in (sequences,) if validation is None else (sequences, validation):
        if not isinstance(data, Taught) or type(data) is not type(sequences):
            raise ConfigError(f"Validation must be {type(sequences).__name__} too, not {type(data).__name__}.")
        data.check(model)
        longest = max(len(sequence) for sequence in data.sequences)
        if max_length is not None and longest > max_length:
            raise ConfigError(
                f"A sequence has {longest} tokens, and max_length = {max_length} would cut it from what is taught of "
                "it. Leave max_length out, or cut the sequences first."
            )
    return True


def encoded(tokenizer: Tokenizer, records: Sequence[Any]) -> list[NDArray[np.integer]]:
    """Return the tokens of each record.

    Raises:
        InputError: one cannot be encoded; its number is in the error.
    """
    sequences: list[NDArray[np.integer]] = []
    for number, record in enumerate(records, 1):
        try:
            sequences.append(tokenizer.encode(record))
        except InputError as error:
            raise error.at(record=number) from None
    return sequences


def hashed(*arrays: NDArray[Any] | str) -> bytes:
    """Return a hash of arrays and texts."""
    digest = hashlib.sha256()
    for part in arrays:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.digest()

"""Token sequences with labels, learned by the model's task head (``models.add_task``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..models import LanguageModel, TaskConfig, Trainable
from ..models.task import KINDS, LEVELS
from ..sequences import PackedBatch, Tokenizer
from .objectives import binary_loss, class_loss, regression_loss, symmetric_divergence
from .taught import Taught, TaughtObjective, Tokens, encoded, hashed, language_model

NAN = float("nan")


class Labelled(Taught):
    """Sequences, and what is known of each, or of each of its tokens.

    Labels are numbers (``kind="regression"``), 0 or 1 ("binary", of which several may be 1), or the number of one class
    of several ("classes"). NaN is unknown and teaches nothing.

    With ``views`` each sequence has a second form that means the same, the other strand of DNA or another SMILES of a
    molecule. Both stand in one batch; both learn the label, half each, and ``consistency`` times the divergence between
    what is said of either is added (RCCR, arXiv:2509.18529): (KL(p, q) + KL(q, p)) / 2, of yes-or-no answers for each,
    and of numbers the squared difference.

    Args:
        sequences: token sequences.
        labels: [sequences] or [sequences, columns]; of classes [sequences]. At level "token" one array for each
            sequence, [tokens] or [tokens, columns], with NaN at tokens without a label, as the special ones are.
        kind: see above.
        level: "sequence" or "token".
        classes: how many there are; None: as the highest label says.
        class_weights: how much each class counts, [classes], or no and yes of each column, [columns, 2]; see
            ``objectives.balanced_weights``. None: 1.
        views: a second form of each sequence, at level "sequence".
        consistency: factor of the divergence.

    Raises:
        InputError: labels and sequences disagree in number, a label cannot be one, or there is none; with its record.
        ConfigError: an option cannot work.
    """

    def __init__(
        self,
        sequences: Sequence[Tokens],
        labels: ArrayLike | Sequence[ArrayLike],
        *,
        kind: str = "regression",
        level: str = "sequence",
        classes: int | None = None,
        class_weights: ArrayLike | None = None,
        views: Sequence[Tokens] | None = None,
        consistency: float | int = 0.0,
    ) -> None:
        for name, value, allowed in (("kind", kind, KINDS), ("level", level, LEVELS)):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; it can be {', '.join(allowed)}.")
        if views is not None and (level != "sequence" or len(views) != len(sequences)):
            raise ConfigError(f"views are for level 'sequence', one for each of the {len(sequences)} sequences.")
        if consistency < 0 or (consistency and views is None):
            raise ConfigError("consistency is a factor of at least 0, and needs views: a second form of each sequence.")
        count = len(sequences)
        units = None
        if views is not None:
            sequences = [*sequences, *views]
            units = [np.array([row, row + count]) for row in range(count)]
        super().__init__(sequences, units)
        self.kind, self.level, self.consistency, self.paired = kind, level, float(consistency), views is not None
        self.labels = _by_sequence(labels, count) if level == "sequence" else _by_token(labels, sequences)
        if level == "sequence":
            self._starts = np.arange(count + 1)
        else:
            self._starts = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])])
        self._check_values()
        known = self.labels[~np.isnan(self.labels)]
        if not len(known):
            raise InputError("There is nothing to train on: no label is known.")
        self.outputs = self.labels.shape[1]
        if kind == "classes":
            if self.outputs != 1:
                raise InputError(f"A class is one number for each {level}, and the labels have {self.outputs} columns.")
            highest = int(known.max()) + 1
            self.outputs = highest if classes is None else classes
            if self.outputs < max(highest, 2):
                raise ConfigError(f"There are {max(highest, 2)} classes or more, not {self.outputs}.")
        self.class_weights = None if class_weights is None else torch.as_tensor(np.asarray(class_weights, np.float32))
        wanted = {"regression": None, "binary": (self.outputs, 2), "classes": (self.outputs,)}[kind]
        if self.class_weights is not None and tuple(self.class_weights.shape) != wanted:
            raise ConfigError(f"class_weights has shape {list(self.class_weights.shape)}; {kind} takes {wanted}.")

    @classmethod
    def encode(
        cls, tokenizer: Tokenizer, records: Sequence[Any], labels: ArrayLike | Sequence[ArrayLike], **options: Any
    ) -> Labelled:
        """Tokenize records. At level "token" their labels are of the ordinary tokens alone: of each residue.

        ``options`` are those of ``Labelled``.

        Raises:
            InputError: as ``Labelled``; or a record cannot be encoded, or has another number of residues than labels.
        """
        sequences = encoded(tokenizer, records)
        if options.get("level") == "token":
            special = sorted(tokenizer.vocabulary.special_ids)
            labels = [
                _among_special(sequence, label, special, number)
                for number, (sequence, label) in enumerate(
                    zip(sequences, _each(labels, len(sequences)), strict=True), 1
                )
            ]
        views = options.pop("views", None)
        if views is not None:
            options["views"] = encoded(tokenizer, views)
        return cls(sequences, labels, **options)

    def task(self, *names: str, dropout: float | int = 0.1) -> TaskConfig:
        """Return the configuration of a head that learns this; numbers by their mean and deviation.

        ``names`` are those of the columns, or of the classes; without any they are numbers from 0.
        """
        names = names or tuple(str(number) for number in range(self.outputs))
        if self.kind != "regression":
            return TaskConfig(self.kind, names, self.level, dropout=dropout)
        mean, deviation = [], []
        for column in self.labels.T:
            known = column[~np.isnan(column)]
            mean.append(float(known.mean()) if len(known) else 0.0)
            deviation.append(float(known.std()) if len(known) and known.std() > 0 else 1.0)
        return TaskConfig(self.kind, names, self.level, tuple(mean), tuple(deviation), dropout)

    def check(self, model: Trainable) -> None:
        """Raise ConfigError where the model has no head for these labels."""
        config = language_model(model).task_config
        if config is None:
            raise ConfigError("The model has no head for labels: models.add_task(model, data.task()) gives it one.")
        given, wanted = (config.kind, config.level, len(config.names)), (self.kind, self.level, self.outputs)
        if given != wanted:
            raise ConfigError(f"The model's task head is for {_words(*given)}, and the labels are {_words(*wanted)}.")

    def untaught(self, model: Trainable) -> list[nn.Module]:
        """The heads that predict tokens and contacts."""
        model = language_model(model)
        return [module for module in (model.head, model.contacts) if module is not None]

    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> LabelObjective:
        """Return the labels of a batch."""
        own = [self.labels[self._starts[r] : self._starts[r + 1]] for r in rows % (len(self._starts) - 1)]
        labels = torch.from_numpy(np.concatenate(own))
        config = language_model(model).task_config
        assert config is not None
        if self.kind == "regression":
            labels = config.scaled(labels)
        return LabelObjective(
            batch, labels.float(), self.kind, self.class_weights, self.consistency if self.paired else None
        )

    def digest(self) -> bytes:
        """A hash of the labels and of what they are."""
        weights = np.zeros(0) if self.class_weights is None else self.class_weights.numpy()
        return hashed(self.labels, weights, f"{self.kind} {self.level} {self.outputs} {self.paired} {self.consistency}")

    def _check_values(self) -> None:
        wrong = np.isinf(self.labels)
        if self.kind == "binary":
            wrong |= ~np.isnan(self.labels) & (self.labels != 0) & (self.labels != 1)
        if self.kind == "classes":
            wrong |= ~np.isnan(self.labels) & ((self.labels < 0) | (self.labels != np.floor(self.labels)))
        if not wrong.any():
            return
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        allowed = {"regression": "a finite number", "binary": "0, 1", "classes": "a class from 0"}[self.kind]
        owner = int(np.searchsorted(self._starts, row, side="right")) - 1
        raise InputError(
            f"The label is {self.labels[row, column]:g}; it can be {allowed}, or NaN for unknown.",
            record=owner + 1,
            position=None if self.level == "sequence" else row - int(self._starts[owner]) + 1,
        )


@dataclass(frozen=True)
class LabelObjective(TaughtObjective):
    """The labels of one batch.

    Attributes:
        batch: what the model reads.
        labels: float32 [rows, columns], a row for each sequence or token, as the head learns them; NaN is unknown.
        kind: of the labels.
        class_weights: see ``Labelled``.
        consistency: factor of the divergence, where each two sequences are views of one; None: they are not.
    """

    batch: PackedBatch
    labels: Float[Tensor, "rows columns"]
    kind: str
    class_weights: Tensor | None
    consistency: float | None

    @property
    def weight(self) -> float:
        """Weight of the labels there are; of two views each label counts once."""
        outputs = self.labels.shape[1]
        if self.kind == "classes":
            outputs = 1 + int(self.labels.nan_to_num(0).max()) if len(self.labels) else 1
            outputs = outputs if self.class_weights is None else len(self.class_weights)
        weight = self._loss(torch.zeros(len(self.labels), outputs))[1]
        return float(weight) / (1 if self.consistency is None else 2)

    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the weighted sum of the losses of the task head's answers."""
        return self.loss_of(self.answers(language_model(model)))

    def answers(self, model: LanguageModel) -> Float[Tensor, "rows outputs"]:
        """Return what the task head says, a row for each row of labels."""
        assert model.task is not None
        batch = self.batch.to(model.device)
        hidden, _ = model.backbone(model.whole(batch))
        answers: Tensor = model.task(hidden, batch, model.vocabulary)
        return answers

    def loss_of(self, answers: Float[Tensor, "rows outputs"]) -> Float[Tensor, ""]:
        """Return the weighted sum of the losses of such answers."""
        loss = self._loss(answers)[0]
        if self.consistency is None:
            return loss
        return 0.5 * loss + self.consistency * self._divergence(answers[::2], answers[1::2])

    def _loss(self, answers: Float[Tensor, "rows outputs"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        labels = self.labels.to(answers.device)
        weights = None if self.class_weights is None else self.class_weights.to(answers.device)
        if self.kind == "regression":
            return regression_loss(answers, labels)
        if self.kind == "binary":
            return binary_loss(answers, labels, weights)
        return class_loss(answers, labels[:, 0], weights)

    def _divergence(self, one: Float[Tensor, "rows outputs"], other: Float[Tensor, "rows outputs"]) -> Tensor:
        if self.kind == "regression":
            return ((one - other).float() ** 2).sum()
        if self.kind == "classes":
            return symmetric_divergence(one, other).sum()
        no_or_yes = [torch.stack((torch.zeros_like(x), x), -1).flatten(0, 1) for x in (one, other)]
        return symmetric_divergence(*no_or_yes).sum()


def _words(kind: str, level: str, outputs: int) -> str:
    return f"{kind} with {outputs} output{'s' * (outputs != 1)} per {level}"


def _by_sequence(labels: Any, count: int) -> NDArray[np.float64]:
    values = np.asarray(labels, np.float64)
    if values.ndim not in (1, 2) or len(values) != count:
        raise InputError(
            f"The labels have shape {list(values.shape)}; {count} sequences need [{count}] or more columns."
        )
    return values.reshape(count, -1)


def _each(labels: Any, count: int) -> Sequence[Any]:
    if len(labels) != count:
        raise InputError(f"There are labels of {len(labels)} sequences, and {count} sequences.")
    each: Sequence[Any] = labels
    return each


def _by_token(labels: Any, sequences: Sequence[Tokens]) -> NDArray[np.float64]:
    parts = []
    for number, (label, sequence) in enumerate(zip(_each(labels, len(sequences)), sequences, strict=True), 1):
        values = np.asarray(label, np.float64)
        if values.ndim not in (1, 2) or len(values) != len(sequence):
            raise InputError(f"There are {len(values)} labels for {len(sequence)} tokens.", record=number)
        parts.append(values.reshape(len(values), -1))
        if parts[-1].shape[1] != parts[0].shape[1]:
            raise InputError(
                f"The labels have {parts[-1].shape[1]} columns, those before {parts[0].shape[1]}.", record=number
            )
    return np.concatenate(parts)


def _among_special(
    sequence: NDArray[np.integer], label: ArrayLike, special: Sequence[int], number: int
) -> NDArray[np.float64]:
    """Put the labels of ordinary tokens at their places, NaN at the special ones."""
    values = np.asarray(label, np.float64)
    at = np.flatnonzero(~np.isin(sequence, special))
    if values.ndim not in (1, 2) or len(values) != len(at):
        raise InputError(f"There are {len(values)} labels, and {len(at)} tokens to be labelled.", record=number)
    placed = np.full((len(sequence), *values.shape[1:]), NAN)
    placed[at] = values
    return placed

"""A task head: hidden states to what labels say, beside the head that predicts tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..sequences import PackedBatch, Vocabulary

KINDS = ("regression", "binary", "classes")
LEVELS = ("sequence", "token")


@dataclass(frozen=True)
class TaskConfig:
    """What a task head answers, as plain values.

    Attributes:
        kind: "regression" (numbers), "binary" (yes or no, of which several may be yes) or "classes" (one of several).
        names: of the numbers, of the yes-or-no questions, or of the classes.
        level: an answer for each "sequence", or for each "token".
        mean: of the labels of each number in the training data; empty: 0.
        deviation: their standard deviation; the network learns (label - mean) / deviation; empty: 1.
        dropout: share of the hidden states that is set to zero in training.
    """

    kind: str
    names: tuple[str, ...]
    level: str = "sequence"
    mean: tuple[float | int, ...] = ()
    deviation: tuple[float | int, ...] = ()
    dropout: float | int = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"The kind of a task is {', '.join(KINDS)}, not {self.kind!r}.")
        if self.level not in LEVELS:
            raise ConfigError(f"A head answers per {' or '.join(LEVELS)}, not per {self.level!r}.")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError("A task needs names, each once: of its numbers, questions or classes.")
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if values and (self.kind != "regression" or len(values) != len(self.names)):
                raise ConfigError(f"{name} has {len(values)} values; it is for regression, one for each name.")
        if not all(value > 0 for value in self.deviation):
            raise ConfigError("deviation is positive.")

    def scaled(self, labels: Float[Tensor, "... outputs"]) -> Float[Tensor, "... outputs"]:
        """Return labels as the network learns them."""
        if not self.mean:
            return labels
        return (labels - labels.new_tensor(self.mean)) / labels.new_tensor(self.deviation or (1.0,))

    def read(self, answers: Float[Tensor, "... outputs"]) -> Float[Tensor, "... outputs"]:
        """Return the network's answers as numbers in the unit of the labels, or as probabilities; in float64."""
        answers = answers.double()
        if self.kind == "binary":
            return answers.sigmoid()
        if self.kind == "classes":
            return answers.softmax(-1)
        return answers * answers.new_tensor(self.deviation or (1.0,)) + answers.new_tensor(self.mean or (0.0,))


class TaskHead(nn.Module):
    """Hidden states to answers: dropout, linear, tanh, dropout, linear (as RoBERTa's classification head).

    Args:
        width: channels of the hidden states.
        outputs: numbers per answer: values to regress, yes-or-no labels, or classes.
        level: "sequence" averages the ordinary tokens of each sequence first; "token" answers at every token.
        dropout: share set to zero in training.
    """

    def __init__(self, width: int, outputs: int, *, level: str = "sequence", dropout: float | int = 0.1) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ConfigError(f"A head answers per {' or '.join(LEVELS)}, not per {level!r}.")
        self.level = level
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Float[Tensor, "tokens width"], batch: PackedBatch, vocabulary: Vocabulary
    ) -> Float[Tensor, "rows outputs"]:
        """Return one row per sequence, or per token."""
        x = sequence_means(hidden, batch, vocabulary) if self.level == "sequence" else hidden
        answers: Tensor = self.out(self.dropout(torch.tanh(self.dense(self.dropout(x)))))
        return answers


def sequence_means(
    hidden: Float[Tensor, "tokens width"], batch: PackedBatch, vocabulary: Vocabulary
) -> Float[Tensor, "sequences width"]:
    """Average the hidden states of the tokens of each sequence that are not special; zeros where there is none."""
    special = torch.tensor(sorted(vocabulary.special_ids), dtype=torch.int64, device=batch.tokens.device)
    kept = (~torch.isin(batch.tokens, special)).to(hidden.dtype)
    owner = batch.sequence_ids
    sums = hidden.new_zeros(len(batch), hidden.shape[1]).index_add(0, owner, hidden * kept[:, None])
    return sums / hidden.new_zeros(len(batch)).index_add(0, owner, kept).clamp(min=1)[:, None]

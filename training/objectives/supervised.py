"""Labels: a small head on hidden states, and the losses of regression, yes-or-no and classes.

Labels are floating point and NaN where there is none, so that a table with gaps trains whole. Each loss returns a sum
and the weight of the answers in it: sums and weights of several batches add up, and sum / weight is the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError, InputError, ShapeError
from ...sequences import PackedBatch, Vocabulary

LEVELS = ("sequence", "token")
Loss = tuple[Float[Tensor, ""], Float[Tensor, ""]]


class TaskHead(nn.Module):
    """Hidden states to answers: dropout, linear, tanh, dropout, linear (as RoBERTa's classification head).

    Args:
        width: channels of the hidden states.
        outputs: numbers per answer: values to regress, yes-or-no labels, or classes.
        level: "sequence" averages the ordinary tokens of each sequence first; "token" answers at every token.
        dropout: share set to zero in training.
    """

    def __init__(self, width: int, outputs: int, *, level: str = "sequence", dropout: float = 0.1) -> None:
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


def regression_loss(
    answers: Float[Tensor, "rows outputs"],
    labels: Float[Tensor, "labelled columns"],
) -> Loss:
    """Squared errors of the labels [rows, outputs] there are, and how many these are.

    Raises:
        ShapeError: answers and labels disagree.
    """
    known = _known(answers, labels)
    errors = (answers.float()[known] - labels.float()[known]) ** 2
    return errors.sum(), known.sum().float()


def binary_loss(
    answers: Float[Tensor, "rows outputs"],
    labels: Float[Tensor, "labelled columns"],
    class_weights: Float[Tensor, "weighted two"] | None = None,
) -> Loss:
    """Cross-entropies (nats) of yes-or-no labels, of which several may be yes, and their weight.

    Args:
        answers: logits of yes.
        labels: 0, 1 or NaN, [rows, outputs].
        class_weights: weight of no and of yes for each output, [outputs, 2]; None: 1.

    Raises:
        ShapeError: the arguments disagree.
        InputError: a label is something else.
    """
    known = _known(answers, labels)
    wanted = labels.float()[known]
    if not ((wanted == 0) | (wanted == 1)).all():
        raise InputError("A yes-or-no label is 0, 1 or NaN.", hint="Numbers are learned by regression_loss.")
    losses = F.binary_cross_entropy_with_logits(answers.float()[known], wanted, reduction="none")
    if class_weights is None:
        return losses.sum(), known.sum().float()
    if class_weights.shape != (answers.shape[1], 2):
        raise ShapeError("class_weights", tuple(class_weights.shape), (answers.shape[1], 2))
    weights = class_weights.float()[known.nonzero()[:, 1], wanted.long()]
    return (losses * weights).sum(), weights.sum()


def class_loss(
    answers: Float[Tensor, "rows classes"],
    labels: Float[Tensor, " labelled"],
    class_weights: Float[Tensor, " weighted"] | None = None,
) -> Loss:
    """Cross-entropies (nats) of one class out of several, and their weight.

    Args:
        answers: logits.
        labels: the number of the class from 0, or NaN, [rows].
        class_weights: weight of each class, [classes]; None: 1.

    Raises:
        ShapeError: the arguments disagree.
        InputError: there is no such class.
    """
    if labels.shape != answers.shape[:1]:
        raise ShapeError("labels", tuple(labels.shape), tuple(answers.shape[:1]))
    known = ~labels.isnan()
    wanted = labels[known].long()
    outside = (wanted < 0) | (wanted >= answers.shape[1]) | (wanted != labels[known])
    if outside.any():
        raise InputError(f"A class is a whole number from 0 to {answers.shape[1] - 1}, or NaN.")
    losses = F.cross_entropy(answers.float()[known], wanted, reduction="none")
    if class_weights is None:
        return losses.sum(), known.sum().float()
    if class_weights.shape != answers.shape[1:]:
        raise ShapeError("class_weights", tuple(class_weights.shape), tuple(answers.shape[1:]))
    weights = class_weights.float()[wanted]
    return (losses * weights).sum(), weights.sum()


def balanced_weights(counts: Float[Tensor, "... classes"]) -> Float[Tensor, "... classes"]:
    """Return weights that give all classes an equal share: total / (classes * count), 0 for a class without any."""
    weights = counts.sum(-1, keepdim=True) / (counts.shape[-1] * counts.clamp(min=1))
    return torch.where(counts > 0, weights, torch.zeros_like(weights))


def _known(answers: Tensor, labels: Tensor) -> Bool[Tensor, "rows outputs"]:
    if labels.shape != answers.shape:
        raise ShapeError("labels", tuple(labels.shape), tuple(answers.shape))
    return ~labels.isnan()

"""Labels: the losses of regression, yes-or-no and classes.

Labels are floating point and NaN where there is none, so that a table with gaps trains whole. Each loss returns a sum
and the weight of the answers in it: sums and weights of several batches add up, and sum / weight is the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import InputError, ShapeError

Loss = tuple[Float[Tensor, ""], Float[Tensor, ""]]


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

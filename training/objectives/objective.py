"""What an objective returns: the batch a model reads, what it should say, and how much each answer counts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ShapeError
from ...sequences import PackedBatch


@dataclass(frozen=True)
class Objective:
    """Inputs, targets and weights of one batch.

    Attributes:
        batch: what the model reads.
        targets: the token it should predict at each position, or the class of a token, int64 [tokens].
        weights: how much each position counts in the loss, float32 [tokens]; 0 leaves it out.
    """

    batch: PackedBatch
    targets: Int[Tensor, " tokens"]
    weights: Float[Tensor, " tokens"]

    def __post_init__(self) -> None:
        shapes = tuple(self.targets.shape), tuple(self.weights.shape)
        expected = tuple(self.batch.tokens.shape)
        if shapes != (expected, expected):
            raise ShapeError("targets and weights", shapes, expected)

    @property
    def weight(self) -> float:
        """Sum of the weights."""
        return float(self.weights.sum())

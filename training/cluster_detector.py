"""C-RTS: a detector learns from tokens of the clusters that it confuses (Di Liello et al. 2022, arXiv:2204.09300).

>>> add_detector(model)                                                            # what is kept
>>> both = ClusterDetector(model, ["AGPST", "DENQ", "HKR", "ILMV", "FWY", "C"])     # Dayhoff's classes
>>> train(both, ClusterReplaced(sequences), TrainingConfig(epochs=3), out="runs/detector")
>>> processive.load("runs/detector")                                               # the detector alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch, Vocabulary
from .detector import WithDetector, detection
from .objectives import cluster_replaced, count_confusions
from .objectives.corruption import Ordinary
from .taught import Taught, TaughtObjective, Tokens, hashed


class ClusterDetector(WithDetector):
    """A detector and what it confuses, to be trained on ``ClusterReplaced`` sequences.

    ``counts`` is a buffer, so that a run that goes on from a checkpoint goes on with the counts of that moment.

    Attributes:
        detector: the model that is kept, with a head that tells replaced tokens (``add_detector``).
        clusters: the cluster of each token.
        counts: ones, and for each replaced token so far 1 more where the detector was wrong, else 1 less; rows are
            clusters of the tokens before, columns of those after.
    """

    clusters: Int[Tensor, " vocabulary"]
    counts: Int[Tensor, "clusters clusters"]

    def __init__(self, detector: LanguageModel, groups: Sequence[Sequence[str]]) -> None:
        """Put both together.

        Args:
            detector: a model that reads both ways.
            groups: the tokens of each cluster; ordinary tokens that are in none are one more.

        Raises:
            ConfigError: the detector does not read both ways, or has no head that tells replaced tokens; or a group has
                a token that is special, not in the vocabulary, or in another group.
        """
        if detector.generates:
            raise ConfigError("The detector must read both ways: its backbone is causal, or reads a prefix.")
        super().__init__(detector)
        clusters = clusters_of(groups, detector.vocabulary)
        number = int(clusters.max()) + 1
        self.register_buffer("clusters", clusters.to(self.device), persistent=False)
        self.register_buffer("counts", torch.ones(number, number, dtype=torch.int64, device=self.device))

    @property
    def networks(self) -> tuple[Backbone, ...]:
        """The backbone of the detector."""
        return (self.detector.backbone,)

    def parts(self) -> dict[str, Any]:
        """What the detector is made of, and the clusters, as plain values."""
        return {"detector": self.detector.parts(), "clusters": self.clusters.tolist()}


def clusters_of(groups: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Int[Tensor, " vocabulary"]:
    """Return the number of the group of each token; ordinary tokens without one have the next, special ones 0.

    Raises:
        ConfigError: a token of a group is special, not in the vocabulary, or in another group.
    """
    clusters = torch.zeros(len(vocabulary), dtype=torch.int64)
    left = {vocabulary.tokens[i] for i in vocabulary.ordinary_ids.tolist()}
    for number, group in enumerate(groups):
        for token in group:
            if token not in left:
                raise ConfigError(
                    f"Group {number + 1} has {token!r}, which is no ordinary token, or stands in a group already."
                )
            left.remove(token)
            clusters[vocabulary.ids[token]] = number
    clusters[[vocabulary.ids[token] for token in left]] = len(groups)
    return clusters


class ClusterReplaced(Taught):
    """Sequences of which tokens are replaced by those that a ``ClusterDetector`` takes for them.

    Args:
        sequences: token sequences.
        share: of the ordinary tokens that are replaced.
        sharpness: 0 draws every cluster alike; see ``objectives.cluster_replaced``.

    Raises:
        ConfigError: the share is not one.
    """

    in_order = True  # the counts are those of all batches before

    def __init__(self, sequences: Sequence[Tokens], *, share: float = 0.15, sharpness: float | int = 2.0) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"share lies between 0 and 1, not {share}.")
        super().__init__(sequences)
        self.share, self.sharpness = share, float(sharpness)

    def check(self, model: Trainable) -> None:
        """Raise ConfigError where the model is no ``ClusterDetector``."""
        _cluster_detector(model)

    def untaught(self, model: Trainable) -> list[nn.Module]:
        """The detector's heads for tokens and for contacts."""
        detector = _cluster_detector(model).detector
        return [head for head in (detector.head, detector.contacts) if head is not None]

    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> ClusterObjective:
        """Return a batch in which tokens are to be replaced."""
        ordinary = Ordinary.of(_cluster_detector(model).detector.vocabulary, batch.tokens.device).among(batch.tokens)
        return ClusterObjective(batch, int(ordinary.sum()), self.share, self.sharpness)

    def digest(self) -> bytes:
        """A hash of the share and the sharpness."""
        return hashed(f"cluster-replaced {self.share} {self.sharpness}")


@dataclass(frozen=True)
class ClusterObjective(TaughtObjective):
    """One batch in which tokens are to be replaced, and detected.

    Attributes:
        batch: the sequences.
        ordinary: how many of their tokens are not special.
        share: of these that are replaced.
        sharpness: of the choice of clusters.
    """

    batch: PackedBatch
    ordinary: int
    share: float
    sharpness: float

    @property
    def weight(self) -> float:
        """Number of ordinary tokens."""
        return float(self.ordinary)

    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the sum of the losses (nats) of the ordinary tokens; in training, count what was confused.

        Tokens are drawn by torch's own generator, which the loop seeds for each batch of a step, and with the counts of
        all batches before this one; in evaluation the draws are the same every time, and nothing is counted.
        """
        both = _cluster_detector(model)
        draws = torch.default_generator if both.training else torch.Generator().manual_seed(0)
        found = cluster_replaced(
            self.batch,
            both.detector.vocabulary,
            draws,
            clusters=both.clusters,
            counts=both.counts.float(),
            share=self.share,
            sharpness=self.sharpness,
        )
        labels = detection(found)
        answers = labels.answers(both.detector)
        if both.training:
            before, after = self.batch.tokens.to(both.device), found.batch.tokens.to(both.device)
            missed = answers.detach()[:, 0] <= 0  # a replaced token that was not called so
            both.counts.copy_(count_confusions(both.counts, both.clusters, before, after, missed))
        return labels.loss_of(answers)


def _cluster_detector(model: Trainable) -> ClusterDetector:
    if not isinstance(model, ClusterDetector):
        raise ConfigError(
            f"Sequences with replacements from clusters are learned by training.ClusterDetector, not {model.name}."
        )
    return model

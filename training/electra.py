"""RTD: a detector learns from the guesses of a small generator (ELECTRA, Clark et al. 2020, arXiv:2003.10555).

>>> add_detector(model)                                                       # what is kept
>>> generator = LanguageModel(model.tokenizer, smaller, model.head.config)    # a quarter to a half as wide
>>> train(Electra(model, generator), Sampled(sequences), TrainingConfig(epochs=3), out="runs/electra")
>>> processive.load("runs/electra")                                           # the detector alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..models import LanguageModel, Trainable
from ..sequences import PackedBatch, tokenizer_to_dict
from .detector import WithDetector, detection
from .objectives import DETECTOR_WEIGHT, masked, sampled
from .objectives.corruption import Ordinary
from .taught import Taught, TaughtObjective, Tokens, hashed


class Electra(WithDetector):
    """A detector and the generator that it learns from, to be trained together on ``Sampled`` sequences.

    Checkpoints hold both; the folder of a run that is done holds the detector, a language model like others. They share
    no weights.

    Attributes:
        detector: the model that is kept, with a head that tells replaced tokens (``add_detector``).
        generator: a masked language model with the same tokenizer.
    """

    def __init__(self, detector: LanguageModel, generator: LanguageModel) -> None:
        """Put both together.

        Raises:
            ConfigError: one of them is causal, their tokenizers differ, or the detector has no such head.
        """
        for what, model in (("detector", detector), ("generator", generator)):
            if getattr(model.backbone.config, "direction", "") != "bidirectional":
                raise ConfigError(f"The {what} must read both ways: its backbone is not bidirectional.")
        if tokenizer_to_dict(detector.tokenizer) != tokenizer_to_dict(generator.tokenizer):
            raise ConfigError("The generator has another tokenizer than the detector.")
        super().__init__(detector)
        self.generator = generator

    @property
    def networks(self) -> tuple[Backbone, ...]:
        """The backbones of both."""
        return self.detector.backbone, self.generator.backbone

    def parts(self) -> dict[str, Any]:
        """What both are made of, as plain values."""
        return {"detector": self.detector.parts(), "generator": self.generator.parts()}


class Sampled(Taught):
    """Sequences of which masked tokens are guessed by the generator of an ``Electra``, whose guesses are detected.

    The loss of a batch is the generator's, a mean over the masked tokens, and 50 times the detector's, a mean over the
    ordinary ones.

    Args:
        sequences: token sequences.
        share: of the ordinary tokens that are masked.

    Raises:
        ConfigError: the share is not one.
    """

    def __init__(self, sequences: Sequence[Tokens], *, share: float = 0.15) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"share lies between 0 and 1, not {share}.")
        super().__init__(sequences)
        self.share = share

    def check(self, model: Trainable) -> None:
        """Raise ConfigError where the model is no ``Electra``."""
        _electra(model).detector.vocabulary.require("mask")

    def untaught(self, model: Trainable) -> list[nn.Module]:
        """The detector's head for tokens, the generator's for labels, and those for contacts."""
        both = _electra(model)
        heads = (both.detector.head, both.detector.contacts, both.generator.task, both.generator.contacts)
        return [head for head in heads if head is not None]

    def objective(self, batch: PackedBatch, rows: NDArray[np.int64], model: Trainable) -> SampledObjective:
        """Return a batch to be masked."""
        ordinary = Ordinary.of(_electra(model).detector.vocabulary, batch.tokens.device).among(batch.tokens)
        return SampledObjective(batch, int(ordinary.sum()), self.share)

    def digest(self) -> bytes:
        """A hash of the share."""
        return hashed(f"sampled {self.share}")


@dataclass(frozen=True)
class SampledObjective(TaughtObjective):
    """One batch to be masked, guessed and detected.

    Attributes:
        batch: the sequences.
        ordinary: how many of their tokens are not special.
        share: of these that are masked.
    """

    batch: PackedBatch
    ordinary: int
    share: float

    @property
    def weight(self) -> float:
        """Number of ordinary tokens."""
        return float(self.ordinary)

    def loss_sum(self, model: Trainable) -> Float[Tensor, ""]:
        """Return the loss of the batch (nats), times its weight.

        Masks and guesses are drawn by torch's own generator, which the loop seeds for each batch of a step; in
        evaluation they are the same every time.
        """
        both = _electra(model)
        draws = torch.default_generator if both.training else torch.Generator().manual_seed(0)
        vocabulary = both.detector.vocabulary
        guess = masked(self.batch, vocabulary, draws, share=self.share)
        at = guess.weights.nonzero()[:, 0]
        inputs = guess.batch.to(both.device)
        hidden, _ = both.generator.backbone(inputs)
        logits = both.generator.logits(hidden, inputs, at.to(both.device)).float()
        guessing = F.cross_entropy(logits, guess.targets[at].to(both.device), reduction="sum") / max(len(at), 1)
        detecting = detection(sampled(guess, logits, vocabulary, draws)).loss_sum(both.detector)
        return self.weight * guessing + DETECTOR_WEIGHT * detecting


def _electra(model: Trainable) -> Electra:
    if not isinstance(model, Electra):
        raise ConfigError(f"Sampled sequences are learned by training.Electra(detector, generator), not {model.name}.")
    return model

"""Replaced-token detection through the task head: what RTS (``objectives.replaced``) teaches a model in the loop.

>>> training.add_detector(model)                                         # a recipe with this objective does it itself
>>> train(model, sequences, TrainingConfig(objective="replaced", epochs=3), out="runs/detector")
>>> inference.predict(model, ["MKTAYIAK"])                               # of each residue: how likely it was replaced
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigError
from ..models import LanguageModel, TaskConfig, Trainable, add_task
from .labelled import LabelObjective
from .objectives import Objective

DETECTOR = TaskConfig("binary", ("replaced",), level="token")


def add_detector(model: LanguageModel, *, seed: int = 0) -> None:
    """Give ``model`` the head that tells of each token whether it was replaced, in the place of one that it has."""
    add_task(model, DETECTOR, seed=seed)


def check_detector(model: LanguageModel) -> None:
    """Raise ConfigError where the model has no such head."""
    config = model.task_config
    if config is None or (config.kind, config.names, config.level) != ("binary", DETECTOR.names, "token"):
        raise ConfigError(
            "The objective 'replaced' is learned by a head that tells replaced tokens, and the model has "
            f"{'none' if config is None else 'another task head'}: training.add_detector(model) gives it one."
        )


class WithDetector(Trainable):
    """A detector with what it needs to learn; checkpoints hold all of it, and the detector alone is kept.

    Attributes:
        detector: the model that is kept, a language model like others, with a head that tells replaced tokens.
    """

    def __init__(self, detector: LanguageModel) -> None:
        """Put the detector in.

        Raises:
            ConfigError: it has no such head.
        """
        super().__init__()
        check_detector(detector)
        self.detector = detector
        self.name, self.card = detector.name, detector.card

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.detector.device

    @property
    def vocabulary_size(self) -> int:
        """Number of the tokenizer's tokens."""
        return self.detector.vocabulary_size

    def save(self, folder: str | Path, *, format: str | None = None) -> None:
        """Write the detector; see ``LanguageModel.save``."""
        self.detector.card = self.card
        self.detector.save(folder, format=format)


def detection(found: Objective) -> LabelObjective:
    """Return the targets of ``objectives.replaced`` as labels of each token that is asked about."""
    labels = torch.where(found.weights > 0, found.targets.float(), torch.nan)
    return LabelObjective(found.batch, labels[:, None], "binary", class_weights=None, consistency=None)

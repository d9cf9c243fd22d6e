"""Replaced-token detection through the task head: what RTS (``objectives.replaced``) teaches a model in the loop.

>>> training.add_detector(model)                                         # a recipe with this objective does it itself
>>> train(model, sequences, TrainingConfig(objective="replaced", epochs=3), out="runs/detector")
>>> inference.predict(model, ["MKTAYIAK"])                               # of each residue: how likely it was replaced
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..models import LanguageModel, TaskConfig, add_task
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


def detection(found: Objective) -> LabelObjective:
    """Return the targets of ``objectives.replaced`` as labels of each token that is asked about."""
    labels = torch.where(found.weights > 0, found.targets.float(), torch.nan)
    return LabelObjective(found.batch, labels[:, None], "binary", class_weights=None, consistency=None)

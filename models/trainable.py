"""What a model is to the training loop: its networks, the ids that they read, what it is made of, how it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones import Backbone
from .card import ModelCard


class Trainable(nn.Module, ABC):
    """A model that the training loop trains and leaves in a folder: a language model, or one of several networks.

    Attributes:
        name: used for keys such as ``obsm["X_<name>"]`` and as the title of the card.
        card: data, recipe and metrics.
    """

    name: str
    card: ModelCard

    @property
    @abstractmethod
    def networks(self) -> Sequence[Backbone]:
        """The backbones: what is frozen where heads alone are trained."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Every token id of its batches lies below."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What it is made of, as plain values: a run is resumed with the same."""

    @abstractmethod
    def save(self, folder: str | Path, *, format: str | None = None) -> None:
        """Write the model to ``folder``, in our own format or another package's."""

"""Torch, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import BackboneState
from ...models import Trainable
from ..batches import Batch, even_share
from ..carried import Carried
from ..checkpoint import model_tensors
from ..config import TrainingConfig
from ..optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate
from ..passes import Direct, chosen_precision
from ..step import gradient_step
from ..taught import AnyObjective


class PlainEngine(Direct):
    """Trains ``model`` where it is; see ``Engine``."""

    rank, world_size = 0, 1

    def __init__(self, model: Trainable, config: TrainingConfig, carried: Carried) -> None:
        super().__init__(model, chosen_precision(config.precision, model.device))
        self.module: nn.Module = model
        self.carried = carried
        self._config, self._optimizer = config, make_optimizer(model, config)

    def share(self, batches: Sequence[Batch | None]) -> list[tuple[int, Batch, bool]]:
        """All batches."""
        return even_share(batches, rank=0, world_size=1)

    def own(self, objective: AnyObjective) -> AnyObjective:
        """All of it."""
        return objective

    def gradient_step(
        self, objectives: Sequence[tuple[int, AnyObjective, bool]], *, step: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """As ``Engine.gradient_step``."""
        return gradient_step(self, self._optimizer, objectives, self._config, self.carried, step=step)

    def set_learning_rate(self, learning_rate: float) -> None:
        """As ``Engine.set_learning_rate``."""
        set_learning_rate(self._optimizer, learning_rate)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values."""
        return [float(value) for value in values]

    def tensors(self) -> dict[str, Tensor]:
        """As ``Engine.tensors``."""
        return model_tensors(self.model)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As ``Engine.optimizer_tensors``."""
        return optimizer_tensors(self.model, self._optimizer)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """As ``Engine.load_optimizer``."""
        load_optimizer_tensors(self.model, self._optimizer, dict(tensors))

    def states(self) -> dict[int, BackboneState]:
        """What is carried."""
        return self.carried.states

    def close(self) -> None:
        """The model has its weights already."""

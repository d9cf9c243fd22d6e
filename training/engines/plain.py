"""Torch, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from ...models import Trainable
from ..batches import Batch, even_share
from ..carried import Carried
from ..checkpoint import model_tensors
from ..config import TrainingConfig
from ..long import loss_in_pieces
from ..objectives import Objective
from ..optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate
from ..step import autocast, chosen_precision, gradient_step, loss_sum
from ..taught import AnyObjective, language_model


class PlainEngine:
    """Trains ``model`` where it is; see ``Engine``."""

    rank, world_size = 0, 1

    def __init__(self, model: Trainable, config: TrainingConfig, carried: Carried) -> None:
        self.model, self.carried = model, carried
        self.module: nn.Module = model
        self.precision = chosen_precision(config.precision, model.device)
        self._config, self._optimizer = config, make_optimizer(model, config)

    def share(self, batches: Sequence[Batch]) -> list[tuple[int, Batch, bool]]:
        """All batches."""
        return even_share(batches, rank=0, world_size=1)

    def own(self, objective: AnyObjective) -> AnyObjective:
        """All of it."""
        return objective

    def loss_sum(self, objective: AnyObjective) -> Float[Tensor, ""]:
        """As ``Engine.loss_sum``."""
        tokens = self._config.max_length
        if self._config.long != "cut" and tokens is not None and isinstance(objective, Objective):
            cast = partial(autocast, self.precision, self.model.device)
            return loss_in_pieces(language_model(self.model), objective, tokens=tokens, cast=cast)
        with autocast(self.precision, self.model.device):
            return loss_sum(self.model, objective)

    def gradient_step(
        self, objectives: Sequence[tuple[int, AnyObjective, bool]], *, step: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """As ``Engine.gradient_step``."""
        taken = [objective for _, objective, _ in objectives]
        given = self.model, self._optimizer, taken, self._config
        return gradient_step(*given, step=step, precision=self.precision, carried=self.carried)

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

    def close(self) -> None:
        """The model has its weights already."""

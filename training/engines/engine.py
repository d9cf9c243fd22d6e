"""What the training loop asks of an engine, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import BackboneState
from ...errors import ConfigError
from ...models import Trainable
from ..batches import Batch
from ..carried import Carried
from ..passes import Passes
from ..taught import AnyObjective

ENGINES = ("plain", "deepspeed")


@dataclass(frozen=True)
class EngineConfig:
    """With what a model is trained. A run can be resumed with another engine, stage or number of processes.

    Attributes:
        name: "plain", torch in one process; or "deepspeed", in one or many.
        zero_stage: what DeepSpeed's processes share out among them (ZeRO, Rajbhandari et al. 2020): 0 nothing, 1 the
            optimiser's moments and the weights that it updates, 2 the gradients too, 3 the weights too.
        offload_optimizer: keep the moments, and update the weights, in the memory of the CPU; from stage 1 on.
        sequence_processes: so many processes share the tokens of each batch, for sequences too long for one (DeepSpeed
            Ulysses); the number of all processes and the heads of the backbone are multiples of it. Dropout, if there
            is any, then has other draws than in one process.
    """

    name: str = "plain"
    zero_stage: int = 2
    offload_optimizer: bool = False
    sequence_processes: int = 1

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"The engine is {self.name!r}; it can be {', '.join(ENGINES)}.")
        if self.zero_stage not in range(4):
            raise ConfigError(f"zero_stage is 0, 1, 2 or 3, not {self.zero_stage}.")
        if self.offload_optimizer and (self.name == "plain" or self.zero_stage == 0):
            raise ConfigError("offload_optimizer needs the engine deepspeed and a zero_stage of 1, 2 or 3.")
        if self.sequence_processes < 1 or (self.name == "plain" and self.sequence_processes > 1):
            raise ConfigError(
                f"sequence_processes is {self.sequence_processes}; it is at least 1, and 1 with the plain engine."
            )


@runtime_checkable
class Engine(Passes, Protocol):
    """One process of a run. What returns tensors or sums is called by all processes together.

    Attributes:
        rank: the number of this process; 0 alone writes files.
        world_size: how many processes there are.
        model: the model; with DeepSpeed it has its weights back after ``close``, and in ``forward`` there is a copy.
        module: what is trained, for its ``train`` and ``eval``.
        carried: the states with which this process's batches of the next step go on.
        precision: "fp32", or "bf16": autocast. Weights, moments and what is sent are float32 either way.
    """

    rank: int
    world_size: int
    model: Trainable
    module: nn.Module
    carried: Carried
    precision: str

    def share(self, batches: Sequence[Batch | None]) -> list[tuple[int, Batch, bool]]:
        """The batches that this process reads: number, sequences, and whether it counts; see ``batches.even_share``."""

    def own(self, objective: AnyObjective) -> AnyObjective:
        """What is this process's of an objective: all, or where several share its batch the tokens of this one."""

    def gradient_step(
        self, objectives: Sequence[tuple[int, AnyObjective, bool]], *, step: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Take step number ``step``; return the loss per counted token and the gradient norm, of all processes."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use ``learning_rate`` for the next step, each group its share of it."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, summed over the processes in float64."""

    def tensors(self) -> dict[str, Tensor]:
        """What ``checkpoint.model_tensors`` names, whole and in float32; on rank 0, elsewhere nothing."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What ``optimizer.optimizer_tensors`` names, whole; on rank 0, elsewhere nothing."""

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the optimiser's moments of a checkpoint, by whichever engine it was written.

        Raises:
            InputError: they belong to another model.
        """

    def states(self) -> dict[int, BackboneState]:
        """What all processes have carried, by the number of its batch; on rank 0, elsewhere nothing."""

    def close(self) -> None:
        """Give the model its weights back."""

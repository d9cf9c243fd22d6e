"""Engines: what takes a step of the one training loop, in one process or in many."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import ConfigError
from ...models import Trainable
from ..carried import Carried
from ..config import TrainingConfig
from ..taught import AnyObjective
from . import processes
from .engine import Engine, EngineConfig
from .plain import PlainEngine

__all__ = ["Engine", "EngineConfig", "PlainEngine", "barrier", "check_share", "make_engine", "prepare", "processes"]


def prepare(settings: EngineConfig, config: TrainingConfig, device: torch.device) -> tuple[int, int]:
    """Meet the other processes, before anything is written; return the number of this one and of all.

    Raises:
        MissingExtra: DeepSpeed is asked for and not installed.
        ConfigError: the engine is for one process and there are more, or the batches of a step cannot be shared out.
    """
    if settings.name == "plain":
        check_share(settings, config, processes.world_size())
        return 0, 1
    from .deepspeed import import_deepspeed

    import_deepspeed(device)
    processes.join(device)
    check_share(settings, config, torch.distributed.get_world_size())
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_share(settings: EngineConfig, config: TrainingConfig, world_size: int) -> None:
    """Raise ``ConfigError`` if so many processes cannot train together."""
    if settings.sequence_processes > 1 and config.long != "cut":
        raise ConfigError(
            f'long="{config.long}" has a state between the pieces of a sequence, and processes that share a batch '
            f"(engine.sequence_processes = {settings.sequence_processes}) have none. Use one or the other."
        )
    if settings.name == "plain" and world_size > 1:
        raise ConfigError(
            f"There are {world_size} processes, and the plain engine trains in one. Use the engine deepspeed "
            "(--engine deepspeed)."
        )
    if world_size % settings.sequence_processes:
        raise ConfigError(
            f"There are {world_size} processes, and {settings.sequence_processes} share a batch: the first "
            "number must be a multiple of the second (--set engine.sequence_processes)."
        )
    readers = world_size // settings.sequence_processes
    if config.accumulation % readers:
        shared = f", {settings.sequence_processes} to a batch" if settings.sequence_processes > 1 else ""
        raise ConfigError(
            f"accumulation is {config.accumulation}, the packed batches per step of all processes together, and there "
            f"are {world_size} processes{shared}: it must be a multiple of {readers} "
            f"(--set training.accumulation={readers})."
        )


def barrier(settings: EngineConfig) -> None:
    """Wait until every process of the run is here."""
    if settings.name != "plain":
        torch.distributed.barrier()


def make_engine(
    model: Trainable,
    config: TrainingConfig,
    settings: EngineConfig,
    *,
    example: Callable[[], AnyObjective],
    carried: Carried,
) -> Engine:
    """Return the engine that ``settings`` name, after ``prepare``; ``example`` makes an objective as the run's own are.

    Raises:
        ConfigError: nothing is trained, or the device has no bfloat16 and it is asked for.
    """
    if settings.name == "plain":
        return PlainEngine(model, config, carried)
    from .deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, settings, example=example(), carried=carried)

"""Averages of weights: of checkpoints of one run, and of runs that began with the same weights.

    theta = mean over j of theta_j      (Izmailov et al. 2018, arXiv:1803.05407; Wortsman et al. 2022, arXiv:2203.05482)

Runs that began elsewhere, or with another head, do not lie in one basin, and their mean is no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..models import LanguageModel, load
from ..models.weights import open_weights
from .checkpoint import SNAPSHOTS
from .record import read_record

Tensors = Mapping[str, Tensor]


def average(states: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return the mean of tensors by name, summed in float64, in their own dtype; those of integers must be equal.

    Raises:
        ConfigError: there are none, their names or shapes differ, or integers do.
    """
    if not states:
        raise ConfigError("There is nothing to average.")
    first = states[0]
    for number, other in enumerate(states[1:], 2):
        _check_same(first, other, number)
    means = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            if any(not torch.equal(tensor, other[name]) for other in states[1:]):
                raise ConfigError(f"{name} holds integers that differ; they have no average.")
            means[name] = tensor.clone()
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for other in states:
            total += other[name].to(total.device)
        means[name] = (total / len(states)).to(tensor.dtype)
    return means


def greedy_average(
    states: Sequence[Tensors], losses: Sequence[float], loss_of: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Average only what helps on held-out data (Wortsman et al. 2022, recipe 1).

    In the order of their losses, each state joins the average unless that makes its loss higher.

    Args:
        states: candidates.
        losses: of each by itself; lower is better.
        loss_of: tells the loss of an average.

    Returns:
        The average, and the places of its members in ``states``, best first.

    Raises:
        ConfigError: as ``average``; or there is not one loss for each state.
    """
    if len(losses) != len(states):
        raise ConfigError(f"There are {len(states)} states and {len(losses)} losses.")
    order = sorted(range(len(states)), key=lambda place: losses[place])
    members, best = order[:1], min(losses, default=0.0)
    for place in order[1:]:
        loss = loss_of(average([states[member] for member in [*members, place]]))
        if loss <= best:
            members, best = [*members, place], loss
    return average([states[member] for member in members]), members


def average_runs(folders: Sequence[str | Path]) -> LanguageModel:
    """Return the average of models that ``train`` left, each run with other seeds or data, from the same start.

    Raises:
        ConfigError: their weights differ in name or shape, or the runs began with different weights, of the head or of
            anything else, or do not say with which.
        InputError: a folder holds no model.
    """
    models: list[LanguageModel] = [load(folder) for folder in folders]
    starts: list[Any] = [read_record(folder).get("start") for folder in folders]
    for folder, start in zip(folders, starts, strict=True):
        if start is None:
            raise ConfigError(f"{folder} has no record.json that says with which weights the run began.")
        if start != starts[0]:
            raise ConfigError(
                f"The runs in {folders[0]} and {folder} began with different weights ({starts[0][:12]}, {start[:12]}), "
                "so their average is no model. Start them from one model, head included, with other seeds for the data."
            )
    means = average([model.state_dict() for model in models])
    model = models[0]
    model.load_state_dict(means)
    model.card.source = f"the average of {', '.join(str(folder) for folder in folders)}"
    model.card.metrics = {}
    return model


def read_snapshots(out: str | Path) -> dict[int, dict[str, Tensor]]:
    """Return what a run kept of its weights (``TrainingConfig.snapshot_every``), by step.

    Raises:
        InputError: it kept none, or a file is damaged.
    """
    files = sorted((Path(out) / SNAPSHOTS).glob("*.safetensors"), key=lambda file: int(file.stem))
    if not files:
        raise InputError("The run kept no snapshots.", path=out, hint="Train with snapshot_every=<steps>.")
    found = {}
    for file in files:
        with open_weights([file]) as weights:
            found[int(file.stem)] = {name: weights.read(name).clone() for name in weights.shapes}
    return found


def _check_same(first: Tensors, other: Tensors, number: int) -> None:
    odd = sorted(set(first) ^ set(other))
    if odd:
        raise ConfigError(f"State 1 and state {number} do not both have {odd[0]}, so they have no average.")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            shapes = f"{list(tensor.shape)} and {list(other[name].shape)}"
            raise ConfigError(f"{name} has the shapes {shapes} in state 1 and state {number}.")

"""TIES: several task vectors, what tuning added to one base, made into one (Yadav et al. 2023, arXiv:2306.01708).

1. trim:   keep of each task vector the share ``density`` with the largest magnitudes, 0 elsewhere
2. elect:  the sign of each entry is that of the sum over tasks
3. merge:  the mean over the tasks that agree with that sign and are not 0
theta = theta_0 + scale * merged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.adapters import attach_adapter, low_ranks_of
from ..models.low_rank import LowRank

Tensors = Mapping[str, Tensor]


def ties(tasks: Sequence[Tensors], *, density: float | int = 0.2) -> dict[str, Tensor]:
    """Return one task vector from several, each a tensor by name; where one has no tensor it has zeros.

    The share ``density`` is of a task vector as a whole, so that a tensor that tuning hardly moved keeps little of it.

    Raises:
        ConfigError: there are none, ``density`` is no share, or shapes differ.
    """
    if not tasks:
        raise ConfigError("There is nothing to merge.")
    if not 0 < density <= 1:
        raise ConfigError(f"density is a share above 0 and at most 1, not {density}.")
    names = list(dict.fromkeys(name for task in tasks for name in task))
    trimmed = [trim(task, density) for task in tasks]
    merged = {}
    for name in names:
        having = [task[name] for task in trimmed if name in task]
        if any(part.shape != having[0].shape for part in having):
            raise ConfigError(f"{name} has not the same shape in every task.")
        merged[name] = disjoint_mean(torch.stack(having))
    return merged


def trim(task: Tensors, density: float | int) -> dict[str, Tensor]:
    """Return a task vector with all but its largest entries 0; entries as large as the last one that is kept stay."""
    magnitudes = torch.cat([tensor.flatten().abs() for tensor in task.values()])
    kept = max(round(density * len(magnitudes)), 1)
    if not len(magnitudes) or kept >= len(magnitudes):
        return dict(task)
    least = magnitudes.kthvalue(len(magnitudes) - kept + 1).values
    return {name: torch.where(tensor.abs() >= least, tensor, 0) for name, tensor in task.items()}


def disjoint_mean(tasks: Float[Tensor, "tasks *shape"]) -> Float[Tensor, "*shape"]:
    """Return the mean over the tasks whose sign is that of the sum over tasks; 0 where the sum is."""
    sign = tasks.sum(0).sign()
    agrees = (tasks.sign() == sign) & (sign != 0)
    return (tasks * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def ties_models(
    base: Tensors, tuned: Sequence[Tensors], *, density: float | int = 0.2, scale: float | int = 1.0
) -> dict[str, Tensor]:
    """Return the weights of a base with several full tunings of it merged in.

    Raises:
        ConfigError: as ``ties``; or the names differ.
    """
    floats = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    for number, state in enumerate(tuned, 1):
        odd = sorted(set(base) ^ set(state))
        if odd:
            raise ConfigError(f"The base and model {number} do not both have {odd[0]}.")
    merged = ties([{name: state[name] - t for name, t in floats.items()} for state in tuned], density=density)
    return {**base, **{name: tensor + scale * merged[name] for name, tensor in floats.items()}}


def ties_adapters(
    model: nn.Module,
    names: Sequence[str],
    into: str = "merged",
    *,
    density: float | int = 0.2,
    scale: float | int = 1.0,
    rank: int | None = None,
) -> float:
    """Merge adapters of a model into a new one, and use it.

    A task vector is what an adapter adds to each weight, ``scale * up @ down``, not its two factors, whose signs mean
    nothing by themselves. The merged one is factored by singular values.

    Args:
        model: the base with the adapters on it.
        names: the adapters.
        into: name of the new one.
        density: share of each task vector that is kept.
        scale: factor on the merged task vector.
        rank: of the new adapter; None: as much as is needed to hold the merged task vector as it is.

    Returns:
        The share of the merged task vector's squared size that the rank holds, 1 for all of it.

    Raises:
        ConfigError: there is no such adapter, or one that is called ``into``; or as ``ties``.
    """
    tasks = []
    for name in names:
        low_ranks = low_ranks_of(model, name)
        if not low_ranks:
            raise ConfigError(f"The model has no adapter {name!r}.")
        tasks.append({map_name: low_rank.delta().detach() for map_name, low_rank in low_ranks.items()})
    merged = ties(tasks, density=density)
    factored, held, whole = {}, 0.0, 0.0
    for map_name, delta in merged.items():
        left, values, right = torch.linalg.svd(scale * delta, full_matrices=False)
        kept = values.shape[-1] if rank is None else min(rank, values.shape[-1])
        root = values[..., :kept].sqrt()
        down, up = root[..., None] * right[..., :kept, :], left[..., :kept] * root[..., None, :]
        factored[map_name] = LowRank(down.contiguous(), up.contiguous(), scale=1.0)
        held, whole = held + float(values[..., :kept].square().sum()), whole + float(values.square().sum())
    attach_adapter(model, factored, into)
    return held / whole if whole else 1.0

"""Training with the tokens of each batch shared by several processes (``backbones.sequence_parallel``).

Every process of a group makes the same objective of the same batch, which is a function of the seed, and takes the loss
of its own tokens:

    group, _ = dist.new_subgroups(group_size=processes)     # of the world; consecutive ranks share a batch
    objective = make_objective(batch, model, config, ...)   # the same in all of them: seed and rank of the group
    (loss_sum(model, share_objective(objective, group)) / total).backward()    # total: weight of the whole objectives
    sum_gradients(model.parameters())                       # over the world: groups have different batches

The sum of the losses over all processes is that of one process with all batches, and so are the summed gradients; the
norm that clipping needs is then the same everywhere. An engine that averages gradients over its W processes itself
(DeepSpeed, DistributedDataParallel) is given W times the loss in place of ``sum_gradients``. Dropout is drawn per
process: give each a seed of its own, or the shares of a batch have the same masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..sequences import share_batch
from .objectives import Objective
from .taught import AnyObjective, TaughtObjective

BUCKET = 2**24  # numbers that are summed in one call


def share_objective(
    objective: AnyObjective,
    group: dist.ProcessGroup | None = None,
    *,
    bounds: Sequence[int] | None = None,
) -> Objective:
    """Return this process's share of an objective that every process of the group has; see ``share_batch``.

    Its ``weight`` is that of the share: what divides the loss is the weight of the whole objective, the sum of all.

    Raises:
        ConfigError: as ``share_batch``; or it is what labels, preferences or a detector teach, of whole sequences.
    """
    if isinstance(objective, TaughtObjective):
        raise ConfigError(
            "Labels, preferences and detectors are of whole sequences: engine.sequence_processes is for plain ones."
        )
    batch = share_batch(objective.batch, group, bounds=bounds)
    if batch.share is None:  # there is one process
        return objective
    return Objective(batch, batch.share.cut(objective.targets), batch.share.cut(objective.weights))


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace the gradient of each parameter by its sum over the processes, in place.

    A parameter that has a gradient in some of them only counts as zero in the others, and gets one there; one that has
    none in all of them keeps none.
    """
    given = [parameter for parameter in parameters if parameter.requires_grad]
    if not given:
        return
    found = torch.tensor([parameter.grad is not None for parameter in given], dtype=torch.int32)
    found = found.to(given[0].device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    gradients = []
    for parameter, anywhere in zip(given, found.tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        joined = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(joined, group=group)
        for gradient, part in zip(bucket, torch.split(joined, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, of at most ``BUCKET`` numbers together; a larger one stands alone."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if not buckets or gradient.numel() > room or gradient.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets

"""One optimiser step, and the loss it goes down."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..models import Trainable
from ..sequences import PackedBatch, spans_in
from .batches import seed_of
from .carried import Carried, backward_carried
from .config import TrainingConfig
from .detector import detection
from .long import backward_in_pieces, loss_in_pieces, seed_draws
from .objectives import Objective, answer, causal, entity_masked, fill_in, glm, masked, replaced, span_masked, swapped
from .optimizer import clip_gradients
from .passes import Passes
from .taught import AnyObjective, TaughtBatch, TaughtObjective, language_model

MASKS, DROPOUT, VALIDATION = 1, 2, 3  # streams of random numbers
WITH_SHARE = {"masked": masked, "span-masked": span_masked, "swapped": swapped, "glm": glm}


def make_objective(batch: PackedBatch, model: Trainable, config: TrainingConfig, *seed: int) -> AnyObjective:
    """Return what is taught of a batch: what its data says, or of tokens the objective that ``config`` names.

    It is made on the CPU, with random numbers that are a function of ``seed``.
    """
    if isinstance(batch, TaughtBatch):
        return batch.objective(model)
    generator = torch.Generator().manual_seed(seed_of(config.seed, *seed))
    given = batch, language_model(model).vocabulary, generator
    if config.objective == "answer":
        return answer(*given, spans_in(batch))
    if config.objective == "entity-masked":
        share, entity_share, mode = config.mask_share, config.entity_share, config.entity_mode
        return entity_masked(*given, spans_in(batch), share=share, entity_share=entity_share, mode=mode)
    if config.objective == "replaced":
        return detection(replaced(*given, share=config.mask_share))
    if config.objective in WITH_SHARE:
        return WITH_SHARE[config.objective](*given, share=config.mask_share)
    return fill_in(*given) if config.objective == "fill-in" else causal(*given)


def untaught(model: Trainable, config: TrainingConfig) -> list[nn.Module]:
    """The heads of ``model`` that the objective that ``config`` names does not reach; they are frozen meanwhile."""
    model = language_model(model)
    heads = (model.head, model.contacts) if config.objective == "replaced" else (model.task,)
    return [head for head in heads if head is not None]


def loss_sum(model: Trainable, objective: AnyObjective) -> Float[Tensor, ""]:
    """Weighted sum of the losses, for tokens cross-entropies (nats); logits are made only where there is weight."""
    if isinstance(objective, TaughtObjective):
        return objective.loss_sum(model)
    model, device = language_model(model), model.device
    counted = objective.weights.nonzero()[:, 0]
    batch = objective.batch.to(device)
    hidden, _ = model.backbone(batch)
    at = counted.to(device) if len(counted) < len(objective.weights) else None
    logits = model.logits(hidden, batch, at).float()
    losses = F.cross_entropy(logits, objective.targets[counted].to(device), reduction="none")
    return (losses * objective.weights[counted].to(device)).sum()


def read_loss(passes: Passes, objective: AnyObjective, config: TrainingConfig) -> Float[Tensor, ""]:
    """``loss_sum``, of plain sequences in pieces where training reads them so."""
    if config.long != "cut" and config.max_length is not None and isinstance(objective, Objective):
        return loss_in_pieces(passes, objective, tokens=config.max_length)
    return passes.forward(partial(loss_sum, objective=objective))


def backward(
    passes: Passes,
    objectives: Sequence[tuple[int, AnyObjective, bool]],
    config: TrainingConfig,
    carried: Carried,
    *,
    step: int,
    scale: float,
    place: int = 0,
) -> Float[Tensor, ""]:
    """Add the gradient of a step to that of the parameters; return its loss, times ``scale``, without a graph.

    Args:
        passes: of what is trained.
        objectives: this process's batches: number, what each teaches, whether it counts. One that does not is read and
            weighs nothing.
        config: the settings.
        carried: with ``long="carry"`` the batches go on from these states, and leave theirs there.
        step: number of the step.
        scale: what the loss is multiplied by.
        place: of this process among those that share a batch, whose tokens do not share their draws.
    """
    loss = torch.zeros((), device=passes.model.device)
    for left, (number, objective, counted) in zip(reversed(range(len(objectives))), objectives, strict=True):
        seed = seed_of(config.seed, DROPOUT, step, number, *([place] if place else []))
        seed_draws(seed, passes.model.device)
        part, last = scale * counted, left == 0
        if config.long == "cut" or config.max_length is None or not isinstance(objective, Objective):
            taught = passes.forward(partial(loss_sum, objective=objective)) * part
            passes.backward(taught, last=last)
            loss += taught.detach()
        elif config.long == "whole":
            loss += backward_in_pieces(passes, objective, tokens=config.max_length, scale=part, last=last)
        else:
            loss += backward_carried(passes, objective, carried, number=number, counted=counted, scale=part, last=last)
    carried.end_step()
    return loss


def gradient_step(
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    objectives: Sequence[tuple[int, AnyObjective, bool]],
    config: TrainingConfig,
    carried: Carried,
    *,
    step: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Take step number ``step``, see ``backward``; return the mean loss per counted token and the gradient norm.

    The loss is divided by the weight of all batches together, so that several small ones equal one big one.
    """
    total = max(sum(objective.weight for _, objective, counted in objectives if counted), 1.0)
    optimizer.zero_grad(set_to_none=True)
    loss = backward(passes, objectives, config, carried, step=step, scale=1 / total)
    norm = clip_gradients(optimizer, config.clip)
    optimizer.step()
    return loss, norm

"""One optimiser step, and the loss it goes down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import Trainable
from ..sequences import PackedBatch, spans_in
from .batches import seed_of
from .carried import Carried, backward_carried
from .config import TrainingConfig
from .detector import detection
from .long import backward_in_pieces, seed_draws
from .objectives import Objective, answer, causal, entity_masked, fill_in, glm, masked, replaced, span_masked, swapped
from .optimizer import clip_gradients
from .taught import AnyObjective, TaughtBatch, TaughtObjective, language_model

MASKS, DROPOUT, VALIDATION = 1, 2, 3  # streams of random numbers
WITH_SHARE = {"masked": masked, "span-masked": span_masked, "swapped": swapped, "glm": glm}


def chosen_precision(precision: str, device: torch.device) -> str:
    """Tell what ``precision`` comes to on ``device``.

    Raises:
        ConfigError: bf16 is asked for on a GPU that does not have it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError("This GPU has no bfloat16; use precision fp32 or auto.")
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Context in which matrix products run in ``precision``; weights and states stay float32."""
    if precision == "fp32":
        return nullcontext()
    cast: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16)
    return cast


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


def backward(
    model: Trainable,
    objective: AnyObjective,
    config: TrainingConfig,
    carried: Carried | None,
    *,
    total: float,
    precision: str,
) -> Float[Tensor, ""]:
    """Add the gradient of the loss, divided by ``total``, to that of the parameters; return it without a graph."""
    cast = partial(autocast, precision, model.device)
    if config.long == "carry":
        assert carried is not None and isinstance(objective, Objective)
        return backward_carried(language_model(model), objective, carried, total=total, cast=cast)
    if config.long == "whole":
        assert config.max_length is not None and isinstance(objective, Objective)
        return backward_in_pieces(language_model(model), objective, tokens=config.max_length, total=total, cast=cast)
    with cast():
        loss = loss_sum(model, objective) / total
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def gradient_step(
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    objectives: Sequence[AnyObjective],
    config: TrainingConfig,
    *,
    step: int,
    precision: str,
    carried: Carried | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Take step number ``step`` on ``objectives``; return the mean loss per counted token and the gradient norm.

    With ``long="carry"`` their batches go on from the states in ``carried``, and leave theirs there.

    The loss is divided by the weight of all of them together, so that several small ones equal one big one.
    """
    total = max(sum(objective.weight for objective in objectives), 1.0)
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=model.device)
    for n, objective in enumerate(objectives):
        seed_draws(seed_of(config.seed, DROPOUT, step, n), model.device)
        loss += backward(model, objective, config, carried, total=total, precision=precision)
    if carried is not None:
        carried.end_step()
    norm = clip_gradients(optimizer, config.clip)
    optimizer.step()
    return loss, norm

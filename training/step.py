"""One optimiser step, and the loss it goes down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..models import LanguageModel
from ..sequences import PackedBatch, pack
from .config import TrainingConfig
from .data import Pieces, seed_of
from .objectives import Objective, causal, fill_in, glm, masked, span_masked, swapped
from .taught import TaughtBatch, TaughtObjective

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


def make_objective(
    batch: PackedBatch, model: LanguageModel, config: TrainingConfig, *seed: int
) -> Objective | TaughtObjective:
    """Return what is taught of a batch: what its data says, or of tokens the objective that ``config`` names.

    It is made on the CPU, with random numbers that are a function of ``seed``.
    """
    if isinstance(batch, TaughtBatch):
        return batch.objective(model)
    generator = torch.Generator().manual_seed(seed_of(config.seed, *seed))
    given = batch, model.vocabulary, generator
    if config.objective in WITH_SHARE:
        return WITH_SHARE[config.objective](*given, share=config.mask_share)
    return fill_in(*given) if config.objective == "fill-in" else causal(*given)


def loss_sum(model: LanguageModel, objective: Objective | TaughtObjective) -> Float[Tensor, ""]:
    """Weighted sum of the losses, for tokens cross-entropies (nats); logits are made only where there is weight."""
    if isinstance(objective, TaughtObjective):
        return objective.loss_sum(model)
    device = model.device
    counted = objective.weights.nonzero()[:, 0]
    batch = objective.batch.to(device)
    hidden, _ = model.backbone(batch)
    at = counted.to(device) if len(counted) < len(objective.weights) else None
    logits = model.logits(hidden, batch, at).float()
    losses = F.cross_entropy(logits, objective.targets[counted].to(device), reduction="none")
    return (losses * objective.weights[counted].to(device)).sum()


def gradient_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    config: TrainingConfig,
    *,
    step: int,
    precision: str,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Take step number ``step`` on ``batches``; return the mean loss per counted token and the gradient norm.

    The loss is divided by the weight of all batches together, so that several small ones equal one big one.
    """
    objectives = [make_objective(batch, model, config, MASKS, step, n) for n, batch in enumerate(batches)]
    total = max(sum(objective.weight for objective in objectives), 1.0)
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=model.device)
    for n, objective in enumerate(objectives):
        torch.manual_seed(seed_of(config.seed, DROPOUT, step, n))
        with autocast(precision, model.device):
            part = loss_sum(model, objective) / total
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
    optimizer.step()
    return loss, norm


@torch.inference_mode()
def validation_loss(model: LanguageModel, pieces: Pieces, config: TrainingConfig, precision: str) -> float:
    """Mean loss per counted token on held-out sequences; masks are the same every time."""
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0.0
    for n, indices in enumerate(pack(pieces.lengths, config.batch_tokens)):
        batch = pieces.batch(indices, vocabulary_size=len(model.vocabulary))
        objective = make_objective(batch, model, config, VALIDATION, n)
        with autocast(precision, model.device):
            total += float(loss_sum(model, objective))
        weight += objective.weight
    model.train(was_training)
    return total / max(weight, 1.0)

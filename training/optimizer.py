"""AdamW (Loshchilov and Hutter 2019) with weight decay on weight matrices only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import InputError
from .config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def decays(model: nn.Module, *, embeddings: bool = False) -> dict[str, bool]:
    """Tell for each trainable parameter, by name, whether it is decayed.

    Vectors, and whatever is a bias or belongs to a norm, are not; embeddings only where asked.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: parameter.ndim > 1
        and not any("bias" in part or "norm" in part for part in name.split("."))
        and (embeddings or id(parameter) not in tables)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, a group with decay and one without."""
    chosen = decays(model, embeddings=config.decay_embeddings)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n, yes in chosen.items() if yes], "weight_decay": float(config.weight_decay)},
        {"params": [parameters[n] for n, yes in chosen.items() if not yes], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(float(config.beta1), float(config.beta2)),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` for the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments by parameter name, for a safetensors file."""
    return {
        f"{name}/{moment}": optimizer.state[parameter][moment]
        for name, parameter in _trained(model)
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``.

    Raises:
        InputError: the tensors belong to another model.
    """
    foreign = set(tensors) - {f"{name}/{moment}" for name, _ in _trained(model) for moment in MOMENTS}
    if foreign:
        raise InputError(f"The optimiser state is of another model: it holds {min(foreign)}.")
    for name, parameter in _trained(model):
        if f"{name}/step" not in tensors:  # a parameter that no gradient has reached yet has no moments
            continue
        moments = {moment: tensors[f"{name}/{moment}"].to(parameter.device) for moment in MOMENTS}
        if moments["exp_avg"].shape != parameter.shape:
            raise InputError(f"The optimiser state is of another model (shape of {name}).")
        optimizer.state[parameter] = moments


def _trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)

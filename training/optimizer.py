"""AdamW (Loshchilov and Hutter 2019) with weight decay on weight matrices only, and a learning rate for each block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, InputError
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
    """AdamW over the trainable parameters, in groups of one weight decay and one share of the learning rate.

    Raises:
        ConfigError: nothing is trained.
    """
    chosen = decays(model, embeddings=config.decay_embeddings)
    if not chosen:
        raise ConfigError("Nothing is trained: every parameter is frozen.")
    shares = learning_rate_shares(model, float(config.layer_decay))
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, decayed in chosen.items():
        groups[shares[name], decayed].append(parameters[name])
    return torch.optim.AdamW(
        [
            {
                "params": groups[share, decayed],
                "weight_decay": float(config.weight_decay) if decayed else 0.0,
                "lr": config.learning_rate * share,
                "share": share,
            }
            for share, decayed in sorted(groups, reverse=True)
        ],
        betas=(float(config.beta1), float(config.beta2)),
        fused=True,
    )


def learning_rate_shares(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return for each trainable parameter, by name, its share of the learning rate; see ``layer_decay``."""
    names = [name for name, _ in _trained(model)]
    blocks = {name: found for name, _ in model.named_parameters() if (found := re.search(r"\bblocks\.(\d+)\.", name))}
    depth = 1 + max((int(found[1]) for found in blocks.values()), default=-1)

    def below_head(name: str) -> int:
        if name in blocks:
            return depth - int(blocks[name][1])
        return depth + 1 if name.startswith("backbone.") and not name.startswith("backbone.norm.") else 0

    return {name: layer_decay ** below_head(name) for name in names}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` for the next step, each group its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> Float[Tensor, ""]:
    """Scale the gradients so that their norm, of all together, is at most ``limit`` (0: any); return what it was.

    As ``torch.nn.utils.clip_grad_norm_``, which on a CPU scales by 1 too, and groups the tensors by device each time.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if norm.device.type != "cpu":  # a GPU is not waited for
        if limit > 0:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    elif 0 < limit < float(norm):
        torch._foreach_mul_(gradients, limit / (float(norm) + 1e-6))
    return norm


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

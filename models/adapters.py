"""Adapters: several on one base, one of them used at a time, by name.

>>> add_adapter(model, AdapterConfig(rank=8, targets=("backbone.blocks.*",)))   # frozen but for the adapter
>>> training.train(model, ...)                                                  # leaves a small adapter file
>>> load_adapter(models.load("base"), "runs/adapter")                           # elsewhere, onto the same base
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .low_rank import ADAPTED, PLAIN, LowRank, adapters_of, attach, base_weight, choose, merge


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter of low rank is.

    Attributes:
        rank: of the addition to each map; a map that cannot have so much gets as much as it can.
        alpha: the addition is scaled by alpha / rank.
        dropout: share of a map's inputs that its adapter does not see in training. Maps whose weights are read by
            others too (mLSTM gates, block-diagonal maps, the output matrix) have none.
        targets: patterns of names of linear maps, in which * is anything: ``"backbone.blocks.*.up"``, ``"head"``; see
            ``linear_maps``.
    """

    rank: int = 8
    alpha: float | int = 16.0
    dropout: float | int = 0.0
    targets: tuple[str, ...] = ("backbone.*",)

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ConfigError(f"rank and alpha are positive, not {self.rank} and {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is a share from 0 to below 1, not {self.dropout}.")
        if not self.targets:
            raise ConfigError('An adapter needs targets: patterns of names, such as "backbone.*".')


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name every linear map that can have an adapter.

    They are the dense and the block-diagonal maps of either backbone, mLSTM gates, and those of heads: ``"head"`` is
    the output matrix, unless it is tied to the embedding. A task head is trained itself and has none.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) in ADAPTED or type(module) in PLAIN)
        and module._parameters["weight"] is not None
        and not is_task(name)
    }


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default", *, seed: int = 0) -> None:
    """Add a fresh adapter to ``model`` and use it; it changes no output until it is trained.

    Everything else is frozen: only the adapter's parameters require gradients. Its weights are a function of the seed.

    Raises:
        ConfigError: a target names no linear map, or there is an adapter of that name.
    """
    maps = linear_maps(model)
    for target in config.targets:
        if not any(fnmatchcase(map_name, target) for map_name in maps):
            raise ConfigError(f"No linear map is called {target!r}; there are {', '.join(maps)}.")
    chosen = [map_name for map_name in maps if any(fnmatchcase(map_name, target) for target in config.targets)]
    generator = torch.Generator().manual_seed(seed)
    settings = {"scale": config.alpha / config.rank, "dropout": config.dropout}
    low_ranks = {
        map_name: LowRank.draw(base_weight(maps[map_name]), config.rank, **settings, generator=generator)
        for map_name in chosen
    }
    attach_adapter(model, low_ranks, name)


def attach_adapter(model: nn.Module, low_ranks: Mapping[str, LowRank], name: str) -> None:
    """Add an adapter that is there, one ``LowRank`` for each map by name, and use it.

    Raises:
        ConfigError: there is an adapter of that name, or the name cannot be one.
    """
    if name in adapter_names(model):
        raise ConfigError(f"The model has an adapter {name!r} already. Choose another name.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"An adapter cannot be called {name!r}.")
    maps = linear_maps(model)
    for map_name, low_rank in low_ranks.items():
        attach(maps[map_name], name, low_rank)
    use_adapter(model, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model, in the order in which they came."""
    return list(dict.fromkeys(name for module in linear_maps(model).values() for name in adapters_of(module)))


def used_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter in use, merged or not, or None."""
    return next((module.adapter for module in linear_maps(model).values() if getattr(module, "adapter", None)), None)  # type: ignore[return-value]


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Use another adapter, or with None the base as it was, bit for bit; a merged one is unmerged.

    The parameters of the adapter in use require gradients, and nothing else does.

    Raises:
        ConfigError: there is no such adapter.
    """
    if name is not None and name not in adapter_names(model):
        known = ", ".join(adapter_names(model)) or "none"
        raise ConfigError(f"The model has no adapter {name!r}; it has {known}.")
    model.requires_grad_(False)
    for module in linear_maps(model).values():
        choose(module, name)
    for low_rank in low_ranks_of(model, name).values():
        low_rank.requires_grad_(True)


def low_ranks_of(model: nn.Module, name: str | None) -> dict[str, LowRank]:
    """Return one adapter, by the names of the maps that it is on; empty for None."""
    found: dict[str, LowRank] = {}
    for map_name, module in linear_maps(model).items():
        carried = adapters_of(module)
        if name is not None and name in carried:
            found[map_name] = carried[name]  # type: ignore[assignment]
    return found


def merge_adapter(model: nn.Module) -> None:
    """Put the adapter in use into the weights: the same outputs to rounding, at the speed of the base.

    The old weights are kept: ``unmerge_adapter`` and ``use_adapter`` bring them back bit for bit, ``remove_adapters``
    lets them go. A merged adapter is not trained.

    Raises:
        ConfigError: no adapter is in use.
    """
    if used_adapter(model) is None:
        raise ConfigError("No adapter is in use, so there is nothing to merge.")
    for module in linear_maps(model).values():
        merge(module)
    model.requires_grad_(False)


def unmerge_adapter(model: nn.Module) -> None:
    """Take the adapter in use out of the weights again, and use it beside them."""
    use_adapter(model, used_adapter(model))


def remove_adapters(model: nn.Module) -> None:
    """Take all adapters away; a merged one stays in the weights for good. All parameters require gradients again."""
    for module in linear_maps(model).values():
        if getattr(module, "unmerged", None) is not None:
            del module.unmerged
        choose(module, None)
        module._modules.pop("adapters", None)
    model.requires_grad_(True)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the base by name, without adapters and task head, as they were before one was merged."""
    tensors = {
        name: t for name, t in model.state_dict().items() if ".adapters." not in f".{name}" and not is_task(name)
    }
    for name, module in linear_maps(model).items():
        tensors[f"{name}.weight" if name else "weight"] = base_weight(module)
    return tensors


def is_task(name: str) -> bool:
    """Tell whether a tensor of a model belongs to its task head, which an adapter's file holds too."""
    return name.startswith("task.")


def trainable_share(model: nn.Module) -> float:
    """Return the share of the parameters that is trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / max(sum(n for n, _ in counts), 1)

"""An adapter as a folder: ``adapter.safetensors`` with its weights, and ``adapter.json`` with what it belongs to.

An adapter that was trained on labels is worth nothing without the task head that learned with it, so that is there too.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbones import from_plain, to_plain
from ..errors import ConfigError, InputError
from ..sequences import check_file, replacing
from .adapters import attach_adapter, base_tensors, is_task, linear_maps, low_ranks_of, used_adapter
from .card import ModelCard, installed_versions
from .language_model import LanguageModel, add_task
from .low_rank import LowRank, base_weight
from .task import TaskConfig
from .weights import open_weights

FORMAT = 1
KIND = "adapter"
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
PARTS = ("down", "up")


def base_fingerprint(model: nn.Module) -> str:
    """Return the ``fingerprint`` of the base's weights, without adapters."""
    return fingerprint(base_tensors(model))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors (sha256), by name and shape.

    They are rounded to bfloat16 for it, so that a base loaded with ``dtype=torch.bfloat16`` is the same base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        bits = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(bits.contiguous().view(torch.uint8).cpu().numpy().tobytes() if bits.numel() else b"")
    return digest.hexdigest()


def save_adapter(
    model: nn.Module, folder: str | Path, name: str | None = None, *, card: ModelCard | None = None
) -> None:
    """Write one adapter, by default the one in use, to ``folder``; other files there stay.

    Raises:
        ConfigError: there is no such adapter.
        OutputError: the folder cannot be written, or the disk is full; what stood there before is untouched.
    """
    name = name or used_adapter(model)
    low_ranks = low_ranks_of(model, name)
    if name is None or not low_ranks:
        raise ConfigError(f"The model has no adapter {name!r} to save." if name else "No adapter is in use.")
    content = {
        "format": FORMAT,
        "kind": KIND,
        "name": name,
        "base": {"name": getattr(model, "name", ""), "sha256": base_fingerprint(model)},
        "maps": adapter_settings(model, name),
        "versions": installed_versions(),
        **({} if card is None else {"card": asdict(card)}),
    }
    tensors = {
        f"{map_name}.{part}": getattr(low_rank, part).detach().cpu().contiguous()
        for map_name, low_rank in low_ranks.items()
        for part in PARTS
    }
    if isinstance(model, LanguageModel) and model.task_config is not None:
        content["task"] = to_plain(model.task_config)
        tensors |= {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items() if is_task(key)}
    folder = Path(folder)
    with replacing(folder / CONFIG) as config_file, replacing(folder / WEIGHTS) as weights_file:
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def adapter_settings(model: nn.Module, name: str | None) -> dict[str, dict[str, float]]:
    """Return by the names of the maps that an adapter is on what is no tensor of it."""
    low_ranks = low_ranks_of(model, name)
    return {map_name: {"scale": one.scale, "dropout": one.dropout} for map_name, one in low_ranks.items()}


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> str:
    """Put a saved adapter on ``model``, the base that it was trained on, and use it; return its name.

    A task head that was trained with it takes the place of the model's.

    Args:
        model: the base; it may carry other adapters.
        folder: what ``save_adapter`` wrote.
        name: to use it by; None: the one it was saved with.

    Raises:
        InputError: the files are missing or damaged, or the adapter was trained on another base.
        ConfigError: the model has an adapter of that name.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    found = base_fingerprint(model)
    if config["base"]["sha256"] != found:
        raise InputError(
            f"The adapter was trained on another base ({config['base']['name'] or 'without a name'}, weights "
            f"{config['base']['sha256'][:12]}) than this model (weights {found[:12]}).",
            path=folder,
            hint="Load the model that it was trained on.",
        )
    low_ranks, task = _read_tensors(folder / WEIGHTS, config["maps"], linear_maps(model))
    name = name or str(config["name"])
    attach_adapter(model, low_ranks, name)
    if config.get("task") and isinstance(model, LanguageModel):
        _load_task(model, config["task"], task, folder)
    return name


def _load_task(model: LanguageModel, settings: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put the task head of an adapter on the model."""
    try:
        add_task(model, from_plain(TaskConfig, settings, what="task"))
        assert model.task is not None
        model.task.load_state_dict(dict(tensors))
    except (ConfigError, RuntimeError) as error:
        raise InputError(f"The task head is damaged ({error}).", path=folder / WEIGHTS) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(check_file(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"This is not JSON ({error}).", path=path) from None
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise InputError("This is not the configuration of an adapter.", path=path)
    if config.get("format") != FORMAT:
        raise InputError(f"The adapter is of format {config.get('format')}; this version reads {FORMAT}.", path=path)
    base = config.get("base")
    if not isinstance(base, dict) or not {"name", "sha256"} <= set(base) or not isinstance(config.get("maps"), dict):
        raise InputError("The configuration has no base, or no maps.", path=path)
    return config


def _read_tensors(
    path: Path, settings: dict[str, Any], maps: dict[str, nn.Module]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Read the weights of an adapter, on the devices of the maps that they belong to, and of its task head, if any."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    task: dict[str, Tensor] = {}
    with open_weights([path]) as weights:
        for key in weights.shapes:
            if is_task(key):
                task[key.removeprefix("task.")] = weights.read(key).clone()
                continue
            map_name, _, part = key.rpartition(".")
            parts[map_name][part] = weights.read(key).clone()
    low_ranks = {}
    for map_name, own in settings.items():
        found = parts.pop(map_name, {})
        if set(found) != set(PARTS) or map_name not in maps:
            raise InputError(f"The weights of the adapter on {map_name} are missing, or the map is.", path=path)
        down, up, weight = found["down"], found["up"], base_weight(maps[map_name])
        fits = down.ndim == up.ndim == weight.ndim and down.shape[-2] == up.shape[-1]
        if not fits or (*up.shape[:-1], down.shape[-1]) != tuple(weight.shape) or down.shape[:-2] != up.shape[:-2]:
            raise InputError(f"The adapter does not fit {map_name}, of shape {list(weight.shape)}.", path=path)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down, up = down.to(weight.device, dtype), up.to(weight.device, dtype)
        low_ranks[map_name] = LowRank(down, up, scale=own["scale"], dropout=own["dropout"])
    if parts:
        raise InputError(f"The adapter has weights on {min(parts)}, which its configuration does not name.", path=path)
    return low_ranks, task

"""Checkpoints: whole or not there, and enough to go on bit for bit.

A folder ``checkpoint/`` of ``model.safetensors`` (of what is trained; the caller has the frozen rest),
``optimizer.safetensors``, ``run.json`` (where the run stands, and the settings, data and model that it belongs to) and,
where sequences are read step after step (``long="carry"``), ``state.safetensors``.
No state of a random generator is in it: every draw of a run is a function of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..sequences import replacing
from .carried import Carried

FORMAT = 1
NAME = "checkpoint"
SNAPSHOTS = "snapshots"


@dataclass
class Standing:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        epoch: epoch under way, from 0.
        position: steps done in that epoch.
        tokens: tokens read.
        seconds: wall-clock seconds spent.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0


def find_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    A run killed in the instant between taking the old checkpoint away and putting the new one in its place leaves the
    old one under ``checkpoint.old``.
    """
    for folder in (out / NAME, out / f"{NAME}.old"):
        if (folder / "run.json").is_file():
            return folder
    return None


def write_checkpoint(
    out: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    standing: Standing,
    identity: Mapping[str, Any],
    *,
    carried: Carried | None = None,
) -> None:
    """Put a checkpoint in the place of the last one; a whole one is there at any moment.

    ``weights`` are those of ``model_tensors``, ``moments`` those of ``optimizer_tensors``: whole, whatever engine had
    them in parts, so that a run is resumed with any engine and any number of processes.

    Raises:
        OutputError: the disk is full or the folder cannot be written; the last checkpoint is untouched.
    """
    with replacing(out / NAME) as new:
        new.mkdir()
        save_file({name: t.contiguous() for name, t in weights.items()}, new / "model.safetensors")
        save_file(dict(moments), new / "optimizer.safetensors")
        if carried is not None:
            carried.write(new)
        run = {"format": FORMAT, "standing": asdict(standing), "identity": identity}
        (new / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")


def read_checkpoint(folder: Path, model: nn.Module, identity: Mapping[str, Any]) -> tuple[Standing, dict[str, Tensor]]:
    """Load a checkpoint's weights into ``model``; return where its run stands, and the optimiser's moments.

    Raises:
        ConfigError: it belongs to a run with other settings, data or model.
        InputError: its files are damaged.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if run["format"] != FORMAT:
            raise InputError(f"The checkpoint has format {run['format']}; this version reads {FORMAT}.", path=folder)
        standing = Standing(**run["standing"])
        other = run["identity"]
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"The checkpoint is damaged ({error}).", path=folder, hint="Start the run again.") from None
    differing = _differences(other, json.loads(json.dumps(identity)))
    if differing:
        raise ConfigError(
            f"The run in {folder.parent} was started with another {differing[0]}, so it cannot be resumed with this "
            "one. Use the settings it was started with, or choose another output folder."
        )
    own = model_tensors(model)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in weights.items()}:
        raise InputError("The checkpoint holds the weights of another model.", path=folder)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return standing, moments


def write_snapshot(out: Path, weights: Mapping[str, Tensor], step: int) -> None:
    """Keep the weights of what is trained, those of ``model_tensors``, as they are after ``step``.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with replacing(out / SNAPSHOTS / f"{step}.safetensors") as new:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, new)


def clear_leftovers(out: Path) -> None:
    """Remove what a killed run left half written."""
    for scratch in out.glob(f".{NAME}.*"):
        shutil.rmtree(scratch, ignore_errors=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers by name, tied ones once."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
            unique.setdefault(id(tensor), (name, tensor.detach()))
    return dict(unique.values())


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _differences(one: object, other: object, name: str = "") -> list[str]:
    """Names, with their values, at which two trees of plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [d for key in keys for d in _differences(one.get(key), other.get(key), f"{name}.{key}".strip("."))]
    if one == other:
        return []
    values = f" ({one}, now {other})" if max(len(str(one)), len(str(other))) < 40 else ""
    return [name + values]

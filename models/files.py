"""A language model as a folder: JSON for what it is, safetensors for the weights, Markdown for people.

Nothing is unpickled, and no name from a folder is imported as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import config_to_dict, to_plain
from ..errors import ConfigError, InputError
from ..sequences import check_file, replacing, tokenizer_from_dict, tokenizer_to_dict
from .build import build_model, wanted_dtypes
from .card import card_text, installed_versions
from .language_model import LanguageModel
from .weights import open_weights

FORMAT = 1
KIND = "language-model"
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"

Model = TypeVar("Model", bound=LanguageModel)


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write ``model`` to ``folder``; its three files replace older ones only when all three are written."""
    folder = Path(folder)
    card = replace(model.card, parameters=model.parameters_count, versions=model.card.versions or installed_versions())
    parts = {"backbone": config_to_dict(model.backbone.config), "head": to_plain(model.head.config)}
    if model.task_config is not None:
        parts["task"] = to_plain(model.task_config)
    config = {
        "format": FORMAT,
        "kind": KIND,
        "name": model.name,
        "tokenizer": tokenizer_to_dict(model.tokenizer),
        **parts,
        "card": asdict(card),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # Left in reverse order: the weights take their place first, config.json last, so that a folder with one is whole.
    with (
        replacing(folder / CONFIG) as config_file,
        replacing(folder / README) as readme_file,
        replacing(folder / WEIGHTS) as weights_file,
    ):
        save_file(tensors, weights_file, metadata={"format": "pt"})
        sections = {name.capitalize(): part for name, part in parts.items()}
        readme_file.write_text(card_text(model.name, card, sections), encoding="utf-8")
        config_file.write_text(text, encoding="utf-8")


def load_own(folder: Path, cls: type[Model], *, device: str | torch.device, dtype: torch.dtype | None) -> Model:
    """Read what ``save`` wrote, in evaluation mode; see ``load``."""
    config_file = check_file(folder / CONFIG)
    config = read_config(config_file)
    tokenizer = tokenizer_from_dict(config["tokenizer"])
    try:
        model = build_model(tokenizer, config, cls)
    except ConfigError as error:
        raise InputError(str(error), path=config_file) from None
    own = model.state_dict()
    wanted = dict(zip(own, wanted_dtypes(model, list(own), dtype), strict=True))
    model.load_state_dict(read_weights(folder / WEIGHTS, own, wanted, device=device), assign=True)
    return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a language model.

    Raises:
        InputError: it is not JSON, or not a language model of this format.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"This is not JSON ({error}).", path=path) from None
    if not isinstance(config, dict) or "format" not in config:
        raise InputError("This is not the configuration of a processive model.", path=path)
    if config["format"] != FORMAT:
        raise InputError(
            f"The model is of format {config['format']}; this version reads {FORMAT}.",
            path=path,
            hint="Use the version of processive that wrote it.",
        )
    if config.get("kind") != KIND:
        raise InputError(f"The folder holds a {config.get('kind')!r}, not a {KIND!r}.", path=path)
    for key, kind in {"name": str, "tokenizer": dict, "backbone": dict, "head": dict, "card": dict}.items():
        if not isinstance(config.get(key), kind):
            raise InputError(f"The configuration has no {key!r}.", path=path)
    if not isinstance(config["tokenizer"].get("name"), str):
        raise InputError("The tokenizer has no name.", path=path)
    return config


def read_weights(
    path: Path,
    expected: Mapping[str, Tensor],
    wanted: Mapping[str, torch.dtype | None],
    *,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file that are called and shaped as ``expected``.

    ``wanted`` is the dtype of each, None for the stored one.

    Raises:
        InputError: the file is missing or damaged, or tensors are missing, unknown or misshapen; all are named.
    """
    with open_weights([path]) as weights:
        found = weights.shapes
        wrong = [f"{name} is missing" for name in expected if name not in found]
        wrong += [f"{name} is unknown" for name in found if name not in expected]
        wrong += [
            f"{name} has shape {list(found[name])} in place of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name] != tuple(tensor.shape)
        ]
        if wrong:
            raise InputError(f"The weights do not fit config.json: {'; '.join(wrong)}.", path=path)
        tensors: dict[str, Tensor] = {}
        for name in expected:
            stored = weights.read(name)
            tensors[name] = stored.to(device, wanted[name] if stored.is_floating_point() else None)
            if tensors[name] is not stored:
                weights.let_go(stored)
    return tensors

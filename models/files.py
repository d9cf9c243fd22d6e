"""A language model as a folder: JSON for what it is, safetensors for the weights, Markdown for people.

Nothing is unpickled, and no name from a folder is imported as code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import config_from_dict, config_to_dict, from_plain
from ..backbones.layers import Linear
from ..errors import ConfigError, InputError
from ..sequences import check_file, replacing, tokenizer_from_dict, tokenizer_to_dict
from .card import ModelCard, card_text, installed_versions
from .head import Head, HeadConfig
from .hub import fetch, hub_name
from .language_model import LanguageModel

FORMAT = 1
KIND = "language-model"
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"

Model = TypeVar("Model", bound=LanguageModel)


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write ``model`` to ``folder``; its three files replace older ones only when all three are written."""
    folder = Path(folder)
    card = replace(model.card, parameters=model.parameters_count, versions=model.card.versions or installed_versions())
    parts = {"backbone": config_to_dict(model.backbone.config), "head": asdict(model.head.config)}
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
        sections = {"Backbone": parts["backbone"], "Head": parts["head"]}
        readme_file.write_text(card_text(model.name, card, sections), encoding="utf-8")
        config_file.write_text(text, encoding="utf-8")


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cls: type[Model] = LanguageModel,  # type: ignore[assignment]
) -> Model:
    """Read a model from a folder, in evaluation mode.

    Args:
        folder: what ``LanguageModel.save`` wrote, or ``hf://owner/name`` (see ``models.hub``).
        device: where the weights go.
        dtype: of the weights; None keeps the stored one. One narrower than float32 is for the matrices of the linear
            maps alone, nearly all of a model: embeddings, norms, gates, activations and states are float32, in contrast
            to ``model.to(dtype)``. With ``torch.bfloat16`` a token is decoded by reading half as much.
        cls: class of the model.

    Raises:
        InputError: a file is missing or damaged, of another format or kind, or a tensor is missing, extra or misshapen.
        ConfigError: the tokenizer is of a package that is not installed.
        MissingExtra: the model is on the hub, and huggingface_hub is not installed.
    """
    named = hub_name(folder)
    if named is not None:
        folder, named = fetch(named)
    config_file = check_file(_folder(folder) / CONFIG)
    config = read_config(config_file)
    tokenizer = tokenizer_from_dict(config["tokenizer"])
    try:
        with torch.device("meta"):
            model = cls(
                tokenizer,
                config_from_dict(config["backbone"]),
                from_plain(HeadConfig, config["head"], what="head"),
                name=str(config["name"]),
                card=from_plain(ModelCard, config["card"], what="card"),
            )
    except ConfigError as error:
        raise InputError(str(error), path=config_file) from None
    narrow = _matrices(model) if dtype is not None and dtype.itemsize < torch.float32.itemsize else None
    tensors = read_weights(config_file.parent / WEIGHTS, model.state_dict(), device=device, dtype=dtype, narrow=narrow)
    model.load_state_dict(tensors, assign=True)
    if named is not None:
        model.card.source = str(named)
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
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    narrow: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file that are called and shaped as ``expected``.

    ``narrow`` names those that take ``dtype``, the others then being float32; None: all of them do.

    Raises:
        InputError: the file is missing or damaged, or tensors are missing, unknown or misshapen; all are named.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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
                tensor = file.get_tensor(name)
                wanted = dtype if narrow is None or name in narrow else torch.float32
                tensors[name] = tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)
    except SafetensorError as error:
        raise InputError(f"The weights are damaged ({error}).", path=path, hint="Copy or train them again.") from None
    return tensors


def _matrices(model: LanguageModel) -> frozenset[str]:
    """Names of the matrices of the linear maps that take inputs wider than themselves."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear | Head))


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise InputError("There is no such folder.", path=path, hint="A model is a folder with config.json.")
    if not path.is_dir():
        raise InputError("A model is a folder, and this is a file.", path=path)
    return path

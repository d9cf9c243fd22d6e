"""A model from wherever it is: a folder of ours, another package's checkpoint, or a published name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import ConfigError, InputError
from ..sequences import Tokenizer
from . import hub, published
from .adapter_files import CONFIG as ADAPTER
from .files import CONFIG, load_own
from .foreign import load_foreign
from .language_model import LanguageModel
from .published import FAIR_ESM, LICENCES
from .weights import SAFETENSORS, TORCH, find_weights

Model = TypeVar("Model", bound=LanguageModel)


def load(
    path: str | Path,
    *,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cls: type[Model] = LanguageModel,  # type: ignore[assignment]
) -> Model:
    """Read a model, in evaluation mode.

    Args:
        path: what ``LanguageModel.save`` wrote, a folder or file of weights of another package, ``hf://owner/name``
            (see ``models.hub``), or one of fair-esm's names (``"esm2_t33_650M_UR50D"``), whose weights are downloaded
            into PyTorch's cache, or found there.
        format: of another package's checkpoint, one of ``backbones.formats.FORMATS`` by name; None: recognised.
        tokenizer: of another package's checkpoint, in place of the one beside its weights: for Geneformer
            ``cells.RankTokenizer.from_table(...)``, as what lies there is pickled.
        device: where the weights go.
        dtype: of the weights; None keeps the stored one. One narrower than float32 is for the matrices of the linear
            maps alone, nearly all of a model: embeddings, norms, gates, activations and states are float32, in contrast
            to ``model.to(dtype)``. With ``torch.bfloat16`` a token is decoded by reading half as much.
        cls: class of the model.

    Raises:
        InputError: a file is missing or damaged, the format or kind is not known, or a tensor is missing, extra or
            misshapen.
        ConfigError: the tokenizer is of a package that is not installed, or given for a model that has one, or there is
            no format of that name.
        MissingExtra: the model is on the hub, and huggingface_hub is not installed.
    """
    named = hub.hub_name(path)
    if named is not None:
        folder, commit = hub.fetch(named)
        model = load(folder, format=format, tokenizer=tokenizer, device=device, dtype=dtype, cls=cls)
        if model.name == folder.resolve().name:  # a folder of the cache, called by its commit
            model.name = named.repository.rpartition("/")[2]
        model.card.source = str(commit)
        model.card.licence = model.card.licence or hub.licence(folder)
        return model
    name, path = str(path), Path(path)
    if not path.exists() and name in FAIR_ESM:
        model = load_foreign(
            published.fetch(name), cls, format="fair-esm", device=device, dtype=dtype, tokenizer=tokenizer
        )
        model.card.licence = LICENCES[name]
        return model
    if not path.exists():
        raise InputError(
            "There is no such folder.",
            path=path,
            hint=f"A model is a folder with config.json, or one of {', '.join(FAIR_ESM)}.",
        )
    if path.is_file() and path.suffix not in (SAFETENSORS, *TORCH):
        raise InputError("A model is a folder or a file of weights, and this is a file of another kind.", path=path)
    if (path / "cell_bert").is_dir():
        hint = "Read it with cells.LangCell.load."
        raise InputError("This is LangCell, which is two networks and no language model.", path=path, hint=hint)
    if (path / ADAPTER).is_file() and not (path / CONFIG).is_file():
        hint = "Load the model that it was trained on, with adapter=<this folder>."
        raise InputError("This is an adapter, and no model by itself.", path=path, hint=hint)
    if format is None and path.is_dir() and _ours(path):
        if tokenizer is not None:
            raise ConfigError("A model of processive has its tokenizer; another one cannot be given.")
        return load_own(path, cls, device=device, dtype=dtype)
    return load_foreign(path, cls, format=format, device=device, dtype=dtype, tokenizer=tokenizer)


def _ours(folder: Path) -> bool:
    """Whether a folder is of our own format, or of none, so that what is missing is to be told of ours."""
    if not (folder / CONFIG).is_file():
        return not find_weights(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return True
    return isinstance(config, dict) and {"format", "kind"} <= set(config)

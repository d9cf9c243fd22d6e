"""A model as another package's checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import config_to_dict
from ..backbones.formats.table import to_theirs
from ..errors import needs
from ..sequences import replacing, tokenizer_to_dict
from .foreign import format_named
from .language_model import LanguageModel


def save_as(model: LanguageModel, folder: str | Path, format: str) -> None:
    """Write ``model`` to ``folder`` as a package other than ours reads it; older files go when all are written.

    Raises:
        OutputError: the folder cannot be written; what stood there before is untouched.
        ConfigError: there is no such format, or it cannot hold this model.
    """
    chosen = format_named(format)
    parts = {
        "tokenizer": tokenizer_to_dict(model.tokenizer),
        "backbone": config_to_dict(model.backbone.config),
        "head": asdict(model.head.config),
    }
    config = chosen.config_out(parts)
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = to_theirs(chosen.table(parts), own)
    kind = model.backbone.embedding.weight.dtype  # as a module of theirs cast to a dtype casts its buffers
    for name, constant in chosen.constants(parts).items():
        tensors[name] = constant.to(kind) if constant.is_floating_point() else constant
    copies = chosen.copies(parts)
    files: dict[str, Any] = chosen.files(config, tensors) | chosen.files_out(parts)
    with ExitStack() as stack:
        # Left in reverse order: the weights take their place first and the configuration last, as in files.save.
        places = {name: stack.enter_context(replacing(Path(folder) / name)) for name in files}
        for name, content in files.items():
            _write(places[name], content, copies)


def _write(path: Path, content: Any, copies: dict[str, str]) -> None:
    suffix = path.suffix
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    elif suffix == ".yaml":
        with needs("hub"):
            import yaml  # comes with huggingface_hub
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    elif suffix == ".safetensors":
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(_alone(content), path)

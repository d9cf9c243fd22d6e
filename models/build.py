"""From the dicts of a ``config.json`` to a model without weights, and in which dtype each weight is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..backbones import config_from_dict, from_plain
from ..backbones.layers import Linear
from ..sequences import Tokenizer
from .card import ModelCard
from .head import Head, HeadConfig
from .language_model import LanguageModel
from .task import TaskConfig

Model = TypeVar("Model", bound=LanguageModel)


def build_model(tokenizer: Tokenizer, config: Mapping[str, Any], cls: type[Model]) -> Model:
    """Return a model on the meta device: it has shapes and no memory.

    Raises:
        ConfigError: a value is unknown or wrong.
    """
    with torch.device("meta"):
        return cls(
            tokenizer,
            config_from_dict(config["backbone"]),
            from_plain(HeadConfig, config["head"], what="head"),
            task_config=from_plain(TaskConfig, config["task"], what="task") if config.get("task") else None,
            name=str(config["name"]),
            card=from_plain(ModelCard, config["card"], what="card"),
        )


def wanted_dtypes(model: LanguageModel, names: Sequence[str], dtype: torch.dtype | None) -> list[torch.dtype | None]:
    """Return the dtype that each tensor of floats is to have, None for the stored one.

    One narrower than float32 is for the matrices of the linear maps alone, nearly all of a model: embeddings, norms,
    gates, activations and states are float32.
    """
    if dtype is None or dtype.itemsize >= torch.float32.itemsize:
        return [dtype] * len(names)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear | Head)}
    return [dtype if name in matrices else torch.float32 for name in names]

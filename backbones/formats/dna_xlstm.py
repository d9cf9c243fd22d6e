"""DNA-xLSTM (Schmidinger et al. 2024, arXiv:2411.04165): a Lightning checkpoint and model_config.json.

* One model reads both ways by weight-tying ("tied") or with each block in its own direction; there the first block
  reads right to left. Rotary positions turn each head of q and k, after the gates have read them.
* With parameter sharing of both strands (``rcps``) every part of a block stands in a wrapper, ``.submodule.``, and the
  map of complements is stored twice. The released code turns the heads of the other strand around before their norm,
  which our ``legacy_head_flip`` does too; and it runs with sLSTM blocks alone.
* Its sLSTM cells are the xlstm package's "cuda" ones, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, InputError
from ..xlstm_config import XLSTMConfig
from .table import Checkpoint, CheckpointFormat, Entry, Parts, setting
from .values import refuse, trained_context
from .xlstm import backbone_in, cells_of, plain_head
from .xlstm_keys import STACK, canonical, has_stack, structure, xlstm_entries, xlstm_of

CELLS = "cuda"
READABLE = {
    "m_conv1d_causal": (True,),
    "s_conv1d_causal": (True,),
    "m_backend_bidirectional": (False,),  # one normaliser for both ways; no released model has it
}
MAPS = ("token_embedding.complement_map", "lm_head.complement_map")


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Their configuration: of the model as model_config.json has it, or inside of a whole experiment's config.json."""
    inner = config.get("model", config)
    inner = inner.get("config", inner) if isinstance(inner, Mapping) else {}
    return inner if isinstance(inner, Mapping) else {}


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "d_model" in _settings(config) and has_stack(names)


def _config_in(checkpoint: Checkpoint) -> Parts:
    config, shapes = _settings(checkpoint.config), checkpoint.shapes
    refuse(config, READABLE)
    found = structure(shapes, STACK)
    shared = setting(config, "rcps", bool, False)
    vocabulary_size = shapes[f"token_embedding.{'embedding.' if shared else ''}weight"][0]
    _check(config, found)
    rotary = setting(config, "m_position_embeddings", bool, False) and "mlstm" in (*found["blocks"], found["blocks"])
    backbone = {
        **backbone_in(found, vocabulary_size, told=setting(config, "m_proj_factor", float, 2.0)),
        "complement": checkpoint.read(MAPS[0]).tolist() if shared else None,
        "direction": _direction(config),
        "positions": "sinusoidal" if f"{STACK}absolute_pos_embeds.scale" in shapes else None,
        "rotary": "head" if rotary else None,
        "dropout": setting(config, "dropout", float, 0.0),
        "legacy_head_flip": shared,
    }
    return {
        "tokenizer": {"name": "dna"},
        "backbone": backbone,
        "head": {"kind": "linear"},
        "card": {"recipe": {"context": setting(config, "max_length", int, 1024)}},
        "foreign": {"cells": found.get("cells", CELLS)},
    }


def _direction(config: Mapping[str, Any]) -> str:
    if not setting(config, "bidirectional", bool, False):
        return "causal"
    return "alternating-first" if setting(config, "bidirectional_alternating", bool, False) else "tied"


def _check(config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse weights that are of another model than the configuration."""
    kinds = found["blocks"]
    kinds = [kinds] * found["depth"] if isinstance(kinds, str) else kinds
    slstm = [i for i, kind in enumerate(kinds) if kind == "slstm"]
    told = {"d_model": found["width"], "n_layer": found["depth"], "s_lstm_at": slstm}
    told |= {key: found["heads"] for key, kind in (("m_num_heads", "mlstm"), ("s_num_heads", "slstm")) if kind in kinds}
    for key, seen in told.items():
        if config.get(key) not in (None, seen):
            raise InputError(f"The configuration's {key!r} is {config[key]!r}, and the weights have {seen!r}.")
    if setting(config, "rcps", bool, False) and "mlstm" in kinds:
        raise InputError("With rcps, the code of DNA-xLSTM has sLSTM blocks alone.")


def _config_out(parts: Parts) -> dict[str, Any]:
    config = xlstm_of(parts)
    plain_head(parts["head"], tied=False)
    if set(config.kinds) - {"mlstm", "slstm"} or len(set(config.expansions)) > 1:
        raise ConfigError("A DNA-xLSTM has blocks mlstm and slstm, all mlstm blocks of one inner width.")
    if config.complement is not None and (not config.legacy_head_flip or "mlstm" in config.kinds):
        raise ConfigError(
            "With complements, the code of DNA-xLSTM has sLSTM blocks alone, and turns their heads around "
            "(legacy_head_flip): it would compute something else."
        )
    values = {
        "d_model": config.width,
        "n_layer": config.depth,
        "vocab_size": config.vocabulary_size,
        "pad_vocab_size_multiple": 8,
        "max_length": trained_context(parts),
        "tie_weights": False,
        "m_conv1d_kernel_size": config.convolution,
        "m_conv1d_causal": True,
        "m_qkv_proj_blocksize": config.projection_block,
        "m_num_heads": config.heads,
        "m_proj_factor": _rounded_down(config.inner_width(0), config.width, 64) if "mlstm" in config.kinds else 2.0,
        "m_backend": "parallel",
        "m_chunk_size": 64,
        "m_backend_bidirectional": False,
        "m_position_embeddings": config.rotary == "head",
        "m_bias": config.bias,
        "s_num_heads": config.heads,
        "s_conv1d_kernel_size": config.convolution,
        "s_conv1d_causal": True,
        "s_lstm_at": [i for i, kind in enumerate(config.kinds) if kind == "slstm"],
        **_feed_forward(config),
        "s_position_embeddings": config.positions == "sinusoidal",
        "dropout": config.dropout,
        "bidirectional": config.direction != "causal",
        "bidirectional_alternating": config.direction == "alternating-first",
        "rcps": config.complement is not None,
        "complement_map": None if config.complement is None else dict(enumerate(config.complement)),
    }
    return {"config": {"_target_": "models.dna_xlstm.modelling_xlstm.xLSTMConfig", **values}}


def _rounded_down(inner: int, width: int, multiple: int) -> float:
    """A factor of the width that gives an inner width, rounded down to a multiple."""
    factor = inner / width
    return factor if int(factor * width / multiple) * multiple == inner else (inner + 0.5) / width


def _feed_forward(config: XLSTMConfig) -> dict[str, Any]:
    """Their settings that give our feed-forward width: those of the released models where they do."""
    inner = config.gelu_width
    multiple = 8 if inner % 8 == 0 else 1
    factor = 1.1 if int(1.1 * config.width / multiple) * multiple == inner else None
    return {
        "s_proj_factor": factor or _rounded_down(inner, config.width, multiple),
        "s_round_proj_up_dim_up": False,
        "s_round_proj_up_to_multiple_of": multiple,
    }


def _constants(parts: Parts) -> dict[str, Tensor]:
    complement = xlstm_of(parts).complement
    return {} if complement is None else dict.fromkeys(MAPS, torch.tensor(complement, dtype=torch.long))


def _table(parts: Parts) -> list[Entry]:
    return xlstm_entries(parts, cells=cells_of(parts, CELLS))


DNA_XLSTM = CheckpointFormat(
    name="dna-xlstm",
    title="DNA-xLSTM",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    constants=_constants,
    canonical=canonical,
    files=lambda config, tensors: {
        "model_config.json": config,
        "loss.ckpt": {"state_dict": {f"model.backbone.{name}": tensor for name, tensor in tensors.items()}},
    },
)

"""Chem-xLSTM (Schmidinger et al. 2024, arXiv:2411.04165): model.pt and init_arguments.json.

The network is the xlstm package's. Their file says one head whatever the model has, so heads are counted in the
weights. Rows of the embedding beyond the tokens there are stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError, InputError
from ..layers import round_up
from .table import Checkpoint, CheckpointFormat, Entry, Parts, setting
from .values import refuse, trained_context
from .xlstm import backbone_in, cells_of, plain_head
from .xlstm_keys import STACK, canonical, has_stack, structure, xlstm_entries, xlstm_of

CELLS = "cuda"  # the only ones their classes ask for
READABLE = {"mode": ("smiles",)}
CLASSES = {"mlstm": "xLSTM", "slstm": "sLSTM"}  # sLSTM: their block 1 is one


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "token2label" in config and has_stack(names)


def _config_in(checkpoint: Checkpoint) -> Parts:
    config, shapes = checkpoint.config, checkpoint.shapes
    refuse(config, READABLE)
    found = structure(shapes, STACK)
    tokens = _tokens(config)
    backbone = backbone_in(found, shapes["token_embedding.weight"][0])
    return {
        "tokenizer": {"name": "smiles-segments", "tokens": tokens},
        "backbone": backbone,
        "head": {"kind": "linear"},
        "card": {"recipe": {"context": setting(config, "sequence_length", int, 99)}},
        "foreign": {"cells": found.get("cells", CELLS)},
    }


def _tokens(config: Mapping[str, Any]) -> list[str]:
    labels = config["token2label"]
    tokens = sorted(labels, key=labels.__getitem__)
    if [labels[token] for token in tokens] != list(range(len(tokens))):
        raise InputError("The configuration's token2label does not count its tokens from 0.")
    return tokens


def _config_out(parts: Parts) -> dict[str, Any]:
    config = xlstm_of(parts)
    plain_head(parts["head"], tied=False)
    tokenizer = parts["tokenizer"]
    if tokenizer["name"] != "smiles-segments":
        raise ConfigError("A Chem-xLSTM has the tokenizer smiles-segments.")
    slstm = [i for i, kind in enumerate(config.kinds) if kind == "slstm"]
    standard = {
        "slstm": slstm in ([], [1]),
        "convolution": config.convolution == 4,
        "projection_block": config.projection_block == 4,
        "expansion": set(config.expansions) == {2.0},
        "bias": not config.bias,
        "post_blocks_norm": config.post_blocks_norm,
        "feed_forward_width": config.gelu_width == round_up(1.3 * config.width, 64),
    }
    odd = [name for name, same in standard.items() if not same]
    if odd:
        raise ConfigError(f"The classes of Chem-xLSTM have no setting for {' and '.join(odd)}.")
    labels = {token: i for i, token in enumerate(tokenizer["tokens"])}
    return {
        "mode": "smiles",
        "model_dim": config.width,
        "state_dim": 64,  # of their other models
        "n_layers": config.depth,
        "n_heads": config.heads,
        "dropout": 0.25,  # of their other models; the xlstm package takes its own from elsewhere
        "vocab_size": config.vocabulary_size,
        "sequence_length": trained_context(parts),
        "n_max_epochs": 400,
        "learning_rate": 0.001,
        "batch_size": 2048,
        "device": "cpu",
        "n_augmentations": 0,
        "token2label": labels,
        "label2token": {str(i): token for token, i in labels.items()},
        "model_class": f"<class 'chemxlstm.model.{CLASSES['slstm' if slstm else 'mlstm']}Model'>",
    }


def _table(parts: Parts) -> list[Entry]:
    return xlstm_entries(parts, cells=cells_of(parts, CELLS))


CHEM_XLSTM = CheckpointFormat(
    name="chem-xlstm",
    title="Chem-xLSTM",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    canonical=canonical,
    files=lambda config, tensors: {
        "init_arguments.json": config,
        "model.pt": {f"model.{name}": tensor for name, tensor in tensors.items()},
    },
)

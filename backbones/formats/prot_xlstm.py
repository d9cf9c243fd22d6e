"""Prot-xLSTM (Schmidinger et al. 2024, arXiv:2411.04165): config.json and pytorch_model.bin, names under ``backbone.``.

Its rotary positions turn q and k over their full width, before the gates read them, and start anew at each homolog
(``bio.homolog_context``). A configuration may still speak of sLSTM blocks, which its code has not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError
from .table import Checkpoint, CheckpointFormat, Entry, Parts, setting
from .values import refuse, trained_context
from .xlstm import backbone_in, check, nested, plain_head
from .xlstm_keys import STACK, canonical, has_stack, structure, xlstm_entries, xlstm_of

READABLE = {"position_embeddings": ("none", "rot_1d")}
AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
TOKENIZER = {
    "name": "protein-letters",
    "tokens": [
        *("<cls>", "<pad>", "<eos>", "<unk>", *AMINO_ACIDS, "<null_1>", "<mask>"),
        *("<mask-1>", "<mask-2>", "<mask-3>", "<mask-4>", "<mask-5>"),
    ],
    # A homolog is at its end where the next one begins; <eos> stands before what was filled in.
    "roles": {"bos": "<cls>", "eos": "<cls>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    "before": ["<cls>"],
    "after": [],
}


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "position_embeddings" in config and has_stack(names)


def _config_in(checkpoint: Checkpoint) -> Parts:
    config, shapes = checkpoint.config, checkpoint.shapes
    refuse(config, READABLE)
    found = structure(shapes, STACK)
    vocabulary_size = shapes["token_embedding.weight"][0]
    check(config, found, vocabulary_size)
    backbone = {
        **backbone_in(found, vocabulary_size, told=nested(config, "mlstm_block.mlstm").get("proj_factor") or 2.0),
        "dropout": setting(config, "dropout", float, 0.0),
        "rotary": "width" if config["position_embeddings"] == "rot_1d" else None,
        "rotary_base": setting(config, "rope_base_frequency", float, 10000.0),
    }
    return {
        "tokenizer": TOKENIZER,
        "backbone": backbone,
        "head": {"kind": "linear", "tied": setting(config, "tie_weights", bool, False)},
        "card": {"recipe": {"context": setting(config, "context_length", int, 131072)}},
    }


def _config_out(parts: Parts) -> dict[str, Any]:
    config = xlstm_of(parts)
    tied = plain_head(parts["head"])
    if set(config.kinds) != {"mlstm"} or len(set(config.expansions)) > 1:
        raise ConfigError("A Prot-xLSTM has blocks mlstm alone, all of one inner width.")
    mlstm = {
        "conv1d_kernel_size": config.convolution,
        "qkv_proj_blocksize": config.projection_block,
        "num_heads": config.heads,
        "proj_factor": config.expansions[0],
        "round_proj_up_to_multiple_of": 64,
        "round_proj_up_dim_up": True,
        "backend": "chunkwise_variable",
        "chunk_size": 1024,
        "return_last_state": True,
    }
    return {
        "vocab_size": config.vocabulary_size,
        "embedding_dim": config.width,
        "num_blocks": config.depth,
        "mlstm_block": {"mlstm": mlstm},
        "context_length": trained_context(parts),
        "add_post_blocks_norm": config.post_blocks_norm,
        "bias": config.bias,
        "dropout": config.dropout,
        "checkpoint_blocks": False,
        "tie_weights": tied,
        "position_embeddings": "none" if config.rotary is None else "rot_1d",
        "rope_base_frequency": int(config.rotary_base),
        "max_position_embeddings": 2048,
        "max_seq_position_embeddings": 512,
    }


def _table(parts: Parts) -> list[Entry]:
    return xlstm_entries(parts, cells="vanilla")  # it has none


PROT_XLSTM = CheckpointFormat(
    name="prot-xlstm",
    title="Prot-xLSTM",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    canonical=canonical,
    copies=lambda parts: {"lm_head.weight": "token_embedding.weight"} if parts["head"].get("tied") else {},
    files=lambda config, tensors: {
        "config.json": config,
        "pytorch_model.bin": {f"backbone.{name}": tensor for name, tensor in tensors.items()},
    },
)

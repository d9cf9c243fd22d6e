"""ESM-2, ESM-1b and ESM-1v, as fair-esm's files hold them."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...sequences import tokenizer_from_dict
from .esm_parts import ENCODER, PROTEIN, QKV, UP, frequencies_out, head_in, precision_in
from .table import Checkpoint, CheckpointFormat, Entry, Join, Parts, entries, rows, setting, transformer_of
from .vocabularies import tokenizer_in

EMBEDDING, PAD = "backbone.embedding.weight", 1
TABLE: dict[str, str | tuple[str, ...]] = {
    EMBEDDING: "embed_tokens.weight",
    "backbone.blocks.{i}.norm.*": "layers.{i}.self_attn_layer_norm.*",
    QKV: ("layers.{i}.self_attn.q_proj.*", "layers.{i}.self_attn.k_proj.*", "layers.{i}.self_attn.v_proj.*"),
    "backbone.blocks.{i}.out.*": "layers.{i}.self_attn.out_proj.*",
    "backbone.blocks.{i}.feed_forward_norm.*": "layers.{i}.final_layer_norm.*",
    UP: "layers.{i}.fc1.*",
    "backbone.blocks.{i}.feed_forward.down.*": "layers.{i}.fc2.*",
    "backbone.norm.*": "emb_layer_norm_after.*",
    "head.dense.*": "lm_head.dense.*",
    "head.norm.*": "lm_head.layer_norm.*",
    "head.bias": "lm_head.bias",
}
CONTACTS: dict[str, str | tuple[str, ...]] = {"contacts.*": "contact_head.regression.*"}
POSITIONS: dict[str, str | tuple[str, ...]] = {"backbone.positions.weight": "embed_positions.weight"}
NORM_BEFORE: dict[str, str | tuple[str, ...]] = {"backbone.embedding_norm.*": "emb_layer_norm_before.*"}
OLDER = "roberta_large"  # what ESM-1b and ESM-1v call themselves; models before them had another architecture


def _spelled(name: str) -> str:
    return re.sub(r"^(encoder\.sentence_encoder\.|sentence_encoder\.|encoder\.)", "", name)


def _recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    known = isinstance(config.get("cfg"), Mapping) or isinstance(config.get("args"), Mapping)
    return known and any(_spelled(name).startswith("layers.0.self_attn.") for name in names)


def _in(checkpoint: Checkpoint) -> Parts:
    shapes, older = checkpoint.shapes, "cfg" not in checkpoint.config
    model = checkpoint.config["args"] if older else checkpoint.config["cfg"]["model"]
    if older and model.get("arch") != OLDER:
        raise InputError(
            f"Of the models before ESM-2 only ESM-1b and ESM-1v can be run; this is a {model.get('arch')!r}."
        )
    width, heads = setting(model, "encoder_embed_dim", int), setting(model, "encoder_attention_heads", int)
    size = shapes["embed_tokens.weight"][0]
    tokenizer = tokenizer_in(None, [PROTEIN], size)
    backbone: dict[str, Any] = ENCODER | {
        "vocabulary_size": size,
        "width": width,
        "depth": setting(model, "encoder_layers", int),
        "heads": heads,
        "token_dropout": _mask(tokenizer) if setting(model, "token_dropout", bool, not older) else None,
    }
    if older:
        rows_of_positions = setting(model, "max_positions", int) + PAD + 1
        backbone |= {
            "feed_forward_width": setting(model, "encoder_ffn_embed_dim", int),
            "positions": "absolute",
            "max_positions": rows_of_positions,
            "position_offset": PAD + 1,
            "embedding_norm": "emb_layer_norm_before.weight" in shapes,
        }
    else:
        name = "layers.0.self_attn.rot_emb.inv_freq"
        backbone["rotary_precision"] = precision_in(checkpoint, name, width // heads, 10000.0)
    return {"tokenizer": tokenizer, "backbone": backbone, "head": head_in("contact_head.regression.weight" in shapes)}


def _mask(tokenizer: Mapping[str, Any]) -> int:
    return tokenizer_from_dict(tokenizer).vocabulary.require("mask")


def _out(parts: Parts) -> dict[str, Any]:
    c = transformer_of(parts)
    model = {
        "arch": OLDER if c.positions == "absolute" else "esm2",
        "encoder_layers": c.depth,
        "encoder_embed_dim": c.width,
        "encoder_attention_heads": c.heads,
        "token_dropout": c.token_dropout is not None,
    }
    if c.max_positions is None:
        return {"cfg": {"model": model}}
    return {"args": model | {"encoder_ffn_embed_dim": c.inner, "max_positions": c.max_positions - c.position_offset}}


def _files(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """fair-esm tells a file by its name, and wants the contact head in a second one but for ESM-1v."""
    contacts = {name: tensor for name, tensor in tensors.items() if name.startswith("contact_head")}
    state = {
        f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}": tensor
        for name, tensor in tensors.items()
        if name not in contacts
    }
    name = "esm2" if "cfg" in config else "esm1b" if contacts else "esm1v"
    settings: dict[str, Any] = {}
    if "cfg" in config:
        settings["cfg"] = {"model": Namespace(**config["cfg"]["model"])}
    else:
        settings["args"] = Namespace(**config["args"])
    files: dict[str, Any] = {f"{name}.pt": {**settings, "model": state}}
    return files | ({f"{name}-contact-regression.pt": {"model": contacts}} if contacts else {})


def _table(parts: Parts) -> list[Entry]:
    c = transformer_of(parts)
    joins = {QKV: rows(c.width, c.width, c.width)}
    table = TABLE | (CONTACTS if parts["head"].get("contacts") else {}) | (NORM_BEFORE if c.embedding_norm else {})
    if c.positions == "absolute":
        table |= POSITIONS
        joins[EMBEDDING] = _unmasked(_mask(parts["tokenizer"]))
    return entries(table, depth=c.depth, joins=joins)


def _unmasked(mask: int) -> Join:
    """fair-esm empties the mask token's row when it reads ESM-1b, and the head is tied to it."""

    def merge(theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].index_fill(0, torch.tensor([mask]), 0)

    return Join(merge, lambda own: (own.clone(),))  # a copy, as theirs is no part of ours


def _constants(parts: Parts) -> dict[str, Tensor]:
    c = transformer_of(parts)
    layers = range(c.depth if c.rotates else 0)
    return {f"layers.{i}.self_attn.rot_emb.inv_freq": frequencies_out(parts) for i in layers}


FAIR_ESM = CheckpointFormat(
    name="fair-esm",
    title="ESM-2, ESM-1b and ESM-1v as fair-esm's .pt files",
    recognise=_recognised,
    config_in=_in,
    config_out=_out,
    table=_table,
    constants=_constants,
    canonical=_spelled,
    copies=lambda parts: {"lm_head.weight": "embed_tokens.weight"},
    files=_files,
)

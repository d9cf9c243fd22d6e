"""ESM-C, as its authors' .pth files and as transformers write it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...errors import ConfigError, InputError
from ...sequences import tokenizer_from_dict
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, rows, setting, transformer_of
from .vocabularies import tokenizer_in

PROTEIN = {"name": "protein", "chains": True}
HEAD_WIDTH = 64  # of every published ESM-C; their own files say nothing of heads
QKV, UP = "backbone.blocks.{i}.query_key_value.weight", "backbone.blocks.{i}.feed_forward.up.weight"
FINAL = 36  # blocks of the model whose residual branches are added as they are

BLOCK = "transformer.blocks.{i}."
ESMC_TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "embed.weight",
    "backbone.blocks.{i}.norm.*": BLOCK + "attn.layernorm_qkv.0.*",
    QKV: BLOCK + "attn.layernorm_qkv.1.weight",
    "backbone.blocks.{i}.query_norm.weight": BLOCK + "attn.q_ln.weight",
    "backbone.blocks.{i}.key_norm.weight": BLOCK + "attn.k_ln.weight",
    "backbone.blocks.{i}.out.weight": BLOCK + "attn.out_proj.weight",
    "backbone.blocks.{i}.feed_forward_norm.*": BLOCK + "ffn.0.*",
    UP: BLOCK + "ffn.1.weight",
    "backbone.blocks.{i}.feed_forward.down.weight": BLOCK + "ffn.3.weight",
    "backbone.norm.weight": "transformer.norm.weight",
    "head.dense.*": "sequence_head.0.*",
    "head.norm.*": "sequence_head.2.*",
    "head.weight": "sequence_head.3.weight",
    "head.bias": "sequence_head.3.bias",
}

LAYER = "esmc.layers.{i}."
HF_ESMC_TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "esmc.embed_tokens.weight",
    "backbone.blocks.{i}.norm.*": LAYER + "input_layernorm.*",
    QKV: (LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
    "backbone.blocks.{i}.query_norm.weight": LAYER + "self_attn.q_norm.weight",
    "backbone.blocks.{i}.key_norm.weight": LAYER + "self_attn.k_norm.weight",
    "backbone.blocks.{i}.out.weight": LAYER + "self_attn.o_proj.weight",
    "backbone.blocks.{i}.feed_forward_norm.*": LAYER + "post_attention_layernorm.*",
    UP: (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
    "backbone.blocks.{i}.feed_forward.down.weight": LAYER + "mlp.down_proj.weight",
    "backbone.norm.weight": "esmc.norm.weight",
    "head.dense.*": "lm_head.dense.*",
    "head.norm.*": "lm_head.layer_norm.*",
    "head.weight": "lm_head.decoder.weight",
    "head.bias": "lm_head.decoder.bias",
}


def _parts(
    tokenizer: dict[str, Any], *, rows: int, width: int, depth: int, heads: int, inner: int, base: float
) -> Parts:
    backbone = {
        "family": "transformer",
        "vocabulary_size": rows,
        "width": width,
        "depth": depth,
        "heads": heads,
        "direction": "bidirectional",
        "norm": "layer",
        "activation": "swiglu",
        "feed_forward_width": inner,
        "norm_bias": True,
        "post_blocks_norm_bias": False,
        "qk_norm": "width",
        "residual_scale": math.sqrt(FINAL / depth),
        "rotary_base": base,
        "rotary_precision": "float32",
    }
    return {"tokenizer": tokenizer, "backbone": backbone, "head": {"kind": "esm", "tied": False}}


def _own_recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "embed.weight" in names and "transformer.blocks.0.attn.layernorm_qkv.1.weight" in names


def _own_in(checkpoint: Checkpoint) -> Parts:
    shapes = checkpoint.shapes
    size, width = shapes["embed.weight"]
    if width % HEAD_WIDTH:
        raise InputError(f"The width is {width}; ESM-C has heads of {HEAD_WIDTH} channels.")
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("transformer.blocks."))
    inner = shapes["transformer.blocks.0.ffn.3.weight"][1]
    tokenizer = tokenizer_in(None, [PROTEIN], size)
    return _parts(tokenizer, rows=size, width=width, depth=depth, heads=width // HEAD_WIDTH, inner=inner, base=10000.0)


def _own_out(parts: Parts) -> dict[str, Any]:
    c = transformer_of(parts)
    if c.head_dim != HEAD_WIDTH:
        raise ConfigError(f"ESM-C's own files have heads of {HEAD_WIDTH} channels; this model has {c.head_dim}.")
    return {}


def _own_files(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"esmc.pth": tensors}


def _hf_in(checkpoint: Checkpoint) -> Parts:
    c = checkpoint.config
    width, heads = setting(c, "hidden_size", int), setting(c, "num_attention_heads", int)
    wanted = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "head_dim": width // heads,
        "num_key_value_heads": heads,
    }
    for name, value in wanted.items():
        if c.get(name, value) not in (value, None):
            raise InputError(f"Models with {name} {c[name]!r} cannot be run; {value!r} is needed.")
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"Rotary positions of the type {rope['rope_type']!r} cannot be run.")
    size = setting(c, "vocab_size", int)
    return _parts(
        tokenizer_in(checkpoint.folder, [PROTEIN], size),
        rows=size,
        width=width,
        depth=setting(c, "num_hidden_layers", int),
        heads=heads,
        inner=setting(c, "intermediate_size", int),
        base=setting(rope, "rope_theta", float, 10000.0),
    )


def _hf_out(parts: Parts) -> dict[str, Any]:
    c, vocabulary = transformer_of(parts), tokenizer_from_dict(parts["tokenizer"]).vocabulary
    return {
        "architectures": ["EsmcForMaskedLM"],
        "model_type": "esmc",
        "vocab_size": c.vocabulary_size,
        "hidden_size": c.width,
        "intermediate_size": c.inner,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": float(c.rotary_base), "rope_type": "default"},
        "tie_word_embeddings": False,
        "mask_token_id": vocabulary.role("mask"),
        "pad_token_id": vocabulary.role("pad"),
        "bos_token_id": vocabulary.role("bos"),
        "eos_token_id": vocabulary.role("eos"),
    }


def _hf_table(parts: Parts) -> list[Entry]:
    c = transformer_of(parts)
    joins = {QKV: rows(c.width, c.width, c.width), UP: rows(c.inner, c.inner)}
    return entries(HF_ESMC_TABLE, depth=c.depth, joins=joins)


ESMC = CheckpointFormat(
    name="esmc",
    title="ESM-C as its authors' .pth files",
    recognise=_own_recognised,
    config_in=_own_in,
    config_out=_own_out,
    table=lambda parts: entries(ESMC_TABLE, depth=parts["backbone"]["depth"]),
    files=_own_files,
)

HF_ESMC = CheckpointFormat(
    name="hf-esmc",
    title="ESM-C in transformers",
    recognise=lambda config, names: config.get("model_type") == "esmc",
    config_in=_hf_in,
    config_out=_hf_out,
    table=_hf_table,
    files_out=lambda parts: {"tokenizer_config.json": json.dumps({"tokenizer_class": "EsmcTokenizer"}) + "\n"},
)

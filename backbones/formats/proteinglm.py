"""xTrimoPGLM (ProteinGLM): a ChatGLM of proteins with DeepNorm, as its own code stores it.

Facts of Chen et al. 2024 (arXiv:2401.06199) and of the released checkpoints: q, k and v of one head lie together, the
first half of the gated feed-forward is the one that is not activated, and a block's skip is its own norm's output,
times sqrt(2 depth).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, InputError
from ...sequences import tokenizer_class, tokenizer_to_dict
from .table import Checkpoint, CheckpointFormat, Entry, Join, Parts, setting
from .values import SIZES, affine, head_must_hold, must_hold, refuse, transformer_of

MODEL_TYPES = ("ProteinGLM", "xTrimoPGLM")
READABLE: dict[str, tuple[Any, ...]] = {
    "glu_activation": ("geglu", "swiglu"),
    "rmsnorm": (False,),
    "moe": (False,),
    "untie_head": (False,),
    "quantization_bit": (0,),
    "add_bias_linear": (True,),
}
FREE = SIZES | {"direction", "key_value_heads", "head_width", "norm_placement", "skip_scale", "activation", "positions"}
FREE |= {"post_blocks_norm"}
CAUSAL_NAME = "ProteinGLMForCasualLM"  # as their code spells it
PROMPT = ("<gmask>", "<sop>", "<eos>")  # what a sequence to be generated follows
CONTEXT = 2048


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") in MODEL_TYPES and "transformer.output_layer.weight" in names


def _config_in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    refuse(config, READABLE)
    depth, heads = setting(config, "num_layers", int), setting(config, "num_attention_heads", int)
    width, causal = setting(config, "hidden_size", int), setting(config, "is_causal", bool, False)
    head_width = setting(config, "kv_channels", int, width // heads)
    shared = setting(config, "multi_query_attention", bool, False)
    deepnorm = setting(config, "deepnorm", bool, True)
    # Their code sets the second wherever the first is set.
    deep = deepnorm or setting(config, "apply_residual_connection_post_layernorm", bool, True)
    backbone = {
        "family": "transformer",
        "vocabulary_size": setting(config, "padded_vocab_size", int),
        "width": width,
        "depth": depth,
        "heads": heads,
        "key_value_heads": setting(config, "multi_query_group_num", int, 1) if shared else heads,
        "head_width": None if head_width * heads == width else head_width,
        "direction": "causal" if causal else "bidirectional",
        "norm": "layer",
        "norm_placement": "deep" if deep else "pre",
        "skip_scale": math.sqrt(2 * depth) if deepnorm else 1.0,
        "activation": setting(config, "glu_activation", str, "geglu"),
        "feed_forward_width": setting(config, "ffn_hidden_size", int),
        "bias": True,
        "positions": "rotary-2d" if setting(config, "rotary_embedding_2d", bool, False) else "rotary",
        "dropout": setting(config, "hidden_dropout", float, 0.0),
        "norm_eps": setting(config, "layernorm_epsilon", float, 1e-5),
        "post_blocks_norm": setting(config, "post_layer_norm", bool, True),
    }
    return {
        "tokenizer": _tokenizer_in(checkpoint, causal=causal),
        "backbone": backbone,
        "head": {"kind": "linear", "tied": False, "bias": True},
        "card": {"recipe": {"context": setting(config, "seq_length", int, CONTEXT)}},
    }


def _tokenizer_in(checkpoint: Checkpoint, *, causal: bool) -> dict[str, Any]:
    path = checkpoint.folder / "tokenizer.model"  # a plain list of tokens in spite of its name
    if not path.is_file():
        raise InputError("There is no tokenizer.model beside the weights.", path=checkpoint.folder)
    roles = {"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}
    before = PROMPT if causal else ()
    tokenizer = tokenizer_class("protein-letters").from_file(path, roles=roles, before=before, after=("<eos>",))
    return tokenizer_to_dict(tokenizer)


def _config_out(parts: Parts) -> dict[str, Any]:
    config, head = transformer_of(parts), parts["head"]
    must_hold(config, fixed={"norm": "layer", "bias": True}, free=FREE)
    deepnorm = config.norm_placement == "deep" and math.isclose(config.skip_scale, math.sqrt(2 * config.depth))
    fits = {
        "direction": config.direction in ("causal", "bidirectional"),
        "norm_placement": config.norm_placement in ("deep", "pre"),
        "skip_scale": deepnorm or config.skip_scale == 1,
        "activation": config.activation in READABLE["glu_activation"],
        "positions": config.positions in ("rotary", "rotary-2d"),
    }
    for name, fit in fits.items():
        if not fit:
            raise ConfigError(f"This format holds no model with {name} {getattr(config, name)!r}.")
    head_must_hold(head, {"kind": "linear", "tied": False, "bias": True})
    causal = config.direction == "causal"
    return {
        "architectures": [CAUSAL_NAME if causal else "ProteinGLMForMaskedLM"],
        "model_type": MODEL_TYPES[0],
        "padded_vocab_size": config.vocabulary_size,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "kv_channels": config.head_dim,
        "multi_query_attention": config.kv_heads != config.heads,
        "multi_query_group_num": config.kv_heads if config.kv_heads != config.heads else 1,
        "ffn_hidden_size": config.inner,
        "glu_activation": config.activation,
        "hidden_dropout": config.dropout,
        "layernorm_epsilon": config.norm_eps,
        "deepnorm": deepnorm,
        "apply_residual_connection_post_layernorm": config.norm_placement == "deep",
        "post_layer_norm": config.post_blocks_norm,
        "rotary_embedding_2d": config.positions == "rotary-2d",
        "is_causal": causal,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "rmsnorm": False,
        "moe": False,
        "quantization_bit": 0,
        "seq_length": parts.get("card", {}).get("recipe", {}).get("context", CONTEXT),
    }


def _per_head(heads: int, head_width: int) -> Join:
    """Rows that lie q|k|v within each head there, and heads within each of q|k|v here."""

    def swapped(tensor: Tensor, outer: int, inner: int) -> Tensor:
        parts = tensor.reshape(outer, inner, head_width, *tensor.shape[1:])
        return parts.transpose(0, 1).reshape(tensor.shape)

    return Join(lambda theirs: swapped(theirs[0], heads, 3), lambda own: (swapped(own, 3, heads),))


def _halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


UP_GATE = Join(lambda theirs: _halves(theirs[0]), lambda own: (_halves(own),))


def _table(parts: Parts) -> list[Entry]:
    config = transformer_of(parts)
    together = {} if config.kv_heads != config.heads else {"join": _per_head(config.heads, config.head_dim)}
    entries = affine("backbone.embedding", "transformer.embedding.word_embeddings", bias=False)
    for i in range(config.depth):
        own, theirs = f"backbone.blocks.{i}", f"transformer.encoder.layers.{i}"
        entries += affine(f"{own}.norm", f"{theirs}.input_layernorm")
        entries += affine(f"{own}.query_key_value", f"{theirs}.self_attention.query_key_value", **together)
        entries += affine(f"{own}.out", f"{theirs}.self_attention.dense")
        entries += affine(f"{own}.feed_forward_norm", f"{theirs}.post_attention_layernorm")
        entries += affine(f"{own}.feed_forward.up", f"{theirs}.mlp.dense_h_to_4h", UP_GATE)
        entries += affine(f"{own}.feed_forward.down", f"{theirs}.mlp.dense_4h_to_h")
    if config.post_blocks_norm:
        entries += affine("backbone.norm", "transformer.encoder.final_layernorm")
    return [*entries, *affine("head", "transformer.output_layer")]


def _constants(parts: Parts) -> dict[str, Tensor]:
    """Their rotary frequencies, which follow from the width of a head."""
    config = transformer_of(parts)
    width = config.head_dim // 2 if config.positions == "rotary-2d" else config.head_dim
    turns = 1.0 / config.rotary_base ** (torch.arange(0, width, 2).float() / width)
    names = (f"transformer.encoder.layers.{i}.self_attention.rotary_emb.inv_freq" for i in range(config.depth))
    return dict.fromkeys(names, turns)


def _files_out(parts: Parts) -> dict[str, str | bytes]:
    return {"tokenizer.model": "\n".join(parts["tokenizer"]["tokens"])} if "tokens" in parts["tokenizer"] else {}


PROTEINGLM = CheckpointFormat(
    name="proteinglm",
    title="xTrimoPGLM (ProteinGLM)",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    constants=_constants,
    files_out=_files_out,
)

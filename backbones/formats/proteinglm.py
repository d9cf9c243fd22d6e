"""xTrimoPGLM (ProteinGLM): a ChatGLM of proteins with DeepNorm, as its own code stores it.

Chen et al. 2024 (arXiv:2401.06199), and how the released checkpoints lie: q, k and v of one head side by side, in the
gated feed-forward the half that is not activated first; each half block's skip is the output of its own norm, times
sqrt(2 depth).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.rotary import PRECISIONS, rotary_frequencies
from ...sequences import tokenizer_class, tokenizer_to_dict
from .table import Checkpoint, CheckpointFormat, Entry, Join, Parts, entries, setting, transformer_of
from .values import CONTEXT, refuse, trained_context

BLOCK, LAYER = "backbone.blocks.{i}.", "transformer.encoder.layers.{i}."
QKV, UP = BLOCK + "query_key_value.*", BLOCK + "feed_forward.up.*"
TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "transformer.embedding.word_embeddings.weight",
    BLOCK + "norm.*": LAYER + "input_layernorm.*",
    QKV: LAYER + "self_attention.query_key_value.*",
    BLOCK + "out.*": LAYER + "self_attention.dense.*",
    BLOCK + "feed_forward_norm.*": LAYER + "post_attention_layernorm.*",
    UP: LAYER + "mlp.dense_h_to_4h.*",
    BLOCK + "feed_forward.down.*": LAYER + "mlp.dense_4h_to_h.*",
    "head.*": "transformer.output_layer.*",
}
FINAL_NORM: dict[str, str | tuple[str, ...]] = {"backbone.norm.*": "transformer.encoder.final_layernorm.*"}
FREQUENCIES = LAYER + "self_attention.rotary_emb.inv_freq"

MODEL_TYPE = "ProteinGLM"
MODEL_TYPES = (MODEL_TYPE.lower(), "xtrimopglm")
MASKED_NAME, CAUSAL_NAME = "ProteinGLMForMaskedLM", "ProteinGLMForCasualLM"  # as their code spells it
READABLE: dict[str, tuple[Any, ...]] = {
    "glu_activation": ("geglu", "swiglu"),
    "rmsnorm": (False,),
    "moe": (False,),
    "untie_head": (False,),
    "quantization_bit": (0,),
    "add_bias_linear": (True,),
}
PROMPT = ("<gmask>", "<sop>", "<eos>")  # what a sequence to be generated follows
VOCABULARY = "tokenizer.model"  # a plain list of tokens in spite of its name


def _recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return str(config.get("model_type")).lower() in MODEL_TYPES and "transformer.output_layer.weight" in names


def _in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    refuse(config, READABLE)
    depth, heads = setting(config, "num_layers", int), setting(config, "num_attention_heads", int)
    width, causal = setting(config, "hidden_size", int), setting(config, "is_causal", bool, False)
    head_width = setting(config, "kv_channels", int, width // heads)
    shared = setting(config, "multi_query_attention", bool, False)
    deepnorm = setting(config, "deepnorm", bool, True)
    # Their code sets the second wherever the first is set.
    deep = deepnorm or setting(config, "apply_residual_connection_post_layernorm", bool, True)
    two = setting(config, "rotary_embedding_2d", bool, False)
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
        "positions": "rotary-2d" if two else "rotary",
        "rotary_precision": _precision(checkpoint, head_width // 2 if two else head_width),
        "dropout": setting(config, "hidden_dropout", float, 0.0),
        "norm_eps": setting(config, "layernorm_epsilon", float, 1e-5),
        "post_blocks_norm": setting(config, "post_layer_norm", bool, True),
    }
    return {
        "tokenizer": _tokenizer_in(checkpoint, causal=causal),
        "backbone": backbone,
        "head": {"kind": "linear", "bias": True},
        "card": {"recipe": {"context": setting(config, "seq_length", int, CONTEXT)}},
    }


def _precision(checkpoint: Checkpoint, channels: int) -> str:
    """Precision of the rotary frequencies: theirs are of the weights' dtype, and stored with them or not."""
    name = FREQUENCIES.format(i=0)
    if name not in checkpoint.shapes:
        dtype = setting(checkpoint.config, "torch_dtype", str, "float32")
        return dtype if dtype in PRECISIONS else "float32"
    stored = checkpoint.read(name).double()
    for precision in PRECISIONS:
        expected = torch.from_numpy(rotary_frequencies(channels, 10000.0, precision))
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-6, atol=0):
            return precision
    raise InputError(f"The rotary frequencies in {name} do not follow from {channels} channels.")


def _tokenizer_in(checkpoint: Checkpoint, *, causal: bool) -> dict[str, Any]:
    if checkpoint.tokenizer is not None:
        return dict(checkpoint.tokenizer)
    path = checkpoint.folder / VOCABULARY
    if not path.is_file():
        raise InputError(f"There is no {VOCABULARY} beside the weights.", path=checkpoint.folder)
    roles = {"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}
    before = PROMPT if causal else ()
    tokenizer = tokenizer_class("protein-letters").from_file(path, roles=roles, before=before, after=("<eos>",))
    return tokenizer_to_dict(tokenizer)


def _out(parts: Parts) -> dict[str, Any]:
    config = transformer_of(parts)
    causal, shared = config.direction == "causal", config.kv_heads != config.heads
    return {
        "architectures": [CAUSAL_NAME if causal else MASKED_NAME],
        "model_type": MODEL_TYPE,
        "padded_vocab_size": config.vocabulary_size,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "kv_channels": config.head_dim,
        "multi_query_attention": shared,
        "multi_query_group_num": config.kv_heads if shared else 1,
        "ffn_hidden_size": config.inner,
        "glu_activation": config.activation,
        "hidden_dropout": float(config.dropout),
        "layernorm_epsilon": float(config.norm_eps),
        "deepnorm": config.norm_placement == "deep" and config.skip_scale != 1,
        "apply_residual_connection_post_layernorm": config.norm_placement == "deep",
        "post_layer_norm": config.post_blocks_norm,
        "rotary_embedding_2d": config.positions == "rotary-2d",
        "is_causal": causal,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "rmsnorm": False,
        "moe": False,
        "quantization_bit": 0,
        "seq_length": trained_context(parts),
    }


def _per_head(heads: int, head_width: int) -> Join:
    """Rows that lie q|k|v within each head there, and heads within each of q|k|v here."""

    def swapped(tensor: Tensor, outer: int, inner: int) -> Tensor:
        parts = tensor.reshape(outer, inner, head_width, *tensor.shape[1:])
        return parts.transpose(0, 1).reshape(tensor.shape)

    return Join(lambda theirs: swapped(theirs[0], heads, 3), lambda own: (swapped(own, 3, heads),))


def _halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _table(parts: Parts) -> list[Entry]:
    config = transformer_of(parts)
    joins = {UP: Join(lambda theirs: _halves(theirs[0]), lambda own: (_halves(own),))}
    if config.kv_heads == config.heads:
        joins[QKV] = _per_head(config.heads, config.head_dim)
    return entries(TABLE | (FINAL_NORM if config.post_blocks_norm else {}), depth=config.depth, joins=joins)


def _constants(parts: Parts) -> dict[str, Tensor]:
    config = transformer_of(parts)
    channels = config.head_dim // 2 if config.positions == "rotary-2d" else config.head_dim
    turns = torch.from_numpy(rotary_frequencies(channels, float(config.rotary_base), config.rotary_precision)).float()
    return {FREQUENCIES.format(i=i): turns.clone() for i in range(config.depth)}


PROTEINGLM = CheckpointFormat(
    name="proteinglm",
    title="xTrimoPGLM (ProteinGLM)",
    recognise=_recognised,
    config_in=_in,
    config_out=_out,
    table=_table,
    constants=_constants,
    files_out=lambda parts: {VOCABULARY: "\n".join(parts["tokenizer"].get("tokens", ()))},
)

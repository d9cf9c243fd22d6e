"""xLSTM-7B and its kind: ``xlstm_large`` of the xlstm package (NX-AI), and transformers' ``xLSTMForCausalLM``.

Both hold the same tensors but for the name of the embedding. Weights of one kind may stand in one matrix
(``weight_mode: fused``) or each in its own (``single``); both are read, and ``single`` is written, which is what either
loader expects.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError, InputError
from ..xlstm_config import XLSTMConfig
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, reshaped, rows, setting
from .tokenizers import tokenizer_of_files
from .values import refuse, trained_context
from .xlstm import tokenizer_in, tokenizer_out
from .xlstm_keys import xlstm_of

READABLE = {"use_bias": (False,), "v_dim_factor": (1,), "quantization_config": ()}
FIRST = "backbone.blocks.0.norm_mlstm.weight"
OWN = "backbone.blocks.{i}"
LAYER = "backbone.blocks.{i}.mlstm_layer"
FEED_FORWARD = "backbone.blocks.{i}.ffn"
BLOCK: dict[str, str | tuple[str, ...]] = {
    f"{OWN}.norm.weight": f"{OWN}.norm_mlstm.weight",
    f"{OWN}.head_norm.weight": f"{LAYER}.multihead_norm.weight",
    f"{OWN}.out.weight": f"{LAYER}.out_proj.weight",
    f"{OWN}.feed_forward_norm.weight": f"{OWN}.norm_ffn.weight",
    f"{OWN}.feed_forward.down.weight": f"{FEED_FORWARD}.proj_down.weight",
}
SINGLE: dict[str, str | tuple[str, ...]] = {
    f"{OWN}.query_key_value_output.weight": tuple(f"{LAYER}.{name}.weight" for name in ("q", "k", "v", "ogate_preact")),
    f"{OWN}.gates.*": (f"{LAYER}.igate_preact.*", f"{LAYER}.fgate_preact.*"),
    f"{OWN}.feed_forward.up.weight": (f"{FEED_FORWARD}.proj_up_gate.weight", f"{FEED_FORWARD}.proj_up.weight"),
}
FUSED: dict[str, str | tuple[str, ...]] = {
    f"{OWN}.query_key_value_output.weight": f"{LAYER}.qkv_opreact.weight",
    f"{OWN}.gates.*": f"{LAYER}.ifgate_preact.*",
    f"{OWN}.feed_forward.up.weight": f"{FEED_FORWARD}.proj_up_gate_z.weight",
}
HUGGING_FACE = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}


def _recognise_large(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return FIRST in names and "embedding.weight" in names


def _recognise_hf(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return FIRST in names and "backbone.embeddings.weight" in names


def _large_in(checkpoint: Checkpoint) -> Parts:
    return _config_in(checkpoint, checkpoint.config, "embedding.weight")


def _hf_in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    named = {ours: config.get(theirs, config.get(ours)) for ours, theirs in HUGGING_FACE.items()}
    return _config_in(checkpoint, {**config, **named, "add_out_norm": True}, "backbone.embeddings.weight")


def _config_in(checkpoint: Checkpoint, config: Mapping[str, Any], embedding: str) -> Parts:
    refuse(config, READABLE)
    shapes = checkpoint.shapes
    fused = "backbone.blocks.0.mlstm_layer.qkv_opreact.weight" in shapes
    vocabulary_size, width = shapes[embedding]
    depth = sum(name.endswith(".norm_mlstm.weight") for name in shapes)
    _check(config, {"embedding_dim": width, "num_blocks": depth, "vocab_size": vocabulary_size})
    if fused:
        qk_width = shapes["backbone.blocks.0.mlstm_layer.qkv_opreact.weight"][0] // 2 - width
        heads = shapes["backbone.blocks.0.mlstm_layer.ifgate_preact.weight"][0] // 2
    else:
        qk_width = shapes["backbone.blocks.0.mlstm_layer.q.weight"][0]
        heads = shapes["backbone.blocks.0.mlstm_layer.igate_preact.weight"][0]
    _check(config, {"num_heads": heads})
    feed_forward = shapes["backbone.blocks.0.ffn.proj_down.weight"][1]
    backbone = {
        "family": XLSTMConfig.family,
        "vocabulary_size": vocabulary_size,
        "width": width,
        "depth": depth,
        "heads": heads,
        "blocks": "mlstm-7b",
        "qk_factor": _share(qk_width, width, setting(config, "qk_dim_factor", float, 0.5)),
        "gate_cap": _cap(config, "gate_soft_cap", 15.0),
        "feed_forward_width": None if feed_forward == _published_width(width) else feed_forward,
        "norm_eps": setting(config, "norm_eps", float, 1e-6),
        "post_blocks_norm": setting(config, "add_out_norm", bool, True),
    }
    return {
        "tokenizer": _tokenizer_in(checkpoint, vocabulary_size),
        "backbone": backbone,
        "head": {"kind": "linear", "soft_cap": _cap(config, "output_logit_soft_cap", 30.0)},
        "card": {},
        "foreign": {"fused": fused},
    }


def _tokenizer_in(checkpoint: Checkpoint, vocabulary_size: int) -> dict[str, Any]:
    if any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return tokenizer_of_files(checkpoint.folder)
    return tokenizer_in(checkpoint, vocabulary_size)


def _cap(config: Mapping[str, Any], key: str, default: float) -> float | None:
    """A soft cap, None where the key is there and null: then nothing is capped."""
    return None if key in config and config[key] is None else setting(config, key, float, default)


def _check(config: Mapping[str, Any], seen: Mapping[str, int]) -> None:
    for key, value in seen.items():
        if config.get(key) not in (None, value):
            raise InputError(f"The configuration's {key!r} is {config[key]!r}, and the weights have {value}.")


def _share(qk_width: int, width: int, told: float | int) -> float | int:
    """The factor of the width that gives q and k theirs, rounding down: ``told`` where it does."""
    candidates = (told, qk_width / width, (qk_width + 0.5) / width)
    return next(factor for factor in candidates if int(factor * width) == qk_width)


def _published_width(width: int) -> int:
    return math.floor((2.667 * width + 63) / 64) * 64


def _values_out(parts: Parts) -> dict[str, Any]:
    """What both configurations say in the same words."""
    config, head = xlstm_of(parts), parts["head"]
    if set(config.kinds) != {"mlstm-7b"}:
        raise ConfigError("This format has blocks mlstm-7b alone.")
    if head.get("kind", "linear") != "linear" or head.get("tied") or head.get("bias") or head.get("conditions"):
        raise ConfigError("This format's head is one linear map of its own, without bias or conditions.")
    return {
        "vocab_size": config.vocabulary_size,
        "num_heads": config.heads,
        "use_bias": False,
        "norm_eps": config.eps("mlstm-7b"),
        "add_out_norm": config.post_blocks_norm,
        "qk_dim_factor": config.qk_factor,
        "v_dim_factor": 1.0,
        "gate_soft_cap": config.gate_cap,
        "output_logit_soft_cap": head.get("soft_cap"),
        **_feed_forward(config),
        "weight_mode": "single",
    }


def _feed_forward(config: XLSTMConfig) -> dict[str, Any]:
    """Settings that give either package our feed-forward width."""
    inner, width = config.swiglu_width, config.width
    if inner == _published_width(width):
        return {"ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64}
    factor = inner / width if math.floor(inner / width * width) == inner else (inner + 0.5) / width
    return {"ffn_proj_factor": factor, "ffn_round_up_to_multiple_of": 1}


def _large_out(parts: Parts) -> dict[str, Any]:
    config = xlstm_of(parts)
    return {"embedding_dim": config.width, "num_blocks": config.depth, **_values_out(parts), **_kernels("train")}


def _hf_out(parts: Parts) -> dict[str, Any]:
    config = xlstm_of(parts)
    if not config.post_blocks_norm:
        raise ConfigError("transformers' xLSTM has a norm after the last block whatever its configuration says.")
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "hidden_size": config.width,
        "embedding_dim": config.width,
        "num_hidden_layers": config.depth,
        "num_blocks": config.depth,
        **_values_out(parts),
        **_kernels("inference"),
        "tie_word_embeddings": False,
        "max_inference_chunksize": max(16384, trained_context(parts)),
    }


def _kernels(mode: str) -> dict[str, Any]:
    """Kernels that run without a GPU; the package's own defaults do not."""
    return {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": mode,
        "return_last_states": mode == "inference",
    }


def _table(parts: Parts, embedding: str) -> list[Entry]:
    config = xlstm_of(parts)
    qk, width, inner = config.qk_width, config.width, config.swiglu_width
    table = BLOCK | (FUSED if parts.get("foreign", {}).get("fused") else SINGLE)
    table |= {"backbone.embedding.weight": embedding, "head.weight": "lm_head.weight"}
    if config.post_blocks_norm:
        table["backbone.norm.weight"] = "backbone.out_norm.weight"
    joins = {f"{OWN}.head_norm.weight": reshaped((config.heads, -1), (-1,))}
    if not parts.get("foreign", {}).get("fused"):
        joins |= {
            f"{OWN}.query_key_value_output.weight": rows(qk, qk, width, width),
            f"{OWN}.gates.*": rows(config.heads, config.heads),
            f"{OWN}.feed_forward.up.weight": rows(inner, inner),
        }
    return entries(table, depth=config.depth, joins=joins)


XLSTM_LARGE = CheckpointFormat(
    name="xlstm-large",
    title="xLSTM-7B (xlstm_large of the xlstm package)",
    recognise=_recognise_large,
    config_in=_large_in,
    config_out=_large_out,
    table=lambda parts: _table(parts, "embedding.weight"),
    files=lambda config, tensors: {"config.yaml": config, "model.safetensors": tensors},
    files_out=tokenizer_out,
)

HF_XLSTM = CheckpointFormat(
    name="hf-xlstm",
    title="xLSTM-7B (transformers)",
    recognise=_recognise_hf,
    config_in=_hf_in,
    config_out=_hf_out,
    table=lambda parts: _table(parts, "backbone.embeddings.weight"),
    files_out=tokenizer_out,
)

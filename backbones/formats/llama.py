"""Llama and Mistral as transformers stores them: GENERator (DNA), ProLLaMA (proteins), Llama itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import InputError
from ...sequences import tokenizer_from_dict
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, rows, setting, transformer_of
from .tokenizers import kmer_files, role_ids, tokenizer_files, tokenizer_of_files
from .values import CONTEXT, read_json, refuse, trained_context

BLOCK, LAYER = "backbone.blocks.{i}.", "model.layers.{i}."
QKV, UP = BLOCK + "query_key_value.", BLOCK + "feed_forward.up."
TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "model.embed_tokens.weight",
    BLOCK + "norm.weight": LAYER + "input_layernorm.weight",
    QKV + "weight": tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
    BLOCK + "out.weight": LAYER + "self_attn.o_proj.weight",
    BLOCK + "feed_forward_norm.weight": LAYER + "post_attention_layernorm.weight",
    UP + "weight": (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
    BLOCK + "feed_forward.down.weight": LAYER + "mlp.down_proj.weight",
    "backbone.norm.weight": "model.norm.weight",
}
ATTENTION_BIAS: dict[str, str | tuple[str, ...]] = {
    QKV + "bias": tuple(f"{LAYER}self_attn.{part}_proj.bias" for part in "qkv"),
    BLOCK + "out.bias": LAYER + "self_attn.o_proj.bias",
}
FEED_FORWARD_BIAS: dict[str, str | tuple[str, ...]] = {
    UP + "bias": (LAYER + "mlp.gate_proj.bias", LAYER + "mlp.up_proj.bias"),
    BLOCK + "feed_forward.down.bias": LAYER + "mlp.down_proj.bias",
}
UNTIED: dict[str, str | tuple[str, ...]] = {"head.weight": "lm_head.weight"}

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "GENERatorForCausalLM"),  # GENERator's class adds no parameter
    "mistral": ("MistralForCausalLM",),
}
GENERATOR_TOKENIZER = "DNAKmerTokenizer"
READABLE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
}


def _recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") in ARCHITECTURES and "model.embed_tokens.weight" in names


def _in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    kind = setting(config, "model_type", str)
    refuse(config, READABLE)
    for name in config.get("architectures") or ():
        refuse({"architectures": name}, {"architectures": ARCHITECTURES[kind]})
    heads, width = setting(config, "num_attention_heads", int), setting(config, "hidden_size", int)
    head_width = setting(config, "head_dim", int, width // heads)
    backbone = {
        "family": "transformer",
        "vocabulary_size": setting(config, "vocab_size", int),
        "width": width,
        "depth": setting(config, "num_hidden_layers", int),
        "heads": heads,
        "key_value_heads": setting(config, "num_key_value_heads", int, heads),
        "head_width": None if head_width * heads == width else head_width,
        "norm_eps": setting(config, "rms_norm_eps", float, 1e-6),
        "feed_forward_width": setting(config, "intermediate_size", int),
        "attention_bias": setting(config, "attention_bias", bool, False),
        "feed_forward_bias": setting(config, "mlp_bias", bool, False),
        "rotary_base": _rotary_base(config),
        "rotary_precision": "float32",
        "window": config.get("sliding_window") if kind == "mistral" else None,
    }
    return {
        "tokenizer": _tokenizer_in(checkpoint),
        "backbone": backbone,
        "head": {"kind": "linear", "tied": setting(config, "tie_word_embeddings", bool, False)},
        "card": {"recipe": {"context": setting(config, "max_position_embeddings", int, CONTEXT)}},
    }


def _rotary_base(config: Mapping[str, Any]) -> float:
    """Base of the rotary positions: ``rope_parameters`` in transformers 5, ``rope_theta`` and ``rope_scaling`` in 4."""
    for key in ("rope_parameters", "rope_scaling"):
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        others = set(scaling) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or others or scaling.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"The configuration's {key} is {scaling!r}; only unscaled rotary positions can be read.")
    parameters = config.get("rope_parameters") or {}
    return setting(parameters if "rope_theta" in parameters else config, "rope_theta", float, 10000.0)


def _tokenizer_in(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.tokenizer is not None:
        return dict(checkpoint.tokenizer)
    settings = read_json(checkpoint.folder / "tokenizer_config.json")
    generator = "GENERatorForCausalLM" in (checkpoint.config.get("architectures") or ())
    if not generator and settings.get("tokenizer_class") != GENERATOR_TOKENIZER:
        return tokenizer_of_files(checkpoint.folder)
    # An N, or a tail shorter than k, is <oov> there without a word; here it is refused by its position.
    tokenizer = {
        "name": "dna-kmer",
        "k": setting(settings, "k", int, 6),
        "n": "refuse",
        "tail": "refuse",
        "end": setting(settings, "add_eos_token", bool, False),
    }
    tokens = tokenizer_from_dict(tokenizer).vocabulary.tokens
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        ours, theirs = tokens[int(number)], token["content"]
        if ours != theirs:
            raise InputError(f"Token {number} is {theirs!r} in tokenizer_config.json; GENERator's is {ours!r}.")
    return tokenizer


def _is_generator(tokenizer: Mapping[str, Any]) -> bool:
    refusing = tokenizer.get("n") == tokenizer.get("tail") == "refuse"  # else there are tokens for single bases
    return tokenizer["name"] == "dna-kmer" and refusing and "layout" not in tokenizer


def _out(parts: Parts) -> dict[str, Any]:
    config = transformer_of(parts)
    kind = "llama" if config.window is None else "mistral"
    base = float(config.rotary_base)
    common = {
        "architectures": [ARCHITECTURES[kind][kind == "llama" and _is_generator(parts["tokenizer"])]],
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": trained_context(parts),
        "rms_norm_eps": float(config.norm_eps),
        "tie_word_embeddings": bool(parts["head"]["tied"]),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }
    if kind == "mistral":
        return {**common, "sliding_window": config.window, **role_ids(parts)}
    biases = {"attention_bias": config.has_bias("attention"), "mlp_bias": config.has_bias("feed_forward")}
    return {**common, **biases, **role_ids(parts)}


def _table(parts: Parts) -> list[Entry]:
    config = transformer_of(parts)
    heads, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = TABLE | (ATTENTION_BIAS if config.has_bias("attention") else {})
    table |= FEED_FORWARD_BIAS if config.has_bias("feed_forward") else {}
    table |= {} if parts["head"]["tied"] else UNTIED
    qkv, gate_up = rows(heads, shared, shared), rows(config.inner, config.inner)
    joins = {QKV + "weight": qkv, QKV + "bias": qkv, UP + "weight": gate_up, UP + "bias": gate_up}
    return entries(table, depth=config.depth, joins=joins)


def _copies(parts: Parts) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if parts["head"]["tied"] else {}


def _files_out(parts: Parts) -> dict[str, str | bytes]:
    return kmer_files(parts, GENERATOR_TOKENIZER) if _is_generator(parts["tokenizer"]) else tokenizer_files(parts)


HF_LLAMA = CheckpointFormat(
    name="hf-llama",
    title="Llama, Mistral, GENERator and ProLLaMA in transformers",
    recognise=_recognised,
    config_in=_in,
    config_out=_out,
    table=_table,
    copies=_copies,
    unused=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # follows from rope_theta; older versions store it
    files_out=_files_out,
)

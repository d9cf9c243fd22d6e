"""Llama and Mistral as Hugging Face's transformers stores them: GENERator (DNA), ProLLaMA (proteins), Llama itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError, InputError
from .table import Checkpoint, CheckpointFormat, Entry, Parts, rows
from .tokenizers import role_ids, text_files, text_tokenizer
from .values import SIZES, either, must_hold, read_json, refuse, transformer_of, value_of

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "GENERatorForCausalLM"),  # GENERator's class adds no parameter
    "mistral": ("MistralForCausalLM",),
}
GENERATOR_TOKENIZER = "DNAKmerTokenizer"
READABLE = {"hidden_act": ("silu",), "partial_rotary_factor": (1,), "quantization_config": ()}
FREE = SIZES | {"key_value_heads", "head_width", "attention_bias", "feed_forward_bias", "rotary_base", "window"}
FREE |= {"bias", "norm_bias"}  # RMSNorm has none
MOST_POSITIONS = 2048  # transformers' own default; rotary positions have no end


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") in ARCHITECTURES and any(name.startswith("model.layers.") for name in names)


def _config_in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    refuse(config, READABLE)
    kind = config["model_type"]
    refuse(
        {"architectures": next(iter(config.get("architectures") or ()), None)}, {"architectures": ARCHITECTURES[kind]}
    )
    heads = value_of(config, "num_attention_heads", int)
    width = value_of(config, "hidden_size", int)
    head_width = value_of(config, "head_dim", int, None)
    backbone = {
        "family": "transformer",
        "vocabulary_size": value_of(config, "vocab_size", int),
        "width": width,
        "depth": value_of(config, "num_hidden_layers", int),
        "heads": heads,
        "key_value_heads": value_of(config, "num_key_value_heads", int, 8 if kind == "mistral" else heads),
        "head_width": None if head_width is None or head_width * heads == width else head_width,
        "direction": "causal",
        "norm": "rms",
        "norm_eps": value_of(config, "rms_norm_eps", (float, int), 1e-6),
        "activation": "swiglu",
        "feed_forward_width": value_of(config, "intermediate_size", int),
        "bias": False,
        "attention_bias": value_of(config, "attention_bias", bool, False),
        "feed_forward_bias": value_of(config, "mlp_bias", bool, False),
        "positions": "rotary",
        "rotary_base": _rotary_base(config),
        "window": value_of(config, "sliding_window", int, None) if kind == "mistral" else None,
    }
    context = value_of(config, "max_position_embeddings", int, MOST_POSITIONS)
    return {
        "tokenizer": _tokenizer_in(checkpoint),
        "backbone": backbone,
        "head": {"kind": "linear", "tied": value_of(config, "tie_word_embeddings", bool, False), "bias": False},
        "card": {"recipe": {"context": context}},
    }


def _rotary_base(config: Mapping[str, Any]) -> float:
    """Base of the rotary positions: ``rope_parameters`` in transformers 5, ``rope_theta`` and ``rope_scaling`` in 4."""
    for key in ("rope_parameters", "rope_scaling"):
        scaling = value_of(config, key, dict, {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        others = set(scaling) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or others or scaling.get("partial_rotary_factor", 1) != 1:
            raise InputError(
                f"The configuration's {key!r} is {scaling!r}; rotary positions can be read unscaled and of whole heads."
            )
    parameters = value_of(config, "rope_parameters", dict, {})
    base: float = value_of(parameters if "rope_theta" in parameters else config, "rope_theta", (float, int), 10000.0)
    return base


def _tokenizer_in(checkpoint: Checkpoint) -> dict[str, Any]:
    settings = read_json(checkpoint.folder / "tokenizer_config.json")
    generator = "GENERatorForCausalLM" in (checkpoint.config.get("architectures") or ())
    if not generator and settings.get("tokenizer_class") != GENERATOR_TOKENIZER:
        return text_tokenizer(checkpoint)
    # An N, or a tail shorter than k, is <oov> there without a word; here it is refused by its position.
    return {
        "name": "dna-kmer",
        "k": value_of(settings, "k", int, 6),
        "n": "refuse",
        "tail": "refuse",
        "end": value_of(settings, "add_eos_token", bool, False),
    }


def _config_out(parts: Parts) -> dict[str, Any]:
    config, head = transformer_of(parts), parts["head"]
    must_hold(config, fixed={"direction": "causal", "norm": "rms", "activation": "swiglu"}, free=FREE)
    if head["kind"] != "linear" or head["bias"] or head["soft_cap"] is not None:
        raise ConfigError("Llama's head is one linear map without a bias or a soft cap.")
    kind = "llama" if config.window is None else "mistral"
    biases = {
        "attention_bias": either(config.attention_bias, config.bias),
        "mlp_bias": either(config.feed_forward_bias, config.bias),
    }
    if kind == "mistral" and any(biases.values()):
        raise ConfigError("A model with a window is written as Mistral, which has no biases.")
    generator = kind == "llama" and parts["tokenizer"]["name"] == "dna-kmer"
    base = float(config.rotary_base)
    return {
        "architectures": [ARCHITECTURES[kind][generator]],
        "model_type": kind,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": parts.get("card", {}).get("recipe", {}).get("context", MOST_POSITIONS),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": bool(head["tied"]),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        **(biases if kind == "llama" else {"sliding_window": config.window}),
        **role_ids(parts),
    }


def _table(parts: Parts) -> list[Entry]:
    config = transformer_of(parts)
    heads, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    entries = [Entry("backbone.embedding.weight", ("model.embed_tokens.weight",))]
    attention, feed_forward = _suffixes(config.attention_bias), _suffixes(config.feed_forward_bias)
    for i in range(config.depth):
        own, theirs = f"backbone.blocks.{i}", f"model.layers.{i}"
        entries += [
            Entry(f"{own}.norm.weight", (f"{theirs}.input_layernorm.weight",)),
            Entry(f"{own}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
        ]
        for suffix in attention:
            parts_of = tuple(f"{theirs}.self_attn.{letter}_proj.{suffix}" for letter in "qkv")
            entries += [
                Entry(f"{own}.query_key_value.{suffix}", parts_of, rows(heads, shared, shared)),
                Entry(f"{own}.out.{suffix}", (f"{theirs}.self_attn.o_proj.{suffix}",)),
            ]
        for suffix in feed_forward:
            parts_of = tuple(f"{theirs}.mlp.{name}_proj.{suffix}" for name in ("gate", "up"))
            entries += [
                Entry(f"{own}.feed_forward.up.{suffix}", parts_of, rows(config.inner, config.inner)),
                Entry(f"{own}.feed_forward.down.{suffix}", (f"{theirs}.mlp.down_proj.{suffix}",)),
            ]
    entries.append(Entry("backbone.norm.weight", ("model.norm.weight",)))
    if not parts["head"]["tied"]:
        entries.append(Entry("head.weight", ("lm_head.weight",)))
    return entries


def _suffixes(bias: bool | None) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


HF_LLAMA = CheckpointFormat(
    name="hf-llama",
    title="Llama, Mistral, GENERator, ProLLaMA (transformers)",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    files_out=text_files,
)

"""Llama and Mistral as Hugging Face's transformers stores them: GENERator (DNA), ProLLaMA (proteins), Llama itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError, InputError
from .table import Checkpoint, CheckpointFormat, Entry, Parts, rows, setting
from .tokenizers import role_ids, text_tokenizer, tokenizer_files
from .values import SIZES, affine, head_must_hold, must_hold, read_json, refuse, transformer_of

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "GENERatorForCausalLM"),  # GENERator's class adds no parameter
    "mistral": ("MistralForCausalLM",),
}
GENERATOR_TOKENIZER = "DNAKmerTokenizer"
READABLE = {"hidden_act": ("silu",), "partial_rotary_factor": (1,), "quantization_config": ()}
FREE = SIZES | {"key_value_heads", "head_width", "rotary_base", "window"}
FREE |= {"bias", "attention_bias", "feed_forward_bias", "norm_bias"}  # of the norms it means nothing: RMSNorm has none
CONTEXT = 2048  # transformers' own default; rotary positions have no end


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") in ARCHITECTURES and any(name.startswith("model.layers.") for name in names)


def _config_in(checkpoint: Checkpoint) -> Parts:
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
        "direction": "causal",
        "norm": "rms",
        "norm_eps": setting(config, "rms_norm_eps", float, 1e-6),
        "activation": "swiglu",
        "feed_forward_width": setting(config, "intermediate_size", int),
        "bias": False,
        "attention_bias": setting(config, "attention_bias", bool, False),
        "feed_forward_bias": setting(config, "mlp_bias", bool, False),
        "positions": "rotary",
        "rotary_base": _rotary_base(config),
        "window": config.get("sliding_window") if kind == "mistral" else None,
    }
    return {
        "tokenizer": _tokenizer_in(checkpoint),
        "backbone": backbone,
        "head": {"kind": "linear", "tied": setting(config, "tie_word_embeddings", bool, False), "bias": False},
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
    settings = read_json(checkpoint.folder / "tokenizer_config.json")
    generator = "GENERatorForCausalLM" in (checkpoint.config.get("architectures") or ())
    if not generator and settings.get("tokenizer_class") != GENERATOR_TOKENIZER:
        return text_tokenizer(checkpoint)
    # An N, or a tail shorter than k, is <oov> there without a word; here it is refused by its position.
    return {
        "name": "dna-kmer",
        "k": setting(settings, "k", int, 6),
        "n": "refuse",
        "tail": "refuse",
        "end": setting(settings, "add_eos_token", bool, False),
    }


def _config_out(parts: Parts) -> dict[str, Any]:
    config, head = transformer_of(parts), parts["head"]
    must_hold(config, fixed={"direction": "causal", "norm": "rms", "activation": "swiglu"}, free=FREE)
    head_must_hold(head, {"kind": "linear", "bias": False})
    kind = "llama" if config.window is None else "mistral"
    biases = {"attention_bias": config.has_bias("attention"), "mlp_bias": config.has_bias("feed_forward")}
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
        "max_position_embeddings": parts.get("card", {}).get("recipe", {}).get("context", CONTEXT),
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
    qkv, gate_up = rows(heads, shared, shared), rows(config.inner, config.inner)
    bias, inner_bias = config.has_bias("attention"), config.has_bias("feed_forward")
    entries = affine("backbone.embedding", "model.embed_tokens", bias=False)
    for i in range(config.depth):
        own, theirs = f"backbone.blocks.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        of_three = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        entries += affine(f"{own}.norm", f"{theirs}.input_layernorm", bias=False)
        entries += affine(f"{own}.query_key_value", of_three, qkv, bias=bias)
        entries += affine(f"{own}.out", f"{attention}.o_proj", bias=bias)
        entries += affine(f"{own}.feed_forward_norm", f"{theirs}.post_attention_layernorm", bias=False)
        of_two = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        entries += affine(f"{own}.feed_forward.up", of_two, gate_up, bias=inner_bias)
        entries += affine(f"{own}.feed_forward.down", f"{theirs}.mlp.down_proj", bias=inner_bias)
    entries += affine("backbone.norm", "model.norm", bias=False)
    return entries if parts["head"]["tied"] else [*entries, *affine("head", "lm_head", bias=False)]


def _copies(parts: Parts) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if parts["head"]["tied"] else {}


HF_LLAMA = CheckpointFormat(
    name="hf-llama",
    title="Llama, Mistral, GENERator, ProLLaMA in transformers",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    copies=_copies,
    unused=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # follows from rope_theta; older versions store it
    files_out=tokenizer_files,
)

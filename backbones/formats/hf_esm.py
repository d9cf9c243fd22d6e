"""ESM-2, ESM-1b and Nucleotide Transformer, as transformers and its authors' own code write them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

from ...errors import InputError
from ...sequences import tokenizer_from_dict
from .esm_parts import ENCODER, PROTEIN, QKV, UP, frequencies_out, head_in, precision_in
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, rows, setting, transformer_of
from .vocabularies import tokenizer_in

NT_V1, NT_V2 = ({"name": "dna-kmer", "layout": f"nucleotide-transformer-v{version}"} for version in (1, 2))

LAYER = "esm.encoder.layer.{i}."
HF_ESM_TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "esm.embeddings.word_embeddings.weight",
    "backbone.blocks.{i}.norm.*": LAYER + "attention.LayerNorm.*",
    QKV: (LAYER + "attention.self.query.*", LAYER + "attention.self.key.*", LAYER + "attention.self.value.*"),
    "backbone.blocks.{i}.out.*": LAYER + "attention.output.dense.*",
    "backbone.blocks.{i}.feed_forward_norm.*": LAYER + "LayerNorm.*",
    UP: LAYER + "intermediate.dense.*",
    "backbone.blocks.{i}.feed_forward.down.*": LAYER + "output.dense.*",
    "backbone.norm.*": "esm.encoder.emb_layer_norm_after.*",
    "head.dense.*": "lm_head.dense.*",
    "head.norm.*": "lm_head.layer_norm.*",
    "head.bias": "lm_head.bias",
}
HF_POSITIONS: dict[str, str | tuple[str, ...]] = {
    "backbone.positions.weight": "esm.embeddings.position_embeddings.weight"
}
HF_NORM: dict[str, str | tuple[str, ...]] = {"backbone.embedding_norm.*": "esm.embeddings.layer_norm.*"}
HF_CONTACTS: dict[str, str | tuple[str, ...]] = {"contacts.*": "esm.contact_head.regression.*"}
HF_UNTIED: dict[str, str | tuple[str, ...]] = {"head.weight": "lm_head.decoder.weight"}
HF_FREQUENCIES = "esm.rotary_embeddings.inv_freq"
HF_LAYER_FREQUENCIES = LAYER + "attention.self.rotary_embeddings.inv_freq"


def _hf_spelled(name: str) -> str:
    """Version 4 had frequencies in each layer; 5.23 writes them there, under a star, and norms by their older names."""
    name = re.sub(r"esm\.encoder\.layer\.(\d+|\*)\.attention\.self\.rotary_embeddings\.inv_freq$", HF_FREQUENCIES, name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _v2_spelled(name: str) -> str:
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _gated(names: Collection[str]) -> bool:
    """Whether the feed-forward is Nucleotide Transformer v2's, whose configuration calls itself an Esm too."""
    return "esm.encoder.layer.0.intermediate.dense.bias" not in names


def _hf_in(checkpoint: Checkpoint, *, gated: bool) -> Parts:
    c = checkpoint.config
    for name in ("is_decoder", "add_cross_attention", "is_folding_model"):
        if c.get(name):
            raise InputError(f"Models with {name} cannot be run.")
    width, heads = setting(c, "hidden_size", int), setting(c, "num_attention_heads", int)
    positions = setting(c, "position_embedding_type", str, "absolute")
    if positions not in ("absolute", "rotary"):
        raise InputError(f"The position_embedding_type {positions!r} cannot be run: 'absolute' or 'rotary' is needed.")
    size, eps = setting(c, "vocab_size", int), setting(c, "layer_norm_eps", float, 1e-12)
    tokenizer = tokenizer_in(checkpoint.folder, [NT_V2] if gated else [PROTEIN, NT_V1, NT_V2], size)
    backbone: dict[str, Any] = ENCODER | {
        "vocabulary_size": size,
        "width": width,
        "depth": setting(c, "num_hidden_layers", int),
        "heads": heads,
        "feed_forward_width": setting(c, "intermediate_size", int),
        "embedding_norm": setting(c, "emb_layer_norm_before", bool, False),
        "token_dropout": setting(c, "mask_token_id", int) if setting(c, "token_dropout", bool, False) else None,
        "dropout": setting(c, "hidden_dropout_prob", float, 0.1),
        "norm_eps": eps,
    }
    if gated:
        backbone |= {"activation": "swiglu", "feed_forward_bias": False}
    if positions == "absolute":
        backbone["positions"], backbone["max_positions"] = positions, setting(c, "max_position_embeddings", int, 1026)
        backbone["position_offset"] = (
            setting(c, "pad_token_id", int) + 1
        )  # RoBERTa's way: rows up to the pad's are unused
    else:
        base, names = setting(c, "rope_theta", float, 10000.0), (HF_FREQUENCIES, HF_LAYER_FREQUENCIES.format(i=0))
        name = next((name for name in names if name in checkpoint.shapes), names[0])
        backbone |= {"rotary_base": base, "rotary_precision": precision_in(checkpoint, name, width // heads, base)}
    head = head_in(
        "esm.contact_head.regression.weight" in checkpoint.shapes,
        tied=setting(c, "tie_word_embeddings", bool, True),
        norm_eps=eps,
    )
    return {"tokenizer": tokenizer, "backbone": backbone, "head": head}


def _hf_out(parts: Parts) -> dict[str, Any]:
    c, vocabulary = transformer_of(parts), tokenizer_from_dict(parts["tokenizer"]).vocabulary
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "vocab_size": c.vocabulary_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.inner,
        "hidden_act": "gelu",
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "max_position_embeddings": c.max_positions or 1026,
        "position_embedding_type": "absolute" if c.positions == "absolute" else "rotary",
        "rope_theta": c.rotary_base,
        "layer_norm_eps": c.norm_eps,
        "emb_layer_norm_before": c.embedding_norm,
        "token_dropout": c.token_dropout is not None,
        "mask_token_id": vocabulary.role("mask"),
        "pad_token_id": vocabulary.role("pad"),
        "eos_token_id": vocabulary.role("eos"),
        "is_folding_model": False,
        "tie_word_embeddings": parts["head"].get("tied") is not False,
    }


def _v2_out(parts: Parts) -> dict[str, Any]:
    return _hf_out(parts) | {"hidden_act": "silu", "add_bias_fnn": False}


def _hf_table(parts: Parts) -> list[Entry]:
    c, head = transformer_of(parts), parts["head"]
    table = HF_ESM_TABLE | (HF_POSITIONS if c.positions == "absolute" else {}) | (HF_NORM if c.embedding_norm else {})
    table |= (HF_CONTACTS if head.get("contacts") else {}) | (HF_UNTIED if head.get("tied") is False else {})
    found = entries(table, depth=c.depth, joins={QKV: rows(c.width, c.width, c.width)})
    biases = c.has_bias("feed_forward")
    return [one for one in found if biases or not re.search(r"feed_forward\.(up|down)\.bias$", one.own)]


def _hf_constants(parts: Parts) -> dict[str, Tensor]:
    return {HF_FREQUENCIES: frequencies_out(parts)} if transformer_of(parts).positions == "rotary" else {}


def _v2_constants(parts: Parts) -> dict[str, Tensor]:
    c = transformer_of(parts)
    layers = range(c.depth if c.positions == "rotary" else 0)
    return {HF_LAYER_FREQUENCIES.format(i=i): frequencies_out(parts) for i in layers}


def _hf_copies(parts: Parts) -> dict[str, str]:
    tied = parts["head"].get("tied") is not False
    return {"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"} if tied else {}


def _hf_tokenizer(parts: Parts) -> dict[str, str]:
    vocabulary = tokenizer_from_dict(parts["tokenizer"]).vocabulary
    named = {"unk": "unk_token", "pad": "pad_token", "mask": "mask_token", "bos": "cls_token", "eos": "eos_token"}
    special = {name: vocabulary.roles.get(role) for role, name in named.items()}  # Nucleotide Transformer has no end
    settings = {"tokenizer_class": "EsmTokenizer", "clean_up_tokenization_spaces": False, **special}
    return {"vocab.txt": "\n".join(vocabulary.tokens), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}


UNUSED = ("esm.embeddings.position_ids", "esm.embeddings.position_embeddings.weight", "esm.pooler.*")

HF_ESM = CheckpointFormat(
    name="hf-esm",
    title="ESM-2, ESM-1b and Nucleotide Transformer v1 in transformers",
    recognise=lambda config, names: config.get("model_type") == "esm" and not _gated(names),
    config_in=lambda checkpoint: _hf_in(checkpoint, gated=False),
    config_out=_hf_out,
    table=_hf_table,
    constants=_hf_constants,
    files_out=_hf_tokenizer,
    canonical=_hf_spelled,
    copies=_hf_copies,
    unused=UNUSED,
)

NUCLEOTIDE_TRANSFORMER_V2 = CheckpointFormat(
    name="nucleotide-transformer-v2",
    title="Nucleotide Transformer v2, of its authors' own code for transformers",
    recognise=lambda config, names: config.get("model_type") == "esm" and _gated(names),
    config_in=lambda checkpoint: _hf_in(checkpoint, gated=True),
    config_out=_v2_out,
    table=_hf_table,
    constants=_v2_constants,
    files_out=_hf_tokenizer,
    canonical=_v2_spelled,
    copies=_hf_copies,
    unused=UNUSED,
)

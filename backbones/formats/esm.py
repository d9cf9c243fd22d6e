"""ESM-2 and Nucleotide Transformer, as fair-esm, transformers and their authors' own code write them."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.rotary import PRECISIONS, rotary_frequencies
from ...sequences import tokenizer_from_dict
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, rows, setting, transformer_of
from .vocabularies import tokenizer_in

PROTEIN = {"name": "protein"}
NT_V1, NT_V2 = ({"name": "dna-kmer", "layout": f"nucleotide-transformer-v{version}"} for version in (1, 2))
ENCODER = {"family": "transformer", "direction": "bidirectional", "norm": "layer", "activation": "gelu", "bias": True}
QKV, UP = "backbone.blocks.{i}.query_key_value.*", "backbone.blocks.{i}.feed_forward.up.*"

FAIR_ESM_TABLE: dict[str, str | tuple[str, ...]] = {
    "backbone.embedding.weight": "embed_tokens.weight",
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
FAIR_CONTACTS: dict[str, str | tuple[str, ...]] = {"contacts.*": "contact_head.regression.*"}

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


def precision_in(checkpoint: Checkpoint, name: str, head_dim: int, base: float) -> str:
    """Return the precision of the rotary frequencies that a checkpoint holds: ESM-2 was trained with rounded ones.

    Raises:
        InputError: they are no powers of ``base`` in any precision.
    """
    if name not in checkpoint.shapes:
        return "float32"
    stored = checkpoint.read(name).double()
    for precision in PRECISIONS:
        expected = torch.from_numpy(rotary_frequencies(head_dim, base, precision))
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-6, atol=0):
            return precision
    raise InputError(f"The rotary frequencies in {name} do not follow from the base {base:g} and {head_dim} channels.")


def frequencies_out(parts: Parts) -> Tensor:
    """Return the rotary frequencies of a model, float32."""
    c = transformer_of(parts)
    return torch.from_numpy(rotary_frequencies(c.head_dim, float(c.rotary_base), c.rotary_precision)).float()


def _fair_spelled(name: str) -> str:
    return re.sub(r"^(encoder\.sentence_encoder\.|sentence_encoder\.|encoder\.)", "", name)


def _fair_recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    cfg = config.get("cfg")
    return isinstance(cfg, Mapping) and any(_fair_spelled(name).startswith("layers.0.self_attn.") for name in names)


def _fair_in(checkpoint: Checkpoint) -> Parts:
    model = checkpoint.config["cfg"]["model"]
    depth, width = setting(model, "encoder_layers", int), setting(model, "encoder_embed_dim", int)
    heads, contacts = setting(model, "encoder_attention_heads", int), "contact_head.regression.weight"
    tokenizer = tokenizer_in(None, [PROTEIN], checkpoint.shapes["embed_tokens.weight"][0])
    backbone = ENCODER | {
        "vocabulary_size": checkpoint.shapes["embed_tokens.weight"][0],
        "width": width,
        "depth": depth,
        "heads": heads,
        "rotary_precision": precision_in(checkpoint, "layers.0.self_attn.rot_emb.inv_freq", width // heads, 10000.0),
        "token_dropout": _mask(tokenizer) if setting(model, "token_dropout", bool, True) else None,
    }
    return {"tokenizer": tokenizer, "backbone": backbone, "head": _head(contacts in checkpoint.shapes)}


def _mask(tokenizer: Mapping[str, Any]) -> int:
    return tokenizer_from_dict(tokenizer).vocabulary.require("mask")


def _head(contacts: bool, **options: float | bool) -> dict[str, Any]:
    return {"kind": "esm", "contacts": contacts, **options}


def _fair_out(parts: Parts) -> dict[str, Any]:
    c = transformer_of(parts)
    model = {
        "arch": "esm2",
        "encoder_layers": c.depth,
        "encoder_embed_dim": c.width,
        "encoder_attention_heads": c.heads,
        "token_dropout": c.token_dropout is not None,
    }
    return {"cfg": {"model": model}}


def _fair_files(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """fair-esm takes a file for ESM-2 by its name, and wants the contact head in a second one, with other prefixes."""
    contacts = {name: tensor for name, tensor in tensors.items() if name.startswith("contact_head")}
    state = {
        f"encoder.{name}" if name.startswith("lm_head") else f"encoder.sentence_encoder.{name}": tensor
        for name, tensor in tensors.items()
        if name not in contacts
    }
    files: dict[str, Any] = {"esm2.pt": {"cfg": {"model": Namespace(**config["cfg"]["model"])}, "model": state}}
    return files | ({"esm2-contact-regression.pt": {"model": contacts}} if contacts else {})


def _fair_table(parts: Parts) -> list[Entry]:
    c = transformer_of(parts)
    table = FAIR_ESM_TABLE | (FAIR_CONTACTS if parts["head"].get("contacts") else {})
    return entries(table, depth=c.depth, joins={QKV: rows(c.width, c.width, c.width)})


def _fair_constants(parts: Parts) -> dict[str, Tensor]:
    depth = transformer_of(parts).depth
    return {f"layers.{i}.self_attn.rot_emb.inv_freq": frequencies_out(parts) for i in range(depth)}


FAIR_ESM = CheckpointFormat(
    name="fair-esm",
    title="ESM-2 as fair-esm's .pt files",
    recognise=_fair_recognised,
    config_in=_fair_in,
    config_out=_fair_out,
    table=_fair_table,
    constants=_fair_constants,
    canonical=_fair_spelled,
    copies=lambda parts: {"lm_head.weight": "embed_tokens.weight"},
    files=_fair_files,
)


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
    head = _head(
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

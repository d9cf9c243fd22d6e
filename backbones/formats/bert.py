"""BERT as Hugging Face's transformers stores it: Geneformer (cells), PubMedBERT (text), BERT itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError
from .cells import gene_tokenizer
from .table import Checkpoint, CheckpointFormat, Entry, Parts, rows, setting
from .tokenizers import role_ids, text_tokenizer, tokenizer_files
from .values import SIZES, affine, head_must_hold, must_hold, refuse, transformer_of

READABLE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (),
}
SHAPED = {
    "direction": "bidirectional",
    "norm": "layer",
    "norm_placement": "post",
    "bias": True,
    "positions": "absolute",
    "embedding_norm": True,
    "post_blocks_norm": False,
}
FREE = SIZES | {"activation", "max_positions", "token_types"}
TEXT_FILES = ("tokenizer.json", "vocab.txt")


def bert_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our backbone of a BERT's configuration."""
    return {
        "family": "transformer",
        "vocabulary_size": setting(config, "vocab_size", int),
        "width": setting(config, "hidden_size", int),
        "depth": setting(config, "num_hidden_layers", int),
        "heads": setting(config, "num_attention_heads", int),
        **SHAPED,
        "activation": setting(config, "hidden_act", str, "gelu"),
        "feed_forward_width": setting(config, "intermediate_size", int),
        "max_positions": setting(config, "max_position_embeddings", int),
        "token_types": setting(config, "type_vocab_size", int, 2),
        "norm_eps": setting(config, "layer_norm_eps", float, 1e-12),
        "dropout": setting(config, "hidden_dropout_prob", float, 0.1),
    }


def bert_config(parts: Parts) -> dict[str, Any]:
    """Return a BERT's configuration of our backbone.

    Raises:
        ConfigError: the backbone is no BERT.
    """
    config = transformer_of(parts)
    must_hold(config, fixed=SHAPED, free=FREE | {"cross_width"})
    if config.activation not in READABLE["hidden_act"]:
        raise ConfigError(f"BERT's feed-forward is of gelu or relu, not {config.activation}.")
    return {
        "model_type": "bert",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.inner,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
    }


def bert_entries(parts: Parts, own: str, theirs: str) -> list[Entry]:
    """Return the entries of a BERT's backbone, whose names begin with ``own`` here and ``theirs`` there."""
    config = transformer_of(parts)
    embeddings = [("embedding", "word_embeddings"), ("positions", "position_embeddings")]
    embeddings += [("token_types", "token_type_embeddings")] if config.token_types else []
    entries = []
    for ours, name in embeddings:
        entries += affine(f"{own}{ours}", f"{theirs}embeddings.{name}", bias=False)
    entries += affine(f"{own}embedding_norm", f"{theirs}embeddings.LayerNorm")
    for i in range(config.depth):
        entries += _block(config.width, config.cross_width, f"{own}blocks.{i}", f"{theirs}encoder.layer.{i}")
    return entries


def _block(width: int, cross_width: int | None, own: str, theirs: str) -> list[Entry]:
    attention, cross = f"{theirs}.attention", f"{theirs}.crossattention"
    q, k, v = (f"{attention}.self.{name}" for name in ("query", "key", "value"))
    entries = [
        *affine(f"{own}.query_key_value", (q, k, v), rows(width, width, width)),
        *affine(f"{own}.out", f"{attention}.output.dense"),
        *affine(f"{own}.norm", f"{attention}.output.LayerNorm"),
        *affine(f"{own}.feed_forward.up", f"{theirs}.intermediate.dense"),
        *affine(f"{own}.feed_forward.down", f"{theirs}.output.dense"),
        *affine(f"{own}.feed_forward_norm", f"{theirs}.output.LayerNorm"),
    ]
    if cross_width is None:
        return entries
    q, k, v = (f"{cross}.self.{name}" for name in ("query", "key", "value"))
    return [
        *entries,
        *affine(f"{own}.cross_query", q),
        *affine(f"{own}.cross_key_value", (k, v), rows(width, width)),
        *affine(f"{own}.cross_out", f"{cross}.output.dense"),
        *affine(f"{own}.cross_norm", f"{cross}.output.LayerNorm"),
    ]


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") == "bert" and "cls.predictions.bias" in names


def _config_in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    refuse(config, READABLE)
    backbone = bert_backbone(config)
    text = any((checkpoint.folder / name).is_file() for name in TEXT_FILES)
    return {
        "tokenizer": text_tokenizer(checkpoint) if text else gene_tokenizer(checkpoint, backbone),
        "backbone": backbone,
        "head": {
            "kind": "esm",
            "tied": True,
            "bias": True,
            "activation": backbone["activation"],
            "norm_eps": backbone["norm_eps"],
        },
    }


def _config_out(parts: Parts) -> dict[str, Any]:
    config, head = transformer_of(parts), parts["head"]
    must_hold(config, fixed=SHAPED, free=FREE)
    wanted = {"kind": "esm", "tied": True, "bias": True}
    head_must_hold(head, {**wanted, "activation": config.activation, "norm_eps": config.norm_eps})
    return {"architectures": ["BertForMaskedLM"], **bert_config(parts), "tie_word_embeddings": True, **role_ids(parts)}


def _table(parts: Parts) -> list[Entry]:
    return [
        *bert_entries(parts, "backbone.", "bert."),
        *affine("head.dense", "cls.predictions.transform.dense"),
        *affine("head.norm", "cls.predictions.transform.LayerNorm"),
        Entry("head.bias", ("cls.predictions.bias",)),
    ]


def _copies(parts: Parts) -> dict[str, str]:
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def _canonical(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


HF_BERT = CheckpointFormat(
    name="hf-bert",
    title="Geneformer, PubMedBERT, BERT in transformers",
    recognise=_recognise,
    config_in=_config_in,
    config_out=_config_out,
    table=_table,
    copies=_copies,
    # Of the training of BERT, and in no masked language model: the pooler and the next-sentence head.
    unused=("bert.pooler.*", "cls.seq_relationship.*", "bert.embeddings.position_ids"),
    canonical=_canonical,
    files_out=tokenizer_files,
)

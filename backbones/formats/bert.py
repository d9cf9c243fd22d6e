"""BERT as transformers stores it: Geneformer (cells), PubMedBERT (text), BERT itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import InputError
from .table import Checkpoint, CheckpointFormat, Entry, Parts, entries, rows, setting, transformer_of
from .tokenizers import GENES_HINT, gene_tokenizer, role_ids, tokenizer_files, tokenizer_of_files
from .values import refuse

BLOCK, LAYER = "blocks.{i}.", "encoder.layer.{i}."
QKV, CROSS_KV = BLOCK + "query_key_value.*", BLOCK + "cross_key_value.*"
ENCODER: dict[str, str | tuple[str, ...]] = {
    "embedding.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
    "embedding_norm.*": "embeddings.LayerNorm.*",
    QKV: tuple(f"{LAYER}attention.self.{part}.*" for part in ("query", "key", "value")),
    BLOCK + "out.*": LAYER + "attention.output.dense.*",
    BLOCK + "norm.*": LAYER + "attention.output.LayerNorm.*",
    BLOCK + "feed_forward.up.*": LAYER + "intermediate.dense.*",
    BLOCK + "feed_forward.down.*": LAYER + "output.dense.*",
    BLOCK + "feed_forward_norm.*": LAYER + "output.LayerNorm.*",
}
TOKEN_TYPES: dict[str, str | tuple[str, ...]] = {"token_types.weight": "embeddings.token_type_embeddings.weight"}
CROSS: dict[str, str | tuple[str, ...]] = {
    BLOCK + "cross_query.*": LAYER + "crossattention.self.query.*",
    CROSS_KV: (LAYER + "crossattention.self.key.*", LAYER + "crossattention.self.value.*"),
    BLOCK + "cross_out.*": LAYER + "crossattention.output.dense.*",
    BLOCK + "cross_norm.*": LAYER + "crossattention.output.LayerNorm.*",
}
HEAD: dict[str, str | tuple[str, ...]] = {
    "head.dense.*": "cls.predictions.transform.dense.*",
    "head.norm.*": "cls.predictions.transform.LayerNorm.*",
    "head.bias": "cls.predictions.bias",
}
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Of BERT's training, or of its use, but in no masked language model: the pooler and the next-sentence head.
UNUSED = ("bert.pooler.*", "cls.seq_relationship.*", "bert.embeddings.position_ids")
READABLE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (),
}
TEXT_FILES = ("tokenizer.json", "vocab.txt", "processive_tokenizer.json")


def bert_backbone(config: Mapping[str, Any], *, token_types: int) -> dict[str, Any]:
    """Return our backbone of a BERT's configuration.

    Raises:
        InputError: names the key of a setting that we would not run alike.
    """
    refuse(config, READABLE)
    return {
        "family": "transformer",
        "vocabulary_size": setting(config, "vocab_size", int),
        "width": setting(config, "hidden_size", int),
        "depth": setting(config, "num_hidden_layers", int),
        "heads": setting(config, "num_attention_heads", int),
        "direction": "bidirectional",
        "norm": "layer",
        "norm_placement": "post",
        "activation": setting(config, "hidden_act", str, "gelu"),
        "feed_forward_width": setting(config, "intermediate_size", int),
        "bias": True,
        "positions": "absolute",
        "max_positions": setting(config, "max_position_embeddings", int),
        "dropout": setting(config, "hidden_dropout_prob", float, 0.1),
        "norm_eps": setting(config, "layer_norm_eps", float, 1e-12),
        "post_blocks_norm": False,
        "embedding_norm": True,
        "token_types": token_types,
    }


def bert_config(parts: Parts) -> dict[str, Any]:
    """Return a BERT's configuration of our backbone."""
    config = transformer_of(parts)
    return {
        "model_type": "bert",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.inner,
        "hidden_act": config.activation,
        "hidden_dropout_prob": float(config.dropout),
        "attention_probs_dropout_prob": float(config.dropout),
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": float(config.norm_eps),
        "position_embedding_type": "absolute",
    }


def bert_entries(parts: Parts, *, own: str, theirs: str) -> list[Entry]:
    """Return the entries of a BERT's backbone, whose names begin with ``own`` here and with ``theirs`` there."""
    config = transformer_of(parts)
    table = ENCODER | (TOKEN_TYPES if config.token_types else {}) | (CROSS if config.cross_width else {})
    prefixed = {
        own + name: theirs + there if isinstance(there, str) else tuple(theirs + part for part in there)
        for name, there in table.items()
    }
    joins = {own + QKV: rows(*[config.width] * 3), own + CROSS_KV: rows(*[config.width] * 2)}
    return entries(prefixed, depth=config.depth, joins=joins)


def newer_name(name: str) -> str:
    """Return a tensor's name as it is now: the first BERTs had gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _recognised(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") == "bert" and "cls.predictions.bias" in names


def _in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    refuse(config, {"add_cross_attention": (False,)})
    backbone = bert_backbone(config, token_types=setting(config, "type_vocab_size", int, 2))
    shape = {"activation": backbone["activation"], "norm_eps": backbone["norm_eps"]}
    return {
        "tokenizer": _tokenizer_in(checkpoint, backbone),
        "backbone": backbone,
        "head": {"kind": "esm", "tied": True, "bias": True, **shape},
    }


def _tokenizer_in(checkpoint: Checkpoint, backbone: Mapping[str, Any]) -> dict[str, Any]:
    folder = checkpoint.folder
    if checkpoint.tokenizer is not None:
        return dict(checkpoint.tokenizer)
    if any((folder / name).is_file() for name in TEXT_FILES):
        return tokenizer_of_files(folder)
    most, embeddings = backbone["max_positions"], backbone["vocabulary_size"]
    found = gene_tokenizer(folder, most_tokens=most, embeddings=embeddings)
    if found is None:
        raise InputError(
            "There is no tokenizer beside the weights: tokenizer.json or vocab.txt of a text.",
            path=folder,
            hint=GENES_HINT,
        )
    return found


def _out(parts: Parts) -> dict[str, Any]:
    return {"architectures": ["BertForMaskedLM"], **bert_config(parts), "tie_word_embeddings": True, **role_ids(parts)}


HF_BERT = CheckpointFormat(
    name="hf-bert",
    title="Geneformer, PubMedBERT and BERT in transformers",
    recognise=_recognised,
    config_in=_in,
    config_out=_out,
    table=lambda parts: [*bert_entries(parts, own="backbone.", theirs="bert."), *entries(HEAD)],
    copies=lambda parts: COPIES,
    unused=UNUSED,
    canonical=newer_name,
    files_out=tokenizer_files,
)

"""LangCell's folder: two BERTs, a linear map behind each, and one that tells whether a text is of a cell.

Not a language model, so none of ``FORMATS``: ``cells.LangCell`` reads and writes the five of them by these formats,
each with its own part of LangCell's tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import InputError
from .bert import HF_BERT, bert_backbone, bert_config, bert_entries, newer_name
from .table import Checkpoint, CheckpointFormat, Parts, entries, setting

CELL_FOLDER, TEXT_FOLDER = "cell_bert", "text_bert"
MAPS = {"cell_proj.bin": "cell_projection", "text_proj.bin": "text_projection", "ctm_head.bin": "matching"}
# A pooler was put in place of BERT's own after it was read; its linear map is in a file by itself.
UNUSED = ("pooler.*", "cls.*", "embeddings.position_ids")


def _spelled(name: str) -> str:
    return newer_name(name).removeprefix("bert.")


def _cell_in(checkpoint: Checkpoint) -> Parts:
    config = checkpoint.config
    return {"backbone": bert_backbone(config, token_types=setting(config, "type_vocab_size", int, 2))}


def _text_in(checkpoint: Checkpoint) -> Parts:
    """Configuration of the text's BERT: it has no token types whatever its settings say, and cross-attention."""
    name = "encoder.layer.0.crossattention.self.key.weight"
    if name not in checkpoint.shapes:
        raise InputError(f"{name} is missing: this is no BERT with cross-attention.", path=checkpoint.folder)
    backbone = bert_backbone(checkpoint.config, token_types=0)
    return {"backbone": {**backbone, "cross_width": checkpoint.shapes[name][1]}}


def _text_out(parts: Parts) -> dict[str, Any]:
    cross_width = parts["backbone"]["cross_width"]
    return {
        "architectures": ["BertModel"],
        **bert_config(parts),
        "encoder_width": cross_width,
        "add_cross_attention": True,
    }


CELL_BERT = replace(
    HF_BERT,
    name="langcell",
    title="LangCell",
    recognise=lambda config, names: False,
    config_in=_cell_in,
    config_out=lambda parts: {"architectures": ["BertModel"], **bert_config(parts)},
    table=lambda parts: bert_entries(parts, own="cell.", theirs=""),
    copies=lambda parts: {},
    unused=UNUSED,
    canonical=_spelled,
    files_out=lambda parts: {},
)
TEXT_BERT = replace(
    CELL_BERT,
    config_in=_text_in,
    config_out=_text_out,
    table=lambda parts: bert_entries(parts, own="text.", theirs=""),
    unused=(*UNUSED, "embeddings.token_type_embeddings.weight"),
)


def linear_map(own: str) -> CheckpointFormat:
    """Return the format of a file that holds one linear map."""
    return replace(
        CELL_BERT,
        config_in=lambda checkpoint: {},
        config_out=lambda parts: {},
        table=lambda parts: entries({f"{own}.*": "*"}),
        unused=(),
        canonical=lambda name: name,
        files=lambda config, tensors: {},
    )

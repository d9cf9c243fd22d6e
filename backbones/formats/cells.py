"""Gene vocabularies of foreign cell models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ...sequences import tokenizer_class, tokenizer_to_dict
from .table import Checkpoint

TABLES = ("gene_table", "tokens_medians")  # in the name of a table that lies beside the weights
KINDS = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".tsv.zst", ".csv.zst")
HOW = (
    "Put one beside the weights as gene_table.tsv: columns ensembl_id, token, median (empty for <pad>, <mask>, ...), "
    "of the values that the pickled dictionaries of the model hold, which are never unpickled here."
)


def gene_tokenizer(checkpoint: Checkpoint, backbone: dict[str, Any]) -> dict[str, Any]:
    """Return the rank tokenizer of a table of genes beside the weights.

    A cell is cut so that it fits the positions of the backbone, begin and end token included.

    Raises:
        InputError: there is no such table, or not of as many tokens as the model has embeddings.
    """
    path = _find(checkpoint.folder)
    if path is None:
        raise InputError(
            "There is no tokenizer beside the weights: neither that of a text nor a table of genes.",
            path=checkpoint.folder,
            hint=HOW,
        )
    tokenizer = tokenizer_class("cells-rank").from_table(path, most_tokens=backbone["max_positions"])
    tokens, embeddings = len(tokenizer.vocabulary), backbone["vocabulary_size"]
    if tokens != embeddings:
        raise InputError(f"This table holds {tokens} tokens, and the model has {embeddings}.", path=path, hint=HOW)
    return tokenizer_to_dict(tokenizer)


def _find(folder: Path) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(KINDS)) if folder.is_dir() else []
    return next((path for path in files if any(word in path.name for word in TABLES)), None)

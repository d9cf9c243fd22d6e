"""Tokenizers as files beside a checkpoint: of text as transformers has them, of genes as a table, others as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...sequences import TextTokenizer, tokenizer_class, tokenizer_from_dict, tokenizer_to_dict
from .table import Parts
from .values import read_json

TOKENS = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token", "mask": "mask_token", "unk": "unk_token"}
OURS = "processive_tokenizer.json"  # where no file of theirs can hold ours
GENES = "gene_table.tsv"
GENE_TABLES = ("gene_table", "tokens_medians")  # in the name of a table of genes
TABLE_KINDS = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".tsv.zst", ".csv.zst")
GENES_HINT = (
    "For a model of cells give load(..., tokenizer=cells.RankTokenizer.from_table(path, most_tokens=...)), or put the "
    f"table beside the weights as {GENES}: columns ensembl_id, token and median (empty for <pad>, <mask>, ...), with "
    "what the model's pickled dictionaries hold, which are never unpickled here."
)


def tokenizer_of_files(folder: Path) -> dict[str, Any]:
    """Return the tokenizer whose files lie in a folder: one of ours as it is, or one of text.

    Raises:
        InputError: there are none, or they cannot be read.
        MissingExtra: the package that reads them is not installed.
    """
    return read_json(folder / OURS) or tokenizer_to_dict(TextTokenizer.from_folder(folder))


def gene_tokenizer(folder: Path, *, most_tokens: int, embeddings: int) -> dict[str, Any] | None:
    """Return the rank tokenizer of the table of genes in a folder, or None where there is no such table.

    Args:
        folder: of the checkpoint.
        most_tokens: of a cell, begin and end token included.
        embeddings: that the model has.

    Raises:
        InputError: the table cannot be read, or holds another number of tokens.
    """
    path = find_gene_table(folder)
    if path is None:
        return None
    tokenizer = tokenizer_class("cells-rank").from_table(path, most_tokens=most_tokens)
    if len(tokenizer.vocabulary) != embeddings:
        raise InputError(
            f"This table holds {len(tokenizer.vocabulary)} tokens, and the model has {embeddings}.",
            path=path,
            hint="It must be the table that the model was trained with.",
        )
    return tokenizer_to_dict(tokenizer)


def find_gene_table(folder: Path) -> Path | None:
    """Return the table of genes in a folder, or None."""
    tables = [path for path in sorted(folder.glob("*")) if path.name.endswith(TABLE_KINDS)]
    return next((path for path in tables if any(word in path.name for word in GENE_TABLES)), None)


def role_ids(parts: Parts) -> dict[str, int]:
    """Return the ids of begin, end and padding as a transformers configuration names them."""
    vocabulary = tokenizer_from_dict(parts["tokenizer"]).vocabulary
    found = {f"{TOKENS[role]}_id": vocabulary.role(role) for role in ("bos", "eos", "pad")}
    return {key: value for key, value in found.items() if value is not None}


def tokenizer_files(parts: Parts) -> dict[str, str | bytes]:
    """Return the files that hold a tokenizer, by name: transformers' own where it is one of theirs."""
    data = parts["tokenizer"]
    if data["name"] == TextTokenizer.name:
        return TextTokenizer.from_dict(data).to_files()
    if data["name"] == "cells-rank":
        return {GENES: gene_table(data["genes"])}
    return {OURS: to_json(data)}


def kmer_files(parts: Parts, tokenizer_class: str) -> dict[str, str | bytes]:
    """Return the settings of a k-mer tokenizer as its authors' class ``tokenizer_class`` reads them."""
    data = parts["tokenizer"]
    tokenizer = tokenizer_from_dict(data)
    named = {TOKENS[role]: token for role, token in tokenizer.vocabulary.roles.items()}
    begin_end = {"add_bos_token": True, "add_eos_token": data.get("end", True)}
    return {
        "tokenizer_config.json": to_json({"tokenizer_class": tokenizer_class, "k": data["k"], **begin_end, **named})
    }


def gene_table(genes: dict[str, Any]) -> str:
    """Return a gene vocabulary as the text of a table, which ``GeneVocabulary.from_table`` reads."""
    aliases = genes["aliases"] or [""] * len(genes["tokens"])
    columns = (genes["tokens"], range(len(aliases)), genes["medians"], aliases)
    lines = ["\t".join(("ensembl_id", "token", "median", "symbol"))]
    for name, token, median, alias in zip(*columns, strict=True):
        lines.append("\t".join((name, str(token), "" if median is None else repr(median), alias)))
    return "\n".join(lines) + "\n"


def to_json(values: dict[str, Any]) -> str:
    """Return a file's text as transformers writes it."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

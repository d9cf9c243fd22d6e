"""Tokenizers of foreign checkpoints: read from their files, and written back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...sequences import TextTokenizer, tokenizer_from_dict, tokenizer_to_dict
from .table import Checkpoint, Parts

TOKENS = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token", "mask": "mask_token", "unk": "unk_token"}


def text_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tokenizer whose files lie beside a checkpoint: tokenizer.json, tokenizer.model or vocab.txt.

    Raises:
        InputError: there is none of them.
        MissingExtra: the package that reads them is not installed.
    """
    return tokenizer_to_dict(TextTokenizer.from_folder(checkpoint.folder))


def role_ids(parts: Parts) -> dict[str, int]:
    """Return the ids of begin, end and padding as a transformers configuration names them."""
    vocabulary = tokenizer_from_dict(parts["tokenizer"]).vocabulary
    found = {f"{TOKENS[role]}_id": vocabulary.role(role) for role in ("bos", "eos", "pad")}
    return {key: value for key, value in found.items() if value is not None}


def tokenizer_files(parts: Parts) -> dict[str, str | bytes]:
    """Return the files of a tokenizer as transformers writes them; those of a k-mer tokenizer are GENERator's."""
    data = parts["tokenizer"]
    tokenizer = tokenizer_from_dict(data)
    roles = {TOKENS[role]: token for role, token in tokenizer.vocabulary.roles.items()}
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.to_files()
    if data["name"] == "dna-kmer":
        kmer = {
            "tokenizer_class": "DNAKmerTokenizer",
            "k": data["k"],
            "add_bos_token": True,
            "add_eos_token": data["end"],
        }
        return {"tokenizer_config.json": _text({**kmer, **roles})}
    return {}


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

"""Tokenizers of foreign checkpoints: read from their files, and written back."""

from __future__ import annotations

import json
from typing import Any

from ...sequences import TextTokenizer, tokenizer_from_dict, tokenizer_to_dict
from .table import Checkpoint, Parts
from .values import read_json

ROLE_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def text_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tokenizer whose files lie beside a checkpoint: tokenizer.json, tokenizer.model or vocab.txt.

    Raises:
        InputError: there is none of them.
        MissingExtra: the package that reads them is not installed.
    """
    return tokenizer_to_dict(TextTokenizer.from_folder(checkpoint.folder))


def role_ids(parts: Parts) -> dict[str, int]:
    """Return begin, end and padding as a transformers configuration names them."""
    vocabulary = tokenizer_from_dict(parts["tokenizer"]).vocabulary
    found = {key: vocabulary.role(role) for role, key in ROLE_IDS.items()}
    return {key: value for key, value in found.items() if value is not None}

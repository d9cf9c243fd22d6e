"""Which tokenizer of ours a checkpoint's vocabulary is: it must be one of them, token for token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...sequences import read_lines, tokenizer_from_dict

HINT = "Train or load it with the package that it comes from, or write the folder's vocabulary in our order."


def tokenizer_in(folder: Path | None, candidates: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """Return the one of ``candidates`` (tokenizers as in ``config.json``) that a checkpoint was trained with.

    What the folder says of it, in ``vocab.txt`` or ``tokenizer.json``, must agree token for token. A folder that says
    nothing has the candidate with as many tokens as the embedding has ``rows``, or else the only one.

    Raises:
        InputError: none agrees, or nothing tells which.
    """
    tokens = None if folder is None else vocabulary_in(folder)
    known = [list(tokenizer_from_dict(one).vocabulary.tokens) for one in candidates]
    if tokens is not None:
        for one, own in zip(candidates, known, strict=True):
            if own == tokens:
                return dict(one)
        nearest = max(known, key=lambda own: sum(a == b for a, b in zip(own, tokens, strict=False)))
        at = next((i for i, (a, b) in enumerate(zip(nearest, tokens, strict=False)) if a != b), None)
        what = f"{len(tokens)} tokens in place of {len(nearest)}"
        if at is not None:
            what = f"token {at} is {tokens[at]!r} in place of {nearest[at]!r}"
        raise InputError(f"The vocabulary in the folder is none of ours: {what}.", path=folder)
    fitting = [one for one, own in zip(candidates, known, strict=True) if len(own) == rows]
    if not fitting and len(candidates) == 1 and len(known[0]) <= rows:
        fitting = [candidates[0]]
    if len(fitting) != 1:
        sizes = ", ".join(str(len(own)) for own in known)
        raise InputError(f"The embedding has {rows} rows; the vocabularies that this format comes with have {sizes}.")
    return dict(fitting[0])


def vocabulary_in(folder: Path) -> list[str] | None:
    """Return the tokens that a checkpoint's folder lists, in order, or None.

    Raises:
        InputError: its ``tokenizer.json`` is damaged or numbers its tokens with gaps.
    """
    if (folder / "vocab.txt").is_file():
        return [line.strip() for _, line in read_lines(folder / "vocab.txt")]
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ids = dict(data["model"]["vocab"]) | {token["content"]: token["id"] for token in data["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"The vocabulary cannot be read ({error}).", path=path) from None
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise InputError("The vocabulary numbers its tokens with gaps.", path=path)
    return tokens

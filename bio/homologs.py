"""Homologs as one sequence of tokens, the context of Prot-xLSTM and ProtMamba (arXiv:2411.04165, section 3).

    <cls> M K T <cls> M R T ...                                  positions start anew at each <cls>
    <cls> M <mask-1> A <eos> <mask-1> K T                        K T filled in from both sides

A span that is to be filled in moves behind ``<eos>``; its residues keep their positions, its mask token has the
position of its first residue at both places, and ``<eos>`` has position 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from ..sequences import PackedBatch, Tokenizer, move_spans_behind, span_masks
from ..sequences.filling import MOST_POSITIONS

Spans = Sequence[tuple[int, int]]


def homolog_context(
    homologs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    spans: Mapping[int, Spans] | None = None,
    positions: int = MOST_POSITIONS,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the tokens of homologs and the position of each in its own homolog, both [tokens].

    Args:
        homologs: sequences, aligned (a3m) or not: gaps are left out, insertions in lower case are read as upper case.
        tokenizer: of a model that reads homologs; it begins each with its begin token and ends it with none.
        spans: for a homolog by its number from 0, the spans of residues to be filled in: first and last residue, from 1
            and without gaps, in order and apart.
        positions: how many positions the model knows; later residues of a homolog share the last one.

    Raises:
        InputError: a letter that is no amino acid, or spans that overlap, lie outside or are more than the model has
            masks for, by the record's number from 1.
    """
    tokens: list[NDArray[np.int32]] = []
    places: list[NDArray[np.int64]] = []
    for number, homolog in enumerate(homologs):
        try:
            ids = tokenizer.encode(homolog.replace("-", "").replace(".", "").upper())
            own = () if spans is None else spans.get(number, ())
            moved, at = _filled_in(ids, own, tokenizer, positions)
        except InputError as error:
            raise error.at(record=number + 1) from None
        tokens.append(moved.astype(np.int32))
        places.append(at)
    if not tokens:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    return np.concatenate(tokens), np.concatenate(places)


def _filled_in(
    ids: NDArray[np.int32], spans: Spans, tokenizer: Tokenizer, positions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and positions of one homolog whose spans stand behind the rest."""
    masks = len(span_masks(tokenizer.vocabulary))
    if masks < len(spans):
        raise InputError(f"The model has no <mask-{masks + 1}>, so it cannot fill in {len(spans)} spans.")
    behind = 1
    for first, last in spans:
        if not behind <= first <= last < len(ids):
            raise InputError(f"The span {first} to {last} is empty, overlaps another or lies outside of the sequence.")
        behind = last + 1
    cut = [(first, last + 1) for first, last in spans]
    return move_spans_behind(ids, cut, tokenizer.vocabulary, positions=positions)


def homolog_batch(
    families: Sequence[Sequence[str]], tokenizer: Tokenizer, *, positions: int = MOST_POSITIONS
) -> PackedBatch:
    """Return one sequence for each family of homologs, positions starting anew at each homolog.

    Raises:
        InputError: as ``homolog_context``.
    """
    contexts = [homolog_context(family, tokenizer, positions=positions) for family in families]
    batch = PackedBatch.from_sequences([tokens for tokens, _ in contexts])
    places = np.concatenate([at for _, at in contexts]) if contexts else np.zeros(0, np.int64)
    return PackedBatch(batch.tokens, batch.cu_seqlens, torch.from_numpy(places))

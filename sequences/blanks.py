"""Blanks of a sequence, written behind the rest of it (GLM, Du et al. 2022, arXiv:2103.10360, section 2.1).

    M K T A R I        K T and I blanked     M <smask> A R <smask>   <sop> I    <sop> K  T
                       positions             0    1    2 3    4        5   6      2   3  4
                       of these in a blank   0    0    0 0    0        1   2      1   2  3
                       targets                                         I <eop>    K   T <eop>

The tokens up to the last mask are the prefix and see each other both ways; those behind it see the prefix and what was
written before them. A blank's tokens take up the position behind their mask's, so that it is known where they belong
and not how long they are: GLM's two positions are that of the mask and the one in the blank, and they add up to these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .vocabulary import Vocabulary

SHORT, LONG, BEGIN, END = BLANK_TOKENS = ("<smask>", "<gmask>", "<sop>", "<eop>")
NOTHING = -1  # is asked at this token


class Blanked(NamedTuple):
    """One sequence with blanks.

    Attributes:
        tokens: what is read, int64 [tokens].
        positions: of each token, int64 [tokens].
        block_positions: how much of it is the place in its blank, from 1; 0 in the prefix. int64 [tokens].
        targets: the token that is asked for there, or -1: nothing, int64 [tokens].
        prefix: how many tokens see each other both ways.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    block_positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    prefix: int


def require_blanks(vocabulary: Vocabulary, what: str) -> None:
    """Raise ``ConfigError`` if ``what`` needs a token for blanks that the vocabulary lacks."""
    absent = [name for name in BLANK_TOKENS if name not in vocabulary.ids]
    if absent:
        raise ConfigError(f"{what} needs the tokens {', '.join(BLANK_TOKENS)}; the tokenizer lacks {absent[0]}.")


def without_blanks(tokens: NDArray[np.int64], targets: NDArray[np.int64] | None = None) -> Blanked:
    """Return one sequence that is read both ways, all of it; nothing is asked but ``targets``."""
    asked = np.full(len(tokens), NOTHING) if targets is None else targets
    return Blanked(tokens, np.arange(len(tokens)), np.zeros(len(tokens), np.int64), asked, len(tokens))


def blanked(
    tokens: NDArray[np.int64],
    spans: Sequence[tuple[int, int]],
    mask: str,
    vocabulary: Vocabulary,
    *,
    order: Sequence[int] = (0,),
) -> Blanked:
    """Return one sequence with ``spans``, half-open and apart, as blanks that are written in ``order``.

    An empty span is a blank of which nothing is written yet: what is read ends with its ``<sop>``.
    """
    ids = vocabulary.ids
    edges = [edge for span in spans for edge in span]
    rest, cut = np.split(tokens, edges)[::2], np.split(tokens, edges)[1::2]
    read = np.concatenate([np.append(part, ids[mask]) for part in rest[:-1]] + [rest[-1]])
    places = np.cumsum([len(part) + 1 for part in rest[:-1]]) - 1  # the position of each mask
    start = without_blanks(read)
    parts, positions, blocks, asked = [read], [start.positions], [start.block_positions], [start.targets]
    for number in order:
        block = 1 + np.arange(len(cut[number]) + 1)
        parts.append(np.insert(cut[number], 0, ids[BEGIN]))
        positions.append(places[number] + block)
        blocks.append(block)
        asked.append(np.append(cut[number], ids[END]))
    joined = [np.concatenate(some) for some in (parts, positions, blocks, asked)]
    return Blanked(joined[0], joined[1], joined[2], joined[3], len(read))


def own_part(ids: NDArray[np.integer], vocabulary: Vocabulary) -> tuple[int, int]:
    """Return the first token of an encoding that is no special one, and the one past the last of them.

    Where there is none, both are the place of the end token, or the end. A token that begins sequences as well (the
    ``<cls>`` of Prot-xLSTM) is no end where it comes first.
    """
    own = np.flatnonzero(~np.isin(ids, list(vocabulary.special_ids)))
    if len(own):
        return int(own[0]), int(own[-1]) + 1
    begin, end = vocabulary.role("bos"), vocabulary.role("eos")
    ends = np.flatnonzero((ids == end) & ((end != begin) | (np.arange(len(ids)) > 0))) if end is not None else own
    place = int(ends[0]) if len(ends) else len(ids)
    return place, place

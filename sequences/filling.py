"""Spans that are to be filled in, moved behind the rest of their sequence (ProtMamba; Prot-xLSTM, arXiv:2411.04165).

    <cls> M K T R        becomes        <cls> M <mask-1> R <eos> <mask-1> K T
      0   1 2 3 4                         0   1    2     4   0      2     2 3

Below: positions. A moved token keeps its own, a mask has that of the span's first token, and ``<eos>`` has 0. So the
tokens behind a span tell by their positions how long it is. Training, homologs with spans and generation (``generate``
with ``gaps``) lay sequences out with ``move_spans_behind`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile

import numpy as np
from numpy.typing import NDArray

from .vocabulary import Vocabulary

END_OF_REST = "<eos>"  # by name: in Prot-xLSTM it is not the token that ends a sequence
MOST_POSITIONS = 2048  # later tokens of a homolog share the last position


def span_masks(vocabulary: Vocabulary) -> list[int]:
    """Ids of ``<mask-1>``, ``<mask-2>``, ..., as many as the vocabulary has."""
    return [vocabulary.ids[name] for name in takewhile(vocabulary.ids.__contains__, (f"<mask-{i}>" for i in count(1)))]


def fills_in(vocabulary: Vocabulary) -> bool:
    """Tell whether the vocabulary has the tokens for one span at least."""
    return END_OF_REST in vocabulary.ids and bool(span_masks(vocabulary))


def move_spans_behind(
    ids: NDArray[np.integer],
    spans: Sequence[tuple[int, int]],
    vocabulary: Vocabulary,
    *,
    positions: int = MOST_POSITIONS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens of one sequence with its spans moved behind the rest, and their positions.

    Args:
        ids: token ids, [tokens].
        spans: first token of each and the one past its last, in order and apart; no more than there are masks.
        vocabulary: holds ``<eos>`` and the masks.
        positions: how many there are; later tokens have the last one.

    Returns:
        Ids and positions, both int64 [tokens + 2 spans + 1], or [tokens] where there is no span.
    """
    at = np.arange(len(ids))
    if not spans:
        return ids.astype(np.int64), np.minimum(at, positions - 1)
    masks = span_masks(vocabulary)[: len(spans)]
    edges = [edge for span in spans for edge in span]
    rest, moved = np.split(at, edges)[::2], np.split(at, edges)[1::2]
    first = [at[begin : begin + 1] for begin, _ in spans]
    places: list[NDArray[np.integer]] = []
    tokens: list[NDArray[np.integer]] = []
    for part, mask, place in zip(rest, masks, first, strict=False):
        places += [part, place]
        tokens += [ids[part], np.array([mask])]
    places += [rest[-1], np.zeros(1, np.int64)]
    tokens += [ids[rest[-1]], np.array([vocabulary.ids[END_OF_REST]])]
    for part, mask, place in zip(moved, masks, first, strict=True):
        places += [place, part]
        tokens += [np.array([mask]), ids[part]]
    return np.concatenate(tokens).astype(np.int64), np.minimum(np.concatenate(places), positions - 1)

"""Fill-in-the-middle as Prot-xLSTM and ProtMamba train it (arXiv:2411.04165, section 3; their ``MultipleSpanFIM``)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from ...sequences import PackedBatch, Vocabulary, fills_in, move_spans_behind, span_masks
from ...sequences.filling import MOST_POSITIONS
from .causal import causal
from .objective import Objective

MOST_SPANS, SPANS, LONGEST = 5, 1.0, 0.2  # of a part: most spans, their mean number before that limit, share of the gap


def fill_in(
    batch: PackedBatch, vocabulary: Vocabulary, generator: torch.Generator, *, positions: int = MOST_POSITIONS
) -> Objective:
    """Move spans behind the rest of their part, then predict every next token.

    A part is one homolog: it begins at each begin token and wherever a sequence begins. It has a Poisson(1) number of
    spans (drawn anew above 5). They begin at different ordinary tokens and take uniformly 1 to one less than a fifth of
    the tokens to the next span's begin (at least 1), as far as ordinary tokens go. ``move_spans_behind`` lays them out.
    The position of a token is its place in its part before the move, at most ``positions`` - 1. All next tokens count
    but those that ``causal`` leaves out.

    Raises:
        ConfigError: the vocabulary lacks the begin token, ``<eos>`` or one of ``<mask-1>`` to ``<mask-5>``.
    """
    begin = vocabulary.require("bos")
    if not fills_in(vocabulary) or len(span_masks(vocabulary)) < MOST_SPANS:
        raise ConfigError(
            "Fill-in-the-middle needs the tokens <eos> and <mask-1> to <mask-5>, and the tokenizer lacks some of them. "
            "The recipe prot-xlstm has such a tokenizer."
        )
    device = batch.tokens.device
    tokens = batch.tokens.cpu().numpy()
    ordinary = ~np.isin(tokens, list(vocabulary.special_ids))
    edges = np.union1d(np.flatnonzero(tokens == begin), batch.cu_seqlens.cpu().numpy())
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    ids, at, longer = [], [], np.zeros(len(tokens) + 1, np.int64)
    for first, end in pairwise(edges.tolist()):
        spans = drawn_spans(ordinary[first:end], rng)
        moved, places = move_spans_behind(tokens[first:end], spans, vocabulary, positions=positions)
        ids.append(moved)
        at.append(places)
        longer[end] = len(moved) - (end - first)
    cu_seqlens = batch.cu_seqlens + torch.from_numpy(np.cumsum(longer)).to(device)[batch.cu_seqlens]
    inputs = PackedBatch(_joined(ids).to(device), cu_seqlens, _joined(at).to(device), batch.conditions)
    return causal(inputs, vocabulary, generator)


def drawn_spans(ordinary: NDArray[np.bool_], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the spans of one part, half-open, in order and apart; its first token is in none."""
    number = int(rng.poisson(SPANS))
    while number > MOST_SPANS:
        number = int(rng.poisson(SPANS))
    candidates = np.flatnonzero(ordinary[1:]) + 1
    starts = np.sort(rng.choice(candidates, min(number, len(candidates)), replace=False)).tolist()
    stops = np.append(np.flatnonzero(~ordinary), len(ordinary))
    spans = []
    for start, gap_end in pairwise([*starts, len(ordinary)]):
        length = int(rng.integers(1, max(int(LONGEST * (gap_end - start)), 2)))
        stop = int(stops[np.searchsorted(stops, start)])
        spans.append((start, min(start + length, stop)))
    return spans


def _joined(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64))

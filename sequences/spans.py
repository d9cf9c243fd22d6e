"""Spans of tokens that go with sequences: entities to be masked, answers to be learned.

A span is its first token and the one past its last, counted in its sequence from 0, begin tokens included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from .batch import PackedBatch
from .store import TokenStore
from .vocabulary import Vocabulary

Span: TypeAlias = tuple[int, int]


class Spanned(Sequence[NDArray[np.integer]]):
    """Token sequences with the spans in each; they may overlap.

    Attributes:
        sequences: token ids.
    """

    def __init__(
        self, sequences: Sequence[NDArray[np.integer] | Sequence[int]], spans: Sequence[Sequence[Span]]
    ) -> None:
        """Put the two together.

        Raises:
            InputError: there are spans of another number of sequences, or one is empty or outside of its sequence.
        """
        if len(spans) != len(sequences):
            raise InputError(f"There are spans of {len(spans)} sequences, and {len(sequences)} sequences.")
        for number, (sequence, own) in enumerate(zip(sequences, spans, strict=True), 1):
            check_spans(own, len(sequence), f"Sequence {number}")
        self.sequences = sequences
        self._spans = np.array([span for own in spans for span in own], np.int32).reshape(-1, 2)
        self._offsets = np.cumsum([0, *map(len, spans)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # the overloads of Sequence say it
        return self.sequences[index]

    def spans_of(self, index: int) -> list[Span]:
        """Return the spans of one sequence."""
        index = range(len(self))[index]
        return [(int(a), int(b)) for a, b in self._spans[self._offsets[index] : self._offsets[index + 1]]]


@dataclass(frozen=True)
class SpannedBatch(PackedBatch):
    """A batch that knows the spans of its sequences; they are for objectives, and what these return has none.

    Attributes:
        spans: of each sequence.
    """

    spans: tuple[tuple[Span, ...], ...] = ()

    @classmethod
    def of(cls, batch: PackedBatch, spans: Iterable[Iterable[Span]]) -> SpannedBatch:
        """Give ``batch`` the spans of each of its sequences."""
        return cls(batch.tokens, batch.cu_seqlens, batch.positions, batch.conditions, spans=tuple(map(tuple, spans)))


def has_spans(sequences: object) -> bool:
    """Tell whether sequences know their spans."""
    return isinstance(sequences, Spanned) or (isinstance(sequences, TokenStore) and sequences.spanned)


def spans_in(batch: PackedBatch) -> tuple[tuple[Span, ...], ...]:
    """Return the spans of each sequence of a batch.

    Raises:
        ConfigError: the batch has none.
    """
    if not isinstance(batch, SpannedBatch):
        raise ConfigError("This objective needs sequences with spans (sequences.Spanned, or a token store with them).")
    return batch.spans


def check_spans(spans: Iterable[Span], length: int, what: str) -> None:
    """Raise InputError, which calls the sequence ``what``, if a span is empty or ends beyond ``length``."""
    for first, end in spans:
        if not 0 <= first < end <= length:
            raise InputError(f"{what} has a length of {length} and no span from {first} to {end}.")


def cut_spans(spans: Iterable[Span], start: int, length: int) -> list[Span]:
    """Return what of each span lies in the piece of ``length`` tokens that begins at token ``start``."""
    cut = [(max(first - start, 0), min(end - start, length)) for first, end in spans]
    return [(first, end) for first, end in cut if first < end]


def token_lengths(vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Return how many letters of an input each token stands for, int64 [vocabulary]; a special token for none."""
    special = vocabulary.special_ids
    return np.array([0 if i in special else len(token) for i, token in enumerate(vocabulary.tokens)], np.int64)


def token_spans(
    spans: Sequence[Span], ids: NDArray[np.integer], lengths: NDArray[np.int64], *, what: str = "The sequence"
) -> list[Span]:
    """Return the tokens that hold letters of each span.

    Args:
        spans: of letters: the first one, from 0, and the one past the last.
        ids: of the tokens.
        lengths: letters of each token of the vocabulary, see ``token_lengths``.
        what: what errors call the sequence.

    Raises:
        InputError: a span is empty or ends beyond the sequence.
    """
    if not spans:
        return []
    ends = np.cumsum(lengths[ids])
    check_spans(spans, int(ends[-1]) if len(ends) else 0, what)
    letters = np.array(spans, np.int64)
    first = np.searchsorted(ends, letters[:, 0], side="right")
    last = np.searchsorted(ends - lengths[ids], letters[:, 1], side="left")
    return list(zip(first.tolist(), last.tolist(), strict=True))

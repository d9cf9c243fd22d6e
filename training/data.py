"""The data of a run, its order a pure function of the seed and the epoch.

No state is kept, so a run is resumed from two numbers, the epoch and the position in it. Which process reads a batch
has no say in what is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, InputError
from ..sequences import PackedBatch, SpannedBatch, TokenStore, cut_spans, has_spans
from .batches import BLOCK, Batches, Order, endless, fill_batches, shuffled
from .taught import Taught

Sequences = Sequence[NDArray[np.integer]] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Mixture:
    """Several sets of sequences that are trained on together, each with a share of the tokens.

    An epoch is one pass over the first; of each other one as many sequences are read as give it its weight, beginning
    where the epoch before left off, so that all of them are read equally often.

    Attributes:
        sources: arrays or token stores, all made by one tokenizer.
        weights: tokens of each source, relative to each other: (0.9, 0.1) is a replay of 10%.
    """

    sources: tuple[Sequences, ...]
    weights: tuple[float | int, ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ConfigError(f"A mixture of {len(self.sources)} sources has {len(self.weights)} weights.")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"The weights of a mixture are positive numbers, not {self.weights}.")


class Cut:
    """Token sequences of one source, those longer than ``max_length`` cut into consecutive pieces.

    Attributes:
        lengths: length of each piece, [pieces].
        has_spans: whether the sequences know their spans.
    """

    def __init__(self, sequences: Sequences, *, max_length: int | None) -> None:
        """Plan the pieces; no token is read or copied.

        Raises:
            InputError: there is no token at all.
        """
        whole: NDArray[np.integer] = (
            sequences.lengths
            if isinstance(sequences, TokenStore)
            else np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
        )
        if not len(whole) or not whole.max():
            raise InputError("There is nothing to train on: no sequence holds a token.")
        self._sequences, self._cut = sequences, max_length or int(whole.max())
        self.has_spans = has_spans(sequences)
        self.lengths = whole
        self._first: NDArray[np.int64] | None = None
        if whole.min() > 0 and whole.max() <= self._cut:
            return  # each sequence is one piece: the common case, which costs no memory
        counts = -(-whole // self._cut)  # an empty sequence has no piece
        first = np.cumsum(counts, dtype=np.int64) - counts
        self.lengths = np.full(int(counts.sum()), self._cut, whole.dtype)
        filled = counts > 0
        last = first[filled] + counts[filled] - 1
        self.lengths[last] = (whole - (counts - 1) * self._cut)[filled]
        self._first = first

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        return self.part(index, 0, int(self.lengths[index]))

    def part(self, index: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens ``start:stop`` of a piece; no other is read from a store."""
        owner, before = self._place(index)
        if isinstance(self._sequences, TokenStore):
            return self._sequences.part(owner, before + start, before + stop)
        return np.asarray(self._sequences[owner][before + start : before + stop])

    def _place(self, index: int) -> tuple[int, int]:
        """The sequence that a piece is of, and where in it the piece begins."""
        if self._first is None:
            return index, 0
        owner = int(np.searchsorted(self._first, index, side="right")) - 1
        return owner, (index - int(self._first[owner])) * self._cut

    def spans_of(self, index: int) -> list[tuple[int, int]]:
        """What lies in a piece of the spans of its sequence."""
        owner, start = self._place(index)
        spans: list[tuple[int, int]] = self._sequences.spans_of(owner)  # type: ignore[union-attr]
        return cut_spans(spans, start, int(self.lengths[index]))


class Pieces:
    """What a run is trained on: the pieces of one source, or those of a mixture one after the other.

    Attributes:
        lengths: length of each piece, [pieces].
    """

    def __init__(self, sequences: Sequences | Mixture, *, max_length: int | None = None) -> None:
        """Plan the pieces: consecutive, at most ``max_length`` long, without overlap. No token is read or copied.

        Raises:
            InputError: there is no token at all.
        """
        mixed = isinstance(sequences, Mixture)
        self.taught = sequences if isinstance(sequences, Taught) else None
        sources = sequences.sources if isinstance(sequences, Mixture) else (sequences,)
        self._parts = [Cut(source, max_length=max_length) for source in sources]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._counts = _epoch_counts(self._parts, sequences.weights) if isinstance(sequences, Mixture) else None
        self.lengths = np.concatenate([part.lengths for part in self._parts]) if mixed else self._parts[0].lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        part, within = self._place(index)
        return part[within]

    def part(self, index: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens ``start:stop`` of a piece; no other is read from a store."""
        part, within = self._place(index)
        return part.part(within, start, stop)

    def _place(self, index: int) -> tuple[Cut, int]:
        """The part that a piece is of, and its number there."""
        if len(self._parts) == 1:
            return self._parts[0], index
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part]) - len(self._parts[part]))

    @property
    def has_spans(self) -> bool:
        """Whether all sequences know their spans."""
        return all(part.has_spans for part in self._parts)

    def spans_of(self, index: int) -> list[tuple[int, int]]:
        """The spans of one piece."""
        part, within = self._place(index)
        return part.spans_of(within)

    def order(self, *, seed: int, epoch: int) -> Order:
        """The pieces of one epoch, in the order in which they are read."""
        if self._counts is None:
            return shuffled(len(self), seed, epoch)
        starts = self._ends - [len(part) for part in self._parts]
        chosen = [
            int(start) + endless(len(part), seed, number, begin=epoch * count, taken=count).astype(np.int64)
            for number, (part, start, count) in enumerate(zip(self._parts, starts, self._counts, strict=True))
        ]
        joined: Order = np.concatenate(chosen)
        return joined[shuffled(len(joined), seed, epoch)]

    def batches(self, *, batch_tokens: int, seed: int, epoch: int) -> Batches:
        """The batches of one epoch."""
        return fill_batches(self.lengths, self.order(seed=seed, epoch=epoch), batch_tokens=batch_tokens)

    def batch(self, indices: NDArray[np.integer] | Sequence[int], *, vocabulary_size: int) -> PackedBatch:
        """Pack the pieces ``indices``; the batch knows what labels or preferences teach of it.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        batch = PackedBatch.from_sequences([self[int(i)] for i in indices])
        check_tokens(batch.tokens, vocabulary_size)
        if self.taught is not None:
            return self.taught.teach(batch, indices)
        return SpannedBatch.of(batch, (self.spans_of(int(i)) for i in indices)) if self.has_spans else batch

    def fingerprint(self) -> str:
        """A short hash that tells one training set from another: all lengths, and the tokens of up to 1,000 pieces."""
        digest = hashlib.sha256()
        for start in range(0, len(self), BLOCK):
            digest.update(self.lengths[start : start + BLOCK].astype(np.int64).tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, 1000).astype(np.int64)):
            digest.update(self[int(index)].astype(np.int64).tobytes())
            if self.has_spans:
                digest.update(repr(self.spans_of(int(index))).encode())
        if self._counts is not None:
            digest.update(np.array(self._counts, np.int64).tobytes())
        if self.taught is not None:
            digest.update(self.taught.digest())
        return digest.hexdigest()[:16]


def check_tokens(tokens: Int[Tensor, " tokens"], vocabulary_size: int) -> None:
    """Raise for a token id that a vocabulary does not have.

    Raises:
        InputError: there is one.
    """
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary_size:
        raise InputError(
            f"Token id {low if low < 0 else high} is not in the model's vocabulary of {vocabulary_size}.",
            hint="The sequences were made by another tokenizer; tokenize the input again.",
        )


def _epoch_counts(parts: Sequence[Cut], weights: Sequence[float | int]) -> list[int]:
    """How many pieces of each part make an epoch: all of the first, and of the others as their weights say."""
    tokens = [int(part.lengths.sum(dtype=np.int64)) for part in parts]
    shares = [tokens[0] * weight / weights[0] for weight in weights]  # tokens wanted of each
    return [
        max(1, round(share / (total / len(part)))) for share, total, part in zip(shares, tokens, parts, strict=True)
    ]

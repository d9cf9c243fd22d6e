"""Lanes: long sequences read piece by piece, step after step, in an order that is a pure function.

The sequences of an epoch are dealt to lanes. Each step reads the next ``tokens`` tokens of every lane, laid end to end
as one batch: the end of a sequence that the step before began, whole short ones, and the beginning of another. So a
sequence is always read by one lane, and what it was is the state after the last token of that lane.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from ..sequences import PackedBatch
from .batches import BLOCK, Order
from .data import Pieces, check_tokens

GREEDY = 2**16  # sequences dealt one by one, the longest ones
STRIDE = 2**10  # sequences between two places of a lane that are known
GOES_ON = "goes_on"  # the condition of a batch that tells which of its sequences the next step goes on with


class Spans(NamedTuple):
    """What one batch reads, in the order of the lanes.

    Attributes:
        sequences: number of each sequence, [spans].
        starts: its first token that is read, [spans].
        lengths: tokens that are read, [spans]; the token behind the last is a target and no more.
        goes_on: whether the next step goes on with it, [spans].
    """

    sequences: NDArray[np.integer]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    goes_on: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        """Tokens of its sequences that are read for the first time, the last ones, which are only targets, included."""
        return int(self.lengths.sum()) + int((~self.goes_on).sum())

    def batch(self, pieces: Pieces, *, vocabulary_size: int) -> PackedBatch:
        """Read the tokens; positions are those in the whole sequence, so that one above 0 goes on from a state.

        Each sequence has one token more than is read, the last target: ``causal`` then asks for every token of a
        sequence, wherever it is cut, but for its first.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        parts = [
            pieces.part(int(index), int(start), int(start + length) + 1)
            for index, start, length in zip(self.sequences, self.starts, self.lengths, strict=True)
        ]
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        check_tokens(tokens, vocabulary_size)
        lengths, offsets = torch.from_numpy(self.lengths + 1), torch.from_numpy(self.starts)
        batch = PackedBatch.from_lengths(tokens, lengths, offsets=offsets)
        goes_on = {GOES_ON: torch.from_numpy(self.goes_on)}
        return PackedBatch(batch.tokens, batch.cu_seqlens, batch.positions, goes_on)


class Lanes(Sequence[list[Spans | None]]):
    """The steps of one epoch, each a list of batches of ``lanes`` lanes; None where none has anything left to read."""

    def __init__(
        self, lengths: NDArray[np.integer], order: Order, *, tokens: int, lanes: int, batches: int = 1
    ) -> None:
        """Deal the sequences ``order`` to ``lanes * batches`` lanes.

        Args:
            lengths: of every sequence; its last token is only a target, so one of fewer than two tokens is left out.
            order: of the sequences; those of a lane are read in it.
            tokens: read by a lane at a step.
            lanes: of a batch.
            batches: of a step.

        Raises:
            InputError: no sequence has two tokens.
        """
        self._lengths, self._tokens, self._width = lengths, tokens, lanes
        self._lanes = deal(lengths, order, lanes * batches)
        self._marks = [_marks(lengths, lane) for lane in self._lanes]
        self._steps = -(-max(int(marks[-1]) for marks in self._marks) // tokens)
        if not self._steps:
            raise InputError("There is nothing to train on: no sequence holds two tokens.")

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # the overloads of Sequence say it
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        groups: list[Spans | None] = []
        for first in range(0, len(self._lanes), self._width):
            spans = [self._spans(lane, index) for lane in range(first, first + self._width)]
            joined = Spans(*(np.concatenate(parts) for parts in zip(*spans, strict=True)))
            groups.append(joined if len(joined.sequences) else None)
        return groups

    def _spans(self, lane: int, step: int) -> Spans:
        """What a lane reads at a step."""
        begin, end, marks = step * self._tokens, (step + 1) * self._tokens, self._marks[lane]
        near = max(int(np.searchsorted(marks, begin, side="right")) - 1, 0)
        # Each sequence has a token to read, so no step reads more of them than tokens.
        sequences = self._lanes[lane][near * STRIDE : (near + 1) * STRIDE + self._tokens]
        ends = marks[near] + np.cumsum(self._lengths[sequences] - 1, dtype=np.int64)
        starts = ends - (self._lengths[sequences] - 1)
        read = (starts < end) & (ends > begin)
        starts, ends = starts[read], ends[read]
        first = np.maximum(starts, begin)
        return Spans(sequences[read], first - starts, np.minimum(ends, end) - first, ends > end)


def deal(lengths: NDArray[np.integer], order: Order, lanes: int) -> list[Order]:
    """Deal the sequences ``order`` to lanes that hold about as many tokens each; each keeps the order.

    The longest go one by one, longest first, to the lane that has least (Graham 1969), the others in runs that fill
    the lanes up. So lanes end together, and the batches are full to the end, as far as the sequences allow.
    """
    order = order[lengths[order] > 1]
    sizes = lengths[order]
    fewest = 0 if len(order) <= GREEDY else int(np.partition(sizes, len(sizes) - GREEDY)[len(sizes) - GREEDY])
    longest = np.flatnonzero(sizes > fewest)
    longest = longest[np.argsort(-sizes[longest].astype(np.int64), kind="stable")]
    heap = [(0, lane) for lane in range(lanes)]
    owned: list[list[int]] = [[] for _ in range(lanes)]
    for index, size in zip(longest.tolist(), sizes[longest].tolist(), strict=True):
        held, lane = heap[0]
        heapq.heapreplace(heap, (held + size - 1, lane))
        owned[lane].append(index)
    rest = np.flatnonzero(sizes <= fewest)
    ends = np.cumsum(sizes[rest] - 1, dtype=np.int64)
    cuts = _fill([held for held, _ in sorted(heap, key=lambda entry: entry[1])], int(ends[-1]) if len(ends) else 0)
    runs = np.split(rest, np.searchsorted(ends, cuts, side="right"))
    dealt = [np.sort(np.concatenate((np.array(mine, np.int64), run))) for mine, run in zip(owned, runs, strict=True)]
    return [order[at] for at in dealt]


def _fill(held: list[int], total: int) -> NDArray[np.int64]:
    """Where to cut a run of ``total`` tokens so that what the lanes hold, and a part of it each, come to the same."""
    level, wanted = (sum(held) + total) / len(held), np.array(held, np.float64)
    wanted = np.maximum(level - wanted, 0)
    scale = total / wanted.sum() if wanted.any() else 0.0
    cuts: NDArray[np.int64] = np.rint(np.cumsum(wanted)[:-1] * scale).astype(np.int64)
    return cuts


def _marks(lengths: NDArray[np.integer], lane: Order) -> NDArray[np.int64]:
    """Tokens to read before every ``STRIDE``-th sequence of a lane, and all of them at the end."""
    sums = [np.zeros(1, np.int64)]
    for start in range(0, len(lane), BLOCK):
        sizes = lengths[lane[start : start + BLOCK]].astype(np.int64) - 1
        sums.append(np.add.reduceat(sizes, np.arange(0, len(sizes), STRIDE)))
    marks: NDArray[np.int64] = np.cumsum(np.concatenate(sums))
    return marks

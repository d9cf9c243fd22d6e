"""Batches of an epoch: which sequences stand in each, and which process reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Order = NDArray[np.integer]
Batch = TypeVar("Batch")

BLOCK = 2**20  # sequences looked at together
FILLED = 0.96  # of the tokens that batches could hold; those filled in order hold less where sequences are long
OPEN = 16  # batches filled at a time then


def shuffled(count: int, *seed: int) -> Order:
    """The numbers below ``count`` in an order that is a function of ``seed``, in int32 where that is enough."""
    numbers: Order = np.arange(count, dtype=np.int32 if count <= 2**31 else np.int64)
    np.random.default_rng(seed).shuffle(numbers)
    return numbers


def endless(count: int, *seed: int, begin: int, taken: int) -> Order:
    """Items ``begin`` and on of an endless row of shuffled passes over ``count`` items."""
    passes = range(begin // count, (begin + taken - 1) // count + 1)
    row = np.concatenate([shuffled(count, *seed, number) for number in passes])
    offset = begin - passes.start * count
    return row[offset : offset + taken]


class Batches(Sequence[Order]):
    """Batches, each the indices of the sequences in it, laid end to end in one array."""

    def __init__(self, order: Order, bounds: NDArray[np.int64]) -> None:
        """Batch ``b`` is ``order[bounds[b] : bounds[b + 1]]``."""
        self._order, self._bounds = order, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # the overloads of Sequence say it
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._order[self._bounds[index] : self._bounds[index + 1]]


def fill_batches(lengths: NDArray[np.integer], order: Order, *, batch_tokens: int) -> Batches:
    """Lay the sequences ``order`` into batches of at most ``batch_tokens`` tokens; each stands in one batch.

    They are laid in that order, a batch closing when the next one does not fit. Where batches hold few sequences and
    would stay too empty, ``OPEN`` of them are filled at a time, each sequence going into the fullest that has room
    (bounded-space best fit, Csirik and Johnson 2001). First-fit decreasing would fill them a little better, but it puts
    sequences of one length together, and a gradient from molecules of one size is a worse estimate; and since nothing
    is padded, room that is left costs little. A sequence longer than ``batch_tokens`` gets a batch of its own.
    """
    bounds, tokens = _next_fit(lengths, order, batch_tokens)
    if tokens >= FILLED * batch_tokens * (len(bounds) - 1):
        return Batches(order, bounds)
    return _best_fit(lengths, order, batch_tokens)


def epoch_batches(lengths: NDArray[np.integer], *, batch_tokens: int, seed: int, epoch: int) -> Batches:
    """Return the batches of one epoch over sequences of ``lengths``; see ``fill_batches``."""
    return fill_batches(lengths, shuffled(len(lengths), seed, epoch), batch_tokens=batch_tokens)


def _next_fit(lengths: NDArray[np.integer], order: Order, batch_tokens: int) -> tuple[NDArray[np.int64], int]:
    """Bounds of batches filled one after the other, and all their tokens; summed in blocks, so that memory is small."""
    bounds, start, tokens = [0], 0, 0
    block = max(BLOCK, 2 * batch_tokens)  # holds a whole batch, since no sequence is empty
    while start < len(order):
        ends = np.cumsum(lengths[order[start : start + block]], dtype=np.int64)
        first, used, last = start, 0, start + block >= len(order)
        while start - first < len(ends):
            stop = max(int(np.searchsorted(ends, used + batch_tokens, side="right")), start - first + 1)
            if stop == len(ends) and not last:
                break
            start, used = first + stop, int(ends[stop - 1])
            bounds.append(start)
        tokens += used
    return np.array(bounds, np.int64), tokens


def _best_fit(lengths: NDArray[np.integer], order: Order, batch_tokens: int) -> Batches:
    """Batches in the order in which they were begun."""
    batch_of = np.empty(len(order), np.int32)
    numbers: list[int] = []  # of the open batches, and the room in each
    room: list[int] = []
    begun = 0
    for start in range(0, len(order), BLOCK):
        for i, length in enumerate(lengths[order[start : start + BLOCK]].tolist(), start):
            fitting = [at for at, left in enumerate(room) if left >= length]
            if fitting:
                at = min(fitting, key=room.__getitem__)
            else:
                if len(room) == OPEN:
                    fullest = min(range(OPEN), key=room.__getitem__)
                    del numbers[fullest], room[fullest]
                at = len(room)
                numbers.append(begun)
                room.append(batch_tokens)
                begun += 1
            batch_of[i] = numbers[at]
            room[at] -= length
    bounds = np.concatenate([[0], np.cumsum(np.bincount(batch_of, minlength=begun))]).astype(np.int64)
    return Batches(order[np.argsort(batch_of, kind="stable")], bounds)


def rank_share(batches: Sequence[Batch | None], *, rank: int, world_size: int) -> list[tuple[int, Batch]]:
    """The batches of one step that process ``rank`` of ``world_size`` reads, each with its number in the step.

    Every batch goes to one process, and those with one number to the same in every step; None is no batch. The number
    seeds the draws for the batch (masks, dropout), which so do not depend on how many processes there are.

    Raises:
        ConfigError: there is no such process.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"There is no rank {rank} among {world_size} processes.")
    return [(n, batch) for n, batch in enumerate(batches) if batch is not None and n % world_size == rank]


def even_share(batches: Sequence[Batch | None], *, rank: int, world_size: int) -> list[tuple[int, Batch, bool]]:
    """``rank_share`` made equally long for all, and whether each batch counts.

    A process that has fewer batches takes the first one of the step beside its own, without counting it: all
    processes compute together, since they send each other weights and gradients meanwhile.

    Raises:
        ConfigError: there is no such process.
    """
    shares = [rank_share(batches, rank=other, world_size=world_size) for other in range(world_size)]
    own = [(number, batch, True) for number, batch in rank_share(batches, rank=rank, world_size=world_size)]
    first = next((number, batch, False) for number, batch in enumerate(batches) if batch is not None)
    return own + [first] * (max(map(len, shares)) - len(own))


def seed_of(*numbers: int) -> int:
    """One well-mixed seed from several numbers, so that every use has a stream of its own."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1

"""The order of the data: a pure function of the seed and the epoch.

No state is kept, so a run is resumed from two numbers, the epoch and the position in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from ..sequences import PackedBatch, TokenStore

Sequences = Sequence[NDArray[np.integer]] | Sequence[Sequence[int]]


class Pieces:
    """Token sequences, those longer than ``max_length`` cut into consecutive pieces that do not overlap.

    Attributes:
        lengths: length of each piece, int64 [pieces].
    """

    def __init__(self, sequences: Sequences, *, max_length: int | None = None) -> None:
        """Plan the pieces; no token is read or copied.

        Raises:
            InputError: there is no token at all.
        """
        whole = (
            sequences.lengths
            if isinstance(sequences, TokenStore)
            else np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
        )
        if not whole.sum():
            raise InputError("There is nothing to train on: no sequence holds a token.")
        cut = max_length or int(whole.max())
        counts = -(-whole // cut)  # an empty sequence has no piece
        self._sequences = sequences
        self._owner = np.repeat(np.arange(len(whole)), counts)
        first = np.cumsum(counts) - counts
        self._start = (np.arange(len(self._owner)) - first[self._owner]) * cut
        self.lengths: NDArray[np.int64] = np.minimum(whole[self._owner] - self._start, cut)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        start = self._start[index]
        return np.asarray(self._sequences[int(self._owner[index])][start : start + self.lengths[index]])

    def batch(self, indices: NDArray[np.int64] | Sequence[int], *, vocabulary_size: int) -> PackedBatch:
        """Pack the pieces ``indices``.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        batch = PackedBatch.from_sequences([self[int(i)] for i in indices])
        low, high = (int(bound) for bound in torch.aminmax(batch.tokens))
        if low < 0 or high >= vocabulary_size:
            raise InputError(
                f"Token id {low if low < 0 else high} is not in the model's vocabulary of {vocabulary_size}.",
                hint="The sequences were made by another tokenizer; tokenize the input again.",
            )
        return batch

    def fingerprint(self) -> str:
        """A short hash that tells one training set from another: all lengths, and the tokens of up to 1,000 pieces."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, 1000).astype(np.int64)):
            digest.update(self[int(index)].astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


def epoch_batches(lengths: NDArray[np.int64], *, batch_tokens: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the batches of one epoch, each the indices of the sequences in it; every sequence stands in one batch.

    The sequences are shuffled and laid into batches in that order, a batch closing when the next one does not fit
    ``batch_tokens``. First-fit decreasing would fill the batches a little better, but it puts sequences of one length
    together, and a gradient from molecules of one size is a worse estimate; and since nothing is padded, room that is
    left costs nothing. A sequence longer than ``batch_tokens`` gets a batch of its own.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    batches, start, used = [], 0, 0
    while start < len(order):
        stop = max(int(np.searchsorted(ends, used + batch_tokens, side="right")), start + 1)
        batches.append(order[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches


def seed_of(*numbers: int) -> int:
    """One well-mixed seed from several numbers, so that every use has a stream of its own."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

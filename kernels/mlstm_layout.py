"""Where each token of a packed batch stands in the chunks of the mLSTM.

Short sequences are one chunk each, as long as the longest of their group (the parallel form); sorted by length and
grouped, they leave little padding. Longer ones are cut into chunks of 64, laid out round after round (see
``packing.Rounds``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packing import rounds

_CHUNK = 64
_LONGEST_SINGLE_CHUNK = 256
_GROUP = 2**19  # numbers per tensor in a group of single chunks: 2 MB in float32


class Group(NamedTuple):
    """Sequences that share a chunk length; index tensors are [chunks, heads, chunk length] into tokens * heads rows."""

    members: Tensor  # sequence numbers, most chunks first
    counts: list[int]  # chunks in each round
    source: Tensor  # row that fills each slot; padding repeats the last token of its own sequence
    target: Tensor  # row that each slot fills; padding goes to one row past the end
    padding: Tensor  # which slots are padding


def chunk_groups(
    lengths: NDArray[np.int64], heads: int, qk_dim: int, v_dim: int, *, reverse: bool, device: torch.device
) -> list[Group]:
    """Lay packed sequences out in groups of chunks; at least one sequence is not empty."""
    starts = np.cumsum(lengths) - lengths
    groups = []
    for members, chunk in _share_chunks(lengths, heads, qk_dim, v_dim):
        plan = rounds(-(-lengths[members] // chunk))
        order = members[plan.order]
        sequence = np.concatenate([order[:count] for count in plan.counts]) if plan.counts else order[:0]
        behind = np.repeat(np.arange(len(plan.counts)), plan.counts)[:, None] * chunk + np.arange(chunk)
        last = lengths[sequence][:, None] - 1
        padding = behind > last
        position = np.minimum(behind, last)
        token = starts[sequence][:, None] + (last - position if reverse else position)
        source = token[:, None] * heads + np.arange(heads)[:, None]
        target = np.where(padding[:, None], lengths.sum() * heads, source)
        pads = np.broadcast_to(padding[:, None], source.shape).copy()
        tensors = (torch.from_numpy(array).to(device) for array in (order, source, target, pads))
        order_tensor, *slots = tensors
        groups.append(Group(order_tensor, plan.counts, *slots))
    return groups


def _share_chunks(
    lengths: NDArray[np.int64], heads: int, qk_dim: int, v_dim: int
) -> list[tuple[NDArray[np.int64], int]]:
    """Split the sequences into groups with a chunk length each.

    One chunk of length L costs L (qk_dim + v_dim) products per token, chunks of 64 cost 64 (qk_dim + v_dim)
    + 2 qk_dim v_dim; a sequence becomes a single chunk where that is cheaper.
    """
    single = min(_CHUNK + 2 * qk_dim * v_dim // (qk_dim + v_dim), _LONGEST_SINGLE_CHUNK)
    long, short = np.flatnonzero(lengths > single), np.flatnonzero(lengths <= single)
    groups = [(long, _CHUNK)] if len(long) else []
    short = short[np.argsort(-lengths[short], kind="stable")]
    while len(short):
        chunk = max(int(lengths[short[0]]), 1)
        size = max(1, _GROUP // (heads * chunk * max(qk_dim, v_dim)))
        equal = int((lengths[short] == lengths[short[0]]).sum())
        size = max(size, equal)
        groups.append((short[:size], chunk))
        short = short[size:]
    return groups

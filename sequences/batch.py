"""A batch: sequences laid end to end, never padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, ShapeError


@dataclass(frozen=True)
class PackedBatch:
    """Sequences packed along one axis.

    Sequence ``s`` is ``tokens[cu_seqlens[s]:cu_seqlens[s + 1]]``; nothing that a kernel does crosses that boundary.

    Attributes:
        tokens: token ids, int64 [tokens].
        cu_seqlens: cumulative lengths from 0, int64 [sequences + 1].
        positions: position of each token in its own sequence, int64 [tokens].
        conditions: per-sequence values by name, each [sequences, ...].
        share: where several processes share the batch (``share_batch``), which of its tokens this one has: ``tokens``
            and ``positions`` are then those alone, and ``cu_seqlens`` and ``conditions`` those of the whole batch.
        block_positions: where tokens are written into blanks (``sequences.blanked``), how much of its position is the
            place in its blank, int64 [tokens], 0 for a token that is in none; None: not known. Where they are given,
            positions need not go on from a state.
    """

    tokens: Int[Tensor, " tokens"]
    cu_seqlens: Int[Tensor, " boundaries"]
    positions: Int[Tensor, " tokens"]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    share: SequenceShare | None = None
    block_positions: Int[Tensor, " tokens"] | None = None

    def __post_init__(self) -> None:
        if self.share is not None and len(self.tokens) != self.share.counts[self.share.rank]:
            raise ShapeError("tokens", tuple(self.tokens.shape), (self.share.counts[self.share.rank],))
        if self.positions.shape != self.tokens.shape:
            raise ShapeError("positions", tuple(self.positions.shape), tuple(self.tokens.shape))
        if self.block_positions is not None and self.block_positions.shape != self.tokens.shape:
            raise ShapeError("block_positions", tuple(self.block_positions.shape), tuple(self.tokens.shape))
        if self.cu_seqlens.ndim != 1 or not len(self.cu_seqlens):
            raise ShapeError("cu_seqlens", tuple(self.cu_seqlens.shape), "[sequences + 1]")

    @classmethod
    def from_lengths(
        cls,
        tokens: Int[Tensor, " tokens"],
        lengths: Int[Tensor, " sequences"],
        *,
        offsets: Int[Tensor, " sequences"] | None = None,
    ) -> PackedBatch:
        """Pack joined ``tokens`` of sequences of these ``lengths``; positions start at ``offsets`` (default 0)."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(lengths, 0, out=cu_seqlens[1:])
        start = cu_seqlens[:-1] if offsets is None else cu_seqlens[:-1] - offsets
        positions = torch.arange(len(tokens), device=tokens.device) - torch.repeat_interleave(start, lengths)
        return cls(tokens, cu_seqlens, positions)

    @classmethod
    def one_each(
        cls,
        tokens: Int[Tensor, " sequences"],
        *,
        positions: Int[Tensor, " sequences"],
        block_positions: Int[Tensor, " sequences"] | None = None,
    ) -> PackedBatch:
        """Return one token of each sequence, as in decoding."""
        edges = torch.arange(len(tokens) + 1, device=tokens.device)
        return cls(tokens, edges, positions, block_positions=block_positions)

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int] | NDArray[np.integer] | Tensor], *, device: torch.device | str = "cpu"
    ) -> PackedBatch:
        """Lay token sequences end to end, positions from 0."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        cu_seqlens = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], lengths)
        packed = cls(torch.from_numpy(tokens), torch.from_numpy(cu_seqlens), torch.from_numpy(positions))
        return packed.to(device)

    @classmethod
    def from_padded(
        cls, input_ids: Int[Tensor, "sequences length"], attention_mask: Shaped[Tensor, "sequences length"]
    ) -> PackedBatch:
        """Drop the padding, on whichever side it stands, from Hugging Face style tensors."""
        keep = attention_mask.bool()
        return cls.from_lengths(input_ids[keep].long(), keep.sum(1))

    def to_padded(self, pad: int) -> tuple[Int[Tensor, "sequences length"], Bool[Tensor, "sequences length"]]:
        """Return right-padded token ids and the mask of the real ones."""
        mask = torch.arange(self.max_length, device=self.tokens.device) < self.lengths[:, None]
        padded = self.tokens.new_full(mask.shape, pad)
        padded[mask] = self.tokens
        return padded, mask

    @property
    def lengths(self) -> Int[Tensor, " sequences"]:
        """Length of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def max_length(self) -> int:
        """Length of the longest sequence, 0 for an empty batch."""
        return int(self.lengths.max()) if len(self) else 0

    @property
    def sequence_ids(self) -> Int[Tensor, " tokens"]:
        """Number of the sequence that each token belongs to."""
        if self.share is not None:
            return self.share.cut(self.whole.sequence_ids)
        return torch.repeat_interleave(torch.arange(len(self), device=self.tokens.device), self.lengths)

    @property
    def whole(self) -> PackedBatch:
        """The batch with the tokens that other processes have, where several share it."""
        return self if self.share is None else self.share.whole

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on ``device``."""
        return PackedBatch(
            self.tokens.to(device),
            self.cu_seqlens.to(device),
            self.positions.to(device),
            {name: value.to(device) for name, value in self.conditions.items()},
            None if self.share is None else self.share.to(device),
            None if self.block_positions is None else self.block_positions.to(device),
        )

    def split(self, values: Shaped[Tensor, "tokens ..."]) -> list[Tensor]:
        """Cut per-token ``values`` into one tensor per sequence."""
        return list(torch.split(values, self.lengths.tolist()))


@dataclass(frozen=True)
class SequenceShare:
    """How the processes of a group share the tokens of a batch: each has some, one process after the other.

    Attributes:
        whole: the batch that is shared.
        bounds: cumulative numbers of tokens from 0: process r has ``bounds[r + 1] - bounds[r]`` of them.
        rank: number of this process in the group.
        group: the processes; None: all there are.
        rows: the place in ``whole`` of every process's tokens, int64 [tokens of whole]; None: they stand in its order.
        strand: where ``whole`` is of both strands, and each process has its share of one and then the same tokens of
            the other: the share of the one strand.
    """

    whole: PackedBatch
    bounds: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None
    rows: Int[Tensor, " all_tokens"] | None = None
    strand: SequenceShare | None = None

    def __post_init__(self) -> None:
        edges, tokens = self.bounds, len(self.whole.tokens)
        if len(edges) < 2 or (edges[0], edges[-1]) != (0, tokens) or min(self.counts) < 0:
            raise ConfigError(f"The bounds of the shares of {tokens} tokens are {edges}: no rise from 0 to {tokens}.")
        if not 0 <= self.rank < self.of:
            raise ConfigError(
                f"There are {self.of} shares, numbered from 0: there is none with the number {self.rank}."
            )

    @property
    def of(self) -> int:
        """How many processes share the batch."""
        return len(self.bounds) - 1

    @property
    def counts(self) -> list[int]:
        """How many tokens each process has."""
        return [end - begin for begin, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    def cut(self, values: Shaped[Tensor, "all_tokens ..."]) -> Shaped[Tensor, "tokens ..."]:
        """Return of per-token values of the whole batch those of this process's tokens."""
        begin, end = self.bounds[self.rank : self.rank + 2]
        return values[begin:end] if self.rows is None else values[self.rows[begin:end]]

    def check_heads(self, heads: int) -> None:
        """Raise ``ConfigError`` unless each process can have as many of ``heads`` heads as the others."""
        if heads % self.of:
            raise ConfigError(
                f"{heads} heads cannot be shared by {self.of} processes: where tokens meet, each process has all of "
                f"them and heads / processes of the heads, and {heads} is not divisible by {self.of}."
            )

    def to(self, device: torch.device | str) -> SequenceShare:
        """Return the share with its tensors on ``device``."""
        return replace(
            self,
            whole=self.whole.to(device),
            rows=None if self.rows is None else self.rows.to(device),
            strand=None if self.strand is None else self.strand.to(device),
        )


def share_batch(
    batch: PackedBatch, group: dist.ProcessGroup | None = None, *, bounds: Sequence[int] | None = None
) -> PackedBatch:
    """Return this process's share of a batch that every process of the group has, for sequence parallelism.

    A backbone that is given it exchanges with the other processes what tokens of one sequence need of each other
    (``backbones.sequence_parallel``), so all of them must call it, with the shares of one batch. It returns the hidden
    states of this process's tokens, the same as those of one process that has the whole batch. A single process gets
    the batch itself.

    Args:
        batch: the whole batch, the same in every process.
        group: the processes that share it (``torch.distributed.new_subgroups``); None: all there are.
        bounds: cumulative numbers of tokens from 0, by process; None: equal shares, or nearly. A boundary may lie in
            the middle of a sequence, and a share may be empty.

    Raises:
        ConfigError: the batch is a share already, or ``bounds`` are not those of as many processes as there are.
    """
    if batch.share is not None:
        raise ConfigError("The batch is one process's share already; share_batch takes the whole one.")
    processes, tokens = dist.get_world_size(group), len(batch.tokens)
    edges = [tokens * r // processes for r in range(processes + 1)] if bounds is None else bounds
    if len(edges) != processes + 1:
        raise ConfigError(f"{len(edges)} bounds make {len(edges) - 1} shares; {processes} processes share the batch.")
    share = SequenceShare(batch, tuple(edges), dist.get_rank(group), group)
    if processes == 1:
        return batch
    blocks = batch.block_positions
    return PackedBatch(
        share.cut(batch.tokens),
        batch.cu_seqlens,
        share.cut(batch.positions),
        batch.conditions,
        share,
        None if blocks is None else share.cut(blocks),
    )

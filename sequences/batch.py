"""A batch: sequences laid end to end, never padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class PackedBatch:
    """Sequences packed along one axis.

    Sequence ``s`` is ``tokens[cu_seqlens[s]:cu_seqlens[s + 1]]``; nothing that a kernel does crosses that boundary.

    Attributes:
        tokens: token ids, int64 [tokens].
        cu_seqlens: cumulative lengths from 0, int64 [sequences + 1].
        positions: position of each token in its own sequence, int64 [tokens].
        conditions: per-sequence values by name, each [sequences, ...].
    """

    tokens: Int[Tensor, " tokens"]
    cu_seqlens: Int[Tensor, " boundaries"]
    positions: Int[Tensor, " tokens"]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.positions.shape != self.tokens.shape:
            raise ShapeError("positions", tuple(self.positions.shape), tuple(self.tokens.shape))
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
    def one_each(cls, tokens: Int[Tensor, " sequences"], *, positions: Int[Tensor, " sequences"]) -> PackedBatch:
        """Return one token of each sequence, as in decoding."""
        return cls(tokens, torch.arange(len(tokens) + 1, device=tokens.device), positions)

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int] | NDArray[np.integer] | Tensor], *, device: torch.device | str = "cpu"
    ) -> PackedBatch:
        """Lay token sequences end to end, positions from 0."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        tokens = torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, np.int64))
        lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
        return cls.from_lengths(tokens, lengths).to(device)

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
        return torch.repeat_interleave(torch.arange(len(self), device=self.tokens.device), self.lengths)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on ``device``."""
        return PackedBatch(
            self.tokens.to(device),
            self.cu_seqlens.to(device),
            self.positions.to(device),
            {name: value.to(device) for name, value in self.conditions.items()},
        )

    def split(self, values: Shaped[Tensor, "tokens ..."]) -> list[Tensor]:
        """Cut per-token ``values`` into one tensor per sequence."""
        return list(torch.split(values, self.lengths.tolist()))

"""What a backbone remembers of the tokens it has seen: a value that can be selected, repeated and listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ConvolvedState(NamedTuple):
    """State of a block whose cell stands behind a causal convolution.

    Attributes:
        cell: an ``MLSTMState`` or ``SLSTMState``, each tensor [sequences, heads, ...].
        convolution: the last inputs of the convolution [sequences, taps - 1, channels].
    """

    cell: Any
    convolution: Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens seen, sequences of unequal length end to end.

    Attributes:
        keys: [cached, kv_heads, head_dim], rotated.
        values: [cached, kv_heads, head_dim].
        cu_seqlens: cumulative cached lengths from 0, int64 [sequences + 1].
    """

    keys: Float[Tensor, "cached kv_heads head_dim"]
    values: Float[Tensor, "cached kv_heads head_dim"]
    cu_seqlens: Int[Tensor, " boundaries"]

    def append(
        self,
        keys: Float[Tensor, "tokens kv_heads head_dim"],
        values: Float[Tensor, "tokens kv_heads head_dim"],
        cu_seqlens: Int[Tensor, " boundaries"],
    ) -> KeyValueCache:
        """Return the cache with each sequence's new tokens behind its old ones."""
        old, new = self.cu_seqlens.diff(), cu_seqlens.diff()
        boundaries = cumulative(old + new)
        old_at = _shifted(self.cu_seqlens, boundaries[:-1])
        new_at = _shifted(cu_seqlens, boundaries[:-1] + old)

        def joined(before: Tensor, after: Tensor) -> Tensor:
            out = after.new_empty(len(before) + len(after), *after.shape[1:])
            return out.index_copy(0, old_at, before.to(after.dtype)).index_copy(0, new_at, after)

        return KeyValueCache(joined(self.keys, keys), joined(self.values, values), boundaries)

    def last(self, tokens: int) -> KeyValueCache:
        """Return the cache with at most the last ``tokens`` of each sequence."""
        lengths = self.cu_seqlens.diff()
        return self._ranges(self.cu_seqlens[1:] - lengths.clamp(max=tokens), lengths.clamp(max=tokens))

    def select(self, indices: Int[Tensor, " selected"]) -> KeyValueCache:
        """Return the cache of the sequences ``indices``, in that order, repeats allowed."""
        return self._ranges(self.cu_seqlens[:-1][indices], self.cu_seqlens.diff()[indices])

    def _ranges(self, starts: Tensor, lengths: Tensor) -> KeyValueCache:
        boundaries = cumulative(lengths)
        at = _shifted(boundaries, starts)
        return KeyValueCache(self.keys[at], self.values[at], boundaries)


def cumulative(lengths: Int[Tensor, " sequences"]) -> Int[Tensor, " boundaries"]:
    """Return cumulative lengths from 0, one more than there are lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _shifted(cu_seqlens: Tensor, starts: Tensor) -> Tensor:
    """Row of each packed token when sequence ``s`` begins at ``starts[s]`` instead of ``cu_seqlens[s]``."""
    lengths = cu_seqlens.diff()
    return torch.arange(int(cu_seqlens[-1]), device=starts.device) + torch.repeat_interleave(
        starts - cu_seqlens[:-1], lengths
    )


@dataclass(frozen=True)
class BackboneState:
    """State of every block after ``lengths`` tokens of each sequence.

    Attributes:
        lengths: tokens seen so far, int64 [sequences].
        blocks: one state per block; its tensors have one row per sequence, a ``KeyValueCache`` is ragged.
    """

    lengths: Int[Tensor, " sequences"]
    blocks: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Int[Tensor, " selected"]) -> BackboneState:
        """Return the state of the sequences ``indices``, in that order, repeats allowed."""
        rows = indices.to(self.lengths.device)
        return BackboneState(self.lengths[rows], tuple(_select(block, rows) for block in self.blocks))

    def repeat(self, n: int) -> BackboneState:
        """Return the state with each sequence ``n`` times in a row."""
        return self.select(torch.arange(len(self)).repeat_interleave(n))

    def map(self, function: Callable[[Tensor], Tensor]) -> BackboneState:
        """Return the state with ``function`` applied to every tensor, lengths included."""
        return BackboneState(function(self.lengths), tuple(_map(block, function) for block in self.blocks))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, ``lengths`` and ``blocks.<i>.<part>``."""
        named = {"lengths": self.lengths}
        for i, block in enumerate(self.blocks):
            named.update(_named(f"blocks.{i}", block))
        return named


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, KeyValueCache):
        return value.select(rows)
    return type(value)(*(_select(part, rows) for part in value))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, KeyValueCache):
        return KeyValueCache(function(value.keys), function(value.values), function(value.cu_seqlens))
    return type(value)(*(_map(part, function) for part in value))


def _named(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, KeyValueCache):
        yield from ((f"{prefix}.{name}", getattr(value, name)) for name in ("keys", "values", "cu_seqlens"))
    else:
        for name in value._fields:
            yield from _named(f"{prefix}.{name}", getattr(value, name))

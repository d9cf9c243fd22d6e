"""What a backbone remembers of the tokens it has seen: a value that can be selected, repeated and listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROOM = 32  # rows of room, at least, that a sequence gets in a cache


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
    """Keys and values of the tokens seen, sequences of unequal length end to end, each perhaps with room behind it.

    Attributes:
        keys: [rows, kv_heads, head_dim], rotated.
        values: [rows, kv_heads, head_dim].
        cu_seqlens: boundaries of the rows of each sequence from 0, int64 [sequences + 1].
        lengths: how many of its rows hold a token, the first ones, int64 [sequences]; None: all.
    """

    keys: Float[Tensor, "rows kv_heads head_dim"]
    values: Float[Tensor, "rows kv_heads head_dim"]
    cu_seqlens: Int[Tensor, " boundaries"]
    lengths: Int[Tensor, " sequences"] | None = None

    @property
    def filled(self) -> Int[Tensor, " sequences"]:
        """Tokens of each sequence."""
        return self.cu_seqlens.diff() if self.lengths is None else self.lengths

    def append(
        self,
        keys: Float[Tensor, "tokens kv_heads head_dim"],
        values: Float[Tensor, "tokens kv_heads head_dim"],
        layout: Layout,
    ) -> KeyValueCache:
        """Return the cache with new tokens behind the old ones, as ``Layout`` has planned for caches like this one."""

        def joined(before: Tensor, after: Tensor) -> Tensor:
            out = before = before.to(after.dtype)
            if layout.kept is not None:
                out = after.new_empty(layout.rows, *after.shape[1:])
                out.index_copy_(0, layout.kept.to, before[layout.kept.rows])
            return out.index_copy_(0, layout.new, after)

        return KeyValueCache(joined(self.keys, keys), joined(self.values, values), layout.cu_seqlens, layout.lengths)

    def last(self, tokens: int) -> KeyValueCache:
        """Return the cache with at most the last ``tokens`` of each sequence."""
        kept = self.filled.clamp(max=tokens)
        return self._ranges(self.cu_seqlens[:-1] + self.filled - kept, kept)

    def select(self, indices: Int[Tensor, " selected"]) -> KeyValueCache:
        """Return the cache of the sequences ``indices``, in that order, repeats allowed."""
        return self._ranges(self.cu_seqlens[:-1][indices], self.filled[indices])

    def without_room(self) -> KeyValueCache:
        """Return the cache with no row that holds no token."""
        return self if self.lengths is None else self._ranges(self.cu_seqlens[:-1], self.lengths)

    def _ranges(self, starts: Tensor, lengths: Tensor) -> KeyValueCache:
        at = ranges(starts, lengths)
        return KeyValueCache(self.keys[at], self.values[at], cumulative(lengths))


def cumulative(lengths: Int[Tensor, " sequences"]) -> Int[Tensor, " boundaries"]:
    """Return cumulative lengths from 0, one more than there are lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def ranges(starts: Int[Tensor, " sequences"], lengths: Int[Tensor, " sequences"]) -> Int[Tensor, " rows"]:
    """Return the rows ``starts[s]``, ``starts[s] + 1``, ... of each sequence, ``lengths[s]`` of them, end to end."""
    ends = lengths.cumsum(0)
    rows = torch.arange(int(ends[-1]) if len(ends) else 0, device=starts.device)
    return rows + torch.repeat_interleave(starts - ends + lengths, lengths)


class Kept(NamedTuple):
    """Rows that move when a cache is laid out anew: where they stand and where they go."""

    rows: Int[Tensor, " kept"]
    to: Int[Tensor, " kept"]


class Layout(NamedTuple):
    """Where the tokens of a batch go in a cache: planned once for all blocks, whose caches are laid out alike.

    Attributes:
        cu_seqlens: boundaries of the rows of each sequence, afterwards.
        lengths: tokens of each sequence afterwards; None where they fill the rows.
        new: the row of each new token.
        kept: the old tokens that move to new memory; None: they stay, and new ones are written into the room.
        rows: how many rows there are.
    """

    cu_seqlens: Int[Tensor, " boundaries"]
    lengths: Int[Tensor, " sequences"] | None
    new: Int[Tensor, " tokens"]
    kept: Kept | None
    rows: int

    @property
    def room(self) -> bool:
        """Whether the cache afterwards is one that may be written to."""
        return self.lengths is not None

    @classmethod
    def behind(
        cls, cache: KeyValueCache, cu_seqlens: Int[Tensor, " boundaries"], *, reuse: bool, window: int | None
    ) -> Layout:
        """Plan for the tokens of a batch that goes on from ``cache``.

        With ``reuse`` the memory of the cache is given away. While its room lasts, new tokens are written there; then
        all that later tokens see (those of the ``window``) moves to memory with a quarter of itself as room, so that
        each token moves a few times in all. Without, the cache stays as it is and the new one has no room.
        """
        old, new, starts = cache.filled, cu_seqlens.diff(), cache.cu_seqlens[:-1]
        if not reuse:
            after = cumulative(old + new)
            kept = Kept(ranges(starts, old), ranges(after[:-1], old))
            return cls(after, None, ranges(after[:-1] + old, new), kept, int(after[-1]))
        lengths = old + new
        frozen = cache.keys.is_inference() and not torch.is_inference_mode_enabled()
        if not frozen and bool((lengths <= cache.cu_seqlens.diff()).all()):
            return cls(cache.cu_seqlens, lengths, ranges(starts + old, new), None, len(cache.keys))
        seen = old if window is None else old.clamp(max=window - 1)
        lengths = seen + new
        after = cumulative(lengths + lengths // 4 + ROOM)
        kept = Kept(ranges(starts + old - seen, seen), ranges(after[:-1], seen))
        return cls(after, lengths, ranges(after[:-1] + seen, new), kept, int(after[-1]))


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

    @property
    def grows(self) -> bool:
        """Whether it holds something of every token, as key-value caches do."""
        return any(isinstance(block, KeyValueCache) for block in self.blocks)

    def detach(self) -> BackboneState:
        """Return the state without what led to it: no gradient goes further back."""
        return self.map(torch.Tensor.detach)

    def spread(self, at: Int[Tensor, " rows"], sequences: int) -> BackboneState:
        """Return the state of so many ``sequences``: those numbered ``at``, in rising order, have the rows of this one.

        The others have seen nothing. Gradients go back to this state.
        """
        rows = at.to(self.lengths.device)
        blocks = tuple(_spread(block, rows, sequences) for block in self.blocks)
        return BackboneState(_spread(self.lengths, rows, sequences), blocks)

    @classmethod
    def concatenate(cls, states: Sequence[BackboneState]) -> BackboneState:
        """Return the state of the sequences of one, then of the next, and so on; at least one state is given."""
        blocks = zip(*(state.blocks for state in states), strict=True)
        return cls(torch.cat([state.lengths for state in states]), tuple(_concatenate(list(parts)) for parts in blocks))

    def within(self, longer: BackboneState) -> BackboneState:
        """Return the state of one sequence in the memory of ``longer``, its state some tokens later.

        Only caches share memory, and only those from which nothing was dropped (``window``).
        """
        seen = int(longer.lengths[0])
        blocks = tuple(_within(one, other, seen) for one, other in zip(self.blocks, longer.blocks, strict=True))
        return BackboneState(self.lengths, blocks)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> BackboneState:
        """Return a state made like this one of what ``tensors`` gave.

        Raises:
            KeyError: one is missing.
        """
        blocks = tuple(_with(f"blocks.{i}", block, tensors) for i, block in enumerate(self.blocks))
        return BackboneState(tensors["lengths"], blocks)

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
        value = value.without_room()
        return KeyValueCache(function(value.keys), function(value.values), function(value.cu_seqlens))
    return type(value)(*(_map(part, function) for part in value))


def _spread(value: Any, at: Tensor, sequences: int) -> Any:
    if isinstance(value, Tensor):
        return value.new_zeros(sequences, *value.shape[1:]).index_copy(0, at, value)
    if isinstance(value, KeyValueCache):
        value = value.without_room()
        return KeyValueCache(value.keys, value.values, cumulative(_spread(value.cu_seqlens.diff(), at, sequences)))
    return type(value)(*(_spread(part, at, sequences) for part in value))


def _concatenate(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], KeyValueCache):
        caches = [value.without_room() for value in values]
        lengths = torch.cat([cache.cu_seqlens.diff() for cache in caches])
        keys, values_ = (torch.cat([getattr(cache, name) for cache in caches]) for name in ("keys", "values"))
        return KeyValueCache(keys, values_, cumulative(lengths))
    return type(values[0])(*(_concatenate(list(parts)) for parts in zip(*values, strict=True)))


def _within(value: Any, longer: Any, seen: int) -> Any:
    if isinstance(value, KeyValueCache) and len(longer.keys) == seen:
        rows = len(value.keys)
        return KeyValueCache(longer.keys[:rows], longer.values[:rows], value.cu_seqlens)
    return value


def _with(prefix: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors[prefix]
    if isinstance(value, KeyValueCache):
        return KeyValueCache(*(tensors[f"{prefix}.{name}"] for name in ("keys", "values", "cu_seqlens")))
    return type(value)(*(_with(f"{prefix}.{name}", getattr(value, name), tensors) for name in value._fields))


def _named(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, KeyValueCache):
        value = value.without_room()
        yield from ((f"{prefix}.{name}", getattr(value, name)) for name in ("keys", "values", "cu_seqlens"))
    else:
        for name in value._fields:
            yield from _named(f"{prefix}.{name}", getattr(value, name))

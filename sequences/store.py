"""A token store on disk: memory-mapped, so a corpus larger than memory is fine.

A folder of three files: ``tokens.bin`` (all ids, end to end), ``offsets.bin`` (int64, sequences + 1) and
``store.json`` (dtype, counts, tokenizer); where sequences have spans also ``spans.bin`` (int32, spans x 2) and
``span_offsets.bin`` (int64, sequences + 1). It is written whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from .files import replacing

FORMAT = 1
NAME = "store.json"
BLOCK = 2**20  # offsets read at one time


class TokenStore(Sequence[NDArray[np.integer]]):
    """Token sequences read from a folder that ``TokenStore.write`` or ``processive tokenize`` made.

    Sequences are read from the files and not through the mapping, whose pages would stay in this process' memory: the
    kernel maps up to 2 MB around each place that is touched, and shuffled reading would soon hold the whole store.

    Attributes:
        path: the folder.
        meta: what ``store.json`` says.
        offsets: where each sequence begins in ``tokens``, and the end of the last, int64 [sequences + 1].
        tokens: all ids, end to end.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            InputError: the folder is not a token store, or its files do not fit together.
        """
        self.path = Path(path)
        try:
            meta = json.loads((self.path / NAME).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise InputError(f"Token store of format {meta['format']}; this version reads {FORMAT}.", path=path)
            self.meta: dict[str, Any] = meta
            self.offsets = np.memmap(self.path / "offsets.bin", np.int64, "r", shape=(meta["sequences"] + 1,))
            self.tokens: NDArray[np.integer] = (
                np.memmap(self.path / "tokens.bin", np.dtype(meta["dtype"]), "r", shape=(meta["tokens"],))
                if meta["tokens"]
                else np.zeros(0, np.dtype(meta["dtype"]))
            )
            self._arrays: list[NDArray[np.integer]] = [self.offsets, self.tokens]
            names = ["offsets.bin", "tokens.bin"]
            if meta.get("spans"):
                self._arrays.append(np.memmap(self.path / "span_offsets.bin", np.int64, "r", shape=self.offsets.shape))
                self._arrays.append(np.memmap(self.path / "spans.bin", np.int32, "r", shape=(2 * meta["spans"],)))
                names += ["span_offsets.bin", "spans.bin"]
            if int(self.offsets[-1]) != meta["tokens"]:
                raise ValueError(f"offsets end at {int(self.offsets[-1])} of {meta['tokens']} tokens")
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"This is not a whole token store ({error}).", path=path, hint="Tokenize the input again."
            ) from None
        self._files = [os.open(self.path / name, os.O_RDONLY) for name in names]
        for file in self._files:
            weakref.finalize(self, os.close, file)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return type(self), (self.path,)

    @classmethod
    def write(
        cls,
        path: str | Path,
        sequences: Iterable[Sequence[int] | NDArray[np.integer]],
        *,
        vocabulary_size: int,
        meta: Mapping[str, Any] | None = None,
        spans: Iterable[Sequence[tuple[int, int]]] | None = None,
    ) -> TokenStore:
        """Stream ``sequences`` to ``path``, one at a time, in the smallest integer type that holds the vocabulary.

        ``spans`` are those of each sequence, its first token and the one past its last.

        Raises:
            ConfigError: a token id lies outside the vocabulary.
            OutputError: the disk is full or the folder cannot be written.
        """
        with replacing(path) as new:
            new.mkdir()
            with StoreWriter(new, vocabulary_size) as writer:
                of_each = itertools.repeat([]) if spans is None else spans
                for sequence, own in zip(sequences, of_each, strict=spans is not None):
                    ids = np.asarray(sequence)
                    writer.append(ids, [len(ids)], None if spans is None else [own])
                writer.finish(meta or {})
        return cls(path)

    @property
    def spanned(self) -> bool:
        """Whether the sequences know their spans."""
        return "spans" in self.meta

    def spans_of(self, index: int) -> list[tuple[int, int]]:
        """Return the spans of one sequence.

        Raises:
            ConfigError: the store has no spans.
        """
        if not self.spanned:
            raise ConfigError(f"{self.path} holds no spans. Tokenize the input again, with spans.")
        index = range(len(self))[index]
        if not self.meta["spans"]:
            return []
        start, end = self._read(2, index, index + 2).tolist()
        pairs = self._read(3, 2 * start, 2 * end).reshape(-1, 2).tolist()
        return [(first, last) for first, last in pairs]

    @property
    def lengths(self) -> NDArray[np.integer]:
        """Length of every sequence, in int32 where that is enough."""
        longest, count = 0, len(self)
        lengths: NDArray[np.integer] = np.empty(count, np.int32)
        for start in range(0, count, BLOCK):
            block = np.diff(self._read(0, start, min(start + BLOCK, count) + 1))
            longest = max(longest, int(block.max()))
            if longest > np.iinfo(lengths.dtype).max:
                lengths = lengths.astype(np.int64)
            lengths[start : start + len(block)] = block
        return lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> NDArray[np.integer]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.integer]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.integer] | list[NDArray[np.integer]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = self._read(0, index, index + 2).tolist()
        return self._read(1, start, end)

    def part(self, index: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens ``start:stop`` of a sequence, as a slice of it; the others are not read.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, end = self._read(0, index, index + 2).tolist()
        start, stop, _ = slice(start, stop).indices(end - first)
        return self._read(1, first + start, first + max(start, stop))

    def _read(self, which: int, start: int, end: int) -> NDArray[np.integer]:
        """Items ``start:end`` of the offsets (0), the tokens (1), the offsets of the spans (2) or the spans (3)."""
        mapped = self._arrays[which]
        size = mapped.dtype.itemsize
        if hasattr(os, "pread"):  # not on Windows
            read = os.pread(self._files[which], (end - start) * size, start * size)
            if len(read) == (end - start) * size:  # more than 2 GB are not read at once
                return np.frombuffer(read, mapped.dtype)
        return mapped[start:end]


class StoreWriter:
    """Writes the files of a store into a folder, and can go on where another one was ended.

    Attributes:
        sequences: written so far.
        tokens: written so far.
        spans: written so far; None until sequences come with spans.
    """

    def __init__(
        self, folder: Path, vocabulary_size: int, *, sequences: int = 0, tokens: int = 0, spans: int | None = None
    ) -> None:
        """Begin in an empty folder, or go on behind so many sequences and tokens; what stands after them is dropped."""
        self._folder, self._size = folder, vocabulary_size
        self.spans = spans
        self._dtype = np.dtype(
            np.uint8 if vocabulary_size <= 2**8 else np.uint16 if vocabulary_size <= 2**16 else np.uint32
        )
        self.sequences, self.tokens = sequences, tokens
        ends = {"tokens.bin": tokens * self._dtype.itemsize, "offsets.bin": 8 * (sequences + 1)}
        if spans is not None:
            ends |= {"spans.bin": 8 * spans, "span_offsets.bin": 8 * (sequences + 1)}
        self._files = {name: (folder / name).open("r+b" if sequences else "wb") for name in ends}
        if sequences:
            for name, end in ends.items():
                self._files[name].truncate(end)
                self._files[name].seek(end)
        else:
            for name in ends.keys() & {"offsets.bin", "span_offsets.bin"}:
                self._files[name].write(np.int64(0).tobytes())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(
        self,
        tokens: NDArray[np.integer],
        lengths: Sequence[int] | NDArray[np.integer],
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Add sequences of ``lengths``, laid end to end in ``tokens``, and the spans of each.

        Raises:
            ConfigError: a token id lies outside the vocabulary; or some sequences come with spans and some without.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self._size))[0])
            number = self.sequences + int(np.searchsorted(ends, wrong, side="right")) + 1
            raise ConfigError(f"Sequence {number} holds a token id outside 0..{self._size - 1}.")
        if len(ends):
            self._append_spans(spans)
        self._files["tokens.bin"].write(tokens.astype(self._dtype, copy=False).tobytes())
        self._files["offsets.bin"].write((self.tokens + ends).tobytes())
        self.sequences += len(ends)
        self.tokens += len(tokens)

    def _append_spans(self, spans: Sequence[Sequence[tuple[int, int]]] | None) -> None:
        """Write the spans of the next sequences, or see that there are none of any."""
        if not self.sequences and spans is not None and self.spans is None:
            self.spans = 0
            self._files |= {name: (self._folder / name).open("wb") for name in ("spans.bin", "span_offsets.bin")}
            self._files["span_offsets.bin"].write(np.int64(0).tobytes())
        if (self.spans is None) != (spans is None):
            raise ConfigError("Some sequences come with spans and some without; give these an empty list.")
        if spans is None or self.spans is None:
            return
        flat = np.array([span for own in spans for span in own], np.int32).reshape(-1, 2)
        self._files["spans.bin"].write(flat.tobytes())
        ends = self.spans + np.cumsum([len(own) for own in spans], dtype=np.int64)
        self._files["span_offsets.bin"].write(ends.tobytes())
        self.spans += len(flat)

    def sync(self) -> None:
        """Bring all that was appended to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write ``store.json``, which makes the folder a store."""
        self.sync()
        counts = {"dtype": self._dtype.name, "tokens": self.tokens, "sequences": self.sequences}
        spans = {} if self.spans is None else {"spans": self.spans}
        description = {"format": FORMAT, **counts, **spans, **meta}
        (self._folder / NAME).write_text(json.dumps(description, indent=2), encoding="utf-8")

"""A token store on disk: memory-mapped, so a corpus larger than memory is fine.

A folder of three files: ``tokens.bin`` (all ids, end to end), ``offsets.bin`` (int64, sequences + 1) and
``store.json`` (dtype, counts, tokenizer). It is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from .files import replacing

FORMAT = 1


class TokenStore(Sequence[NDArray[np.integer]]):
    """Token sequences read from a folder that ``TokenStore.write`` made; only the pages touched are in memory."""

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            InputError: the folder is not a token store, or its files do not fit together.
        """
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "store.json").read_text())
            if meta["format"] != FORMAT:
                raise InputError(f"Token store of format {meta['format']}; this version reads {FORMAT}.", path=path)
            self.meta: dict[str, Any] = meta
            self.offsets = np.memmap(self.path / "offsets.bin", np.int64, "r", shape=(meta["sequences"] + 1,))
            self.tokens: NDArray[np.integer] = (
                np.memmap(self.path / "tokens.bin", np.dtype(meta["dtype"]), "r", shape=(meta["tokens"],))
                if meta["tokens"]
                else np.zeros(0, np.dtype(meta["dtype"]))
            )
        except (FileNotFoundError, KeyError, ValueError, json.JSONDecodeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"This is not a whole token store ({error}).", path=path, hint="Tokenize the input again."
            ) from None

    @classmethod
    def write(
        cls,
        path: str | Path,
        sequences: Iterable[Sequence[int] | NDArray[np.integer]],
        *,
        vocabulary_size: int,
        meta: Mapping[str, Any] | None = None,
    ) -> TokenStore:
        """Stream ``sequences`` to ``path``, one at a time, in the smallest integer type that holds the vocabulary.

        Raises:
            ConfigError: a token id lies outside the vocabulary.
            OutputError: the disk is full or the folder cannot be written.
        """
        dtype = np.dtype(np.uint8 if vocabulary_size <= 2**8 else np.uint16 if vocabulary_size <= 2**16 else np.uint32)
        total = count = 0
        with replacing(path) as new:
            new.mkdir()
            with (new / "tokens.bin").open("wb") as tokens, (new / "offsets.bin").open("wb") as offsets:
                offsets.write(np.int64(0).tobytes())
                for sequence in sequences:
                    ids = np.asarray(sequence)
                    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size:
                        raise ConfigError(f"Sequence {count + 1} holds a token id outside 0..{vocabulary_size - 1}.")
                    tokens.write(ids.astype(dtype).tobytes())
                    total += len(ids)
                    count += 1
                    offsets.write(np.int64(total).tobytes())
            description = {"format": FORMAT, "dtype": dtype.name, "tokens": total, "sequences": count, **(meta or {})}
            (new / "store.json").write_text(json.dumps(description, indent=2))
        return cls(path)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of every sequence."""
        return np.diff(self.offsets)

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
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

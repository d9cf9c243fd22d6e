"""Parts of a file that are tokenized one by one, by any process, and what comes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .records import Record
from .tokenizer import ManyTokenizer, Tokenizer


class Unusable(NamedTuple):
    """A record that gave no tokens: its number (from 1), its name, and why."""

    number: int
    name: str
    reason: str


class Encoded(NamedTuple):
    """What a chunk gave.

    Attributes:
        tokens: ids of its sequences, end to end.
        lengths: of each sequence.
        records: how many records the chunk holds.
        numbers: how many numbers they took: the next chunk's records count on from there.
        unusable: those that gave no sequence, numbered within the chunk.
        spans: of each sequence, see ``sequences.spans``; None: sequences have none.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]
    records: int
    numbers: int
    unusable: tuple[Unusable, ...]
    spans: list[list[tuple[int, int]]] | None = None


Sequenced: TypeAlias = tuple[NDArray[np.integer], list[tuple[int, int]] | None]  # one sequence and its spans


@runtime_checkable
class Chunk(Protocol):
    """A part of a file that can be sent to another process."""

    def encode(self, tokenizer: Any) -> Encoded:
        """Token ids of its records."""
        ...


@dataclass(frozen=True)
class RecordChunk:
    """Records that were read already; their numbers count from the beginning of the file."""

    records: tuple[Record, ...]
    check: Callable[[str], object] | None = None

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Token ids of the records; ``check`` raises InputError for a text that shall not be used."""
        return encode_records(self.records, tokenizer, check=self.check, numbers=0)


def encode_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    check: Callable[[str], object] | None = None,
    numbers: int | None = None,
    encode: Callable[[Record], Iterable[Sequenced]] | None = None,
) -> Encoded:
    """Tokenize records; one that the tokenizer or ``check`` refuses is unusable.

    ``numbers`` is that of ``Encoded``, by default one number for each record. ``encode``, in place of the tokenizer's,
    gives one or more sequences of a record, all of them with their spans or all without.
    """
    if isinstance(tokenizer, ManyTokenizer) and encode is None and check is None:
        records = list(records)
        usable = all(record.problem is None for record in records)
        found = tokenizer.encode_many([record.text for record in records]) if usable else None
        if found is not None:  # else one by one, which tells what is wrong with which
            return Encoded(*found, len(records), len(records) if numbers is None else numbers, ())
    sequences: list[NDArray[np.integer]] = []
    spans: list[list[tuple[int, int]] | None] = []
    unusable: list[Unusable] = []
    count = 0
    for record in records:
        count += 1
        try:
            if record.problem is not None:
                raise record.problem
            own_sequences = [(tokenizer.encode(record.text), None)] if encode is None else list(encode(record))
            if check is not None:
                check(record.text)
            for ids, own in own_sequences:
                sequences.append(ids)
                spans.append(own)
        except InputError as error:
            unusable.append(Unusable(record.number, record.name, str(_without_place(error))))
    tokens = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    known = [own for own in spans if own is not None]
    used = count if numbers is None else numbers
    return Encoded(tokens, lengths, count, used, tuple(unusable), known if known and len(known) == len(spans) else None)


def _without_place(error: InputError) -> InputError:
    """The same error without file, record and name, which are told beside it."""
    return InputError(error.reason, position=error.position, hint=error.hint)


def in_chunks(
    records: Iterable[Record], *, check: Callable[[str], object] | None = None, size: int = 4096
) -> Iterator[RecordChunk]:
    """Lay records that only one process can read into chunks."""
    held: list[Record] = []
    for record in records:
        held.append(record)
        if len(held) == size:
            yield RecordChunk(tuple(held), check)
            held = []
    if held:
        yield RecordChunk(tuple(held), check)

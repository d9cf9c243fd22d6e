"""FASTA in and out, with the number, name and position of what cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import get_args

from ..errors import ConfigError, InputError, ShapeError
from ..sequences import (
    Encoded,
    Record,
    Records,
    Sequenced,
    Tokenizer,
    encode_records,
    read_blocks,
    read_lines,
    replacing,
    token_lengths,
    token_spans,
)
from .frames import check_frames_alone, encode_frames
from .sequence import Alphabet, find_problem, guess_alphabet
from .spans import SpanTable

ONE_PER_LINE = (".txt", ".seq")
RARE_WHITE = "\t\r\v\f\x1c\x1d\x1e\x1f"  # of ASCII's, but for space and line feed
COMMENT = ";"  # of the first FASTA programs, before a record or within one


def read(path: str | Path, alphabet: Alphabet | Tokenizer | None = None) -> Records:
    """Read the sequences of a FASTA file; what cannot be used stays in its place with ``problem`` set.

    Plain, gzip and zstandard files are told by content. A ``.txt`` or ``.seq`` file that does not begin with ``>``
    holds one sequence per line. White space inside a sequence is left out; lower case stays; one ``*`` at the end of a
    protein (its stop) is dropped. A record's number counts from 1 in the file, its name is the first word after ``>``,
    and names may repeat. The gaps ``-`` and ``.`` are part of a protein's alphabet and no part of DNA's.

    Args:
        path: the file.
        alphabet: "dna", "protein", or the tokenizer that will take the sequences, whose own policies then decide.
            None: as ``guess_alphabet`` says of the whole file; each problem names the alphabet it was held against.

    Raises:
        InputError: the file cannot be read, holds no record, or has text before its first record.
    """
    if isinstance(alphabet, str) and alphabet not in get_args(Alphabet):
        raise ConfigError(f"An alphabet is one of {', '.join(get_args(Alphabet))}, not {alphabet!r}.")
    path = Path(path)
    found = list(_parse(path))
    if not found:
        raise InputError("The file holds no sequence.", path=path)
    known = guess_alphabet(text for _, text in found) if alphabet is None else alphabet
    is_protein = known == "protein" or getattr(known, "alphabet", None) == "protein"
    records = []
    for number, (name, text) in enumerate(found, 1):
        sequence = text.removesuffix("*") if is_protein else text
        problem = _problem(sequence, known)
        if problem is not None:
            problem = problem.at(path=path, record=number, name=name or None)
        records.append(Record(sequence, name, number, problem))
    return Records(tuple(records), path)


@dataclass(frozen=True)
class SequenceChunk:
    """Whole records of a FASTA file, or lines of one that has a sequence in each."""

    text: str
    fasta: bool = True
    spans: SpanTable | None = None
    frames: int | None = None

    def records(self, tokenizer: Tokenizer) -> Iterator[Record]:
        """The records, numbered from 1, as ``read`` gives them."""
        text = self.text
        if COMMENT in text and (text.startswith(COMMENT) or f"\n{COMMENT}" in text):
            text = "\n".join(line for line in text.split("\n") if not line.startswith(COMMENT))
        is_protein = getattr(tokenizer, "alphabet", None) == "protein"
        plain = text.isascii() and not any(white in text for white in RARE_WHITE)  # then lines are joined in one go
        number = 0
        for part in _parts(text) if self.fasta else text.split("\n"):
            header, _, body = part.partition("\n") if self.fasta else ("", "", part)
            sequence = body.replace("\n", "") if plain and " " not in body else "".join(body.split())
            if not self.fasta and not sequence:
                continue
            number += 1
            sequence = sequence.removesuffix("*") if is_protein else sequence
            problem = None if sequence else find_problem(sequence, "dna")
            yield Record(sequence, _name(f">{header}"), number, problem)

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Token ids of the records, in frames or with their spans if that was asked for."""
        spans, frames = self.spans, self.frames
        lengths = token_lengths(tokenizer.vocabulary)

        def with_spans(record: Record) -> Iterator[Sequenced]:
            ids = tokenizer.encode(record.text)
            yield ids, token_spans([] if spans is None else spans.get(record.name, []), ids, lengths)

        def in_frames(record: Record) -> Iterator[Sequenced]:
            assert frames is not None
            return ((ids, None) for ids in encode_frames(record, tokenizer, frames))

        encode = in_frames if frames is not None else with_spans if spans is not None else None
        return encode_records(self.records(tokenizer), tokenizer, encode=encode)


def chunks(
    path: str | Path, tokenizer: Tokenizer, *, spans: SpanTable | None = None, frames: int | None = None
) -> Iterator[SequenceChunk]:
    """Yield a file that ``read`` reads in parts of some million letters, or of one record where that is longer.

    ``spans`` and ``frames`` are those of ``tokenize``.

    Raises:
        InputError: as ``read``.
        ConfigError: spans and frames are both given.
    """
    if frames is not None:
        check_frames_alone(spans)
    path = Path(path)
    first = next(_lines(path), None)
    if first is None:
        raise InputError("The file holds no sequence.", path=path)
    with_headers = _has_headers(path, *first)
    for number, text in enumerate(read_blocks(path, before=">" if with_headers else "")):
        within = None if spans is None else {name: spans[name] for name in _names(text) if name in spans}
        chunk = SequenceChunk(text, with_headers, within, frames)
        if number == 0 and getattr(tokenizer, "alphabet", None) == "protein":
            texts = [record.text for record in chunk.records(tokenizer) if record.problem is None]
            if texts and guess_alphabet(texts) == "dna":
                warnings.warn(f"{path} looks like DNA, and the tokenizer reads proteins: translate it?", stacklevel=2)
        yield chunk


def write_fasta(path: str | Path, names: Sequence[str], sequences: Sequence[str], *, width: int = 60) -> None:
    """Write a FASTA file, whole or not at all, ``width`` letters to a line.

    Raises:
        ShapeError: there are not as many names as sequences.
        ConfigError: a name or a sequence holds a line break, or a sequence a ``>``.
        OutputError: the folder cannot be written, or the disk is full.
    """
    if len(names) != len(sequences):
        raise ShapeError("names", [len(names)], [len(sequences)])
    for name, sequence in zip(names, sequences, strict=True):
        if any(mark in name + sequence for mark in "\r\n") or ">" in sequence:
            raise ConfigError(f"The record {name!r} holds a line break or '>', which FASTA cannot.")
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        for name, sequence in zip(names, sequences, strict=True):
            file.write(f">{name}\n")
            file.writelines(f"{sequence[start : start + width]}\n" for start in range(0, len(sequence), width))


def _problem(sequence: str, known: Alphabet | Tokenizer) -> InputError | None:
    if isinstance(known, str):
        return find_problem(sequence, known)
    if not sequence:
        return find_problem(sequence, "dna")  # an empty one is the same in every alphabet
    try:
        known.encode(sequence)
    except InputError as problem:
        return problem
    return None


def _parse(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(name, sequence)`` of every record of the file."""
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    if _has_headers(path, number, line):
        yield from _records(line, lines)
    else:
        yield "", _joined([line])
        yield from (("", _joined([line])) for _, line in lines)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines that are neither blank nor a comment."""
    return ((number, line) for number, line in read_lines(path) if line.strip() and not line.startswith(COMMENT))


def _has_headers(path: Path, number: int, line: str) -> bool:
    """Tell FASTA from one sequence per line by the first line.

    Raises:
        InputError: it is neither.
    """
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes if suffix.lower() not in (".gz", ".zst")]
    if line.startswith(">"):
        return True
    if suffixes and suffixes[-1] in ONE_PER_LINE:
        return False
    raise InputError(
        f"Line {number} does not begin with '>', so this is not FASTA.",
        path=path,
        hint=f"One sequence per line is read from {' and '.join(ONE_PER_LINE)} files.",
    )


def _records(header: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    pieces: list[str] = []
    for _, line in lines:
        if line.startswith(">"):
            yield _name(header), _joined(pieces)
            header, pieces = line, []
        else:
            pieces.append(line)
    yield _name(header), _joined(pieces)


def _parts(text: str) -> list[str]:
    """The records of FASTA without their ``>``; looking for one letter is much quicker than for two."""
    pieces = f"\n{text}".split(">")
    if all(piece.endswith("\n") for piece in pieces[:-1]):
        return pieces[1:]
    return f"\n{text}".split("\n>")[1:]  # some header has another


def _name(header: str) -> str:
    return (header[1:].split(maxsplit=1) or [""])[0]


def _names(text: str) -> list[str]:
    """Names of the records of a part of a FASTA file."""
    return [_name(line) for line in text.split("\n") if line.startswith(">")]


def _joined(pieces: list[str]) -> str:
    return "".join("".join(pieces).split())

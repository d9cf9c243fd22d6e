"""Files of texts and of instructions to records, one a line or in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..sequences import (
    Encoded,
    Record,
    Records,
    Sequenced,
    Span,
    TextTokenizer,
    check_file,
    encode_records,
    open_text,
    read_lines,
)

CHUNK = 4096  # records that one process tokenizes at a time
KEYS = 'a "text", or an "instruction" and an "output" (and an "input" between them, which may be empty)'


@dataclass(frozen=True)
class TextRecord(Record):
    """A text, perhaps an instruction with its answer.

    Attributes:
        text: all of it: the prompt, a blank and the answer.
        prompt: how the text begins and what is not learned; "" where all of it is.
    """

    prompt: str = ""


def read(path: str | Path) -> Records:
    """Read the texts of a file; what cannot be used stays in its place with ``problem`` set.

    - ``.jsonl``: a JSON object per line, ``.json``: a list of them, each with a ``"text"``, or as Alpaca has them with
      ``"instruction"``, ``"input"`` and ``"output"``: a prompt of the first two with a blank between, and its answer.
    - anything else: a text per line.

    Blank lines are passed over; gzip and zstandard are told by content. A record's number is that of its line or, in a
    list, its own, from 1.

    Raises:
        InputError: the file cannot be read or holds no text.
    """
    path = Path(path)
    records = tuple(_records(path))
    if not records:
        raise InputError("The file holds no text.", path=path)
    return Records(records, path)


@dataclass(frozen=True)
class TextChunk:
    """Some of the records of a file."""

    found: tuple[TextRecord, ...]

    def encode(self, tokenizer: TextTokenizer) -> Encoded:
        """Token ids of the texts, and where their answers are."""
        return encode_records(self.found, tokenizer, numbers=0, encode=lambda record: [encode_text(record, tokenizer)])


def chunks(path: str | Path, tokenizer: TextTokenizer) -> Iterator[TextChunk]:
    """Yield a file that ``read`` reads in parts.

    Raises:
        InputError: as ``read``.
    """
    held: list[TextRecord] = []
    for record in _records(Path(path)):
        held.append(record)
        if len(held) == CHUNK:
            yield TextChunk(tuple(held))
            held = []
    if held:
        yield TextChunk(tuple(held))


def encode_text(record: Record, tokenizer: TextTokenizer) -> Sequenced:
    """Token ids to learn from, and the span of what is learned: of an instruction its answer, else all of it.

    The end token closes a text, where there is one, whether or not the tokenizer puts it there: so a model learns where
    to end.

    Raises:
        InputError: the tokenizer refuses the text, or joins the end of the prompt and the answer in one token.
    """
    ids: NDArray[np.integer] = tokenizer.encode(record.text)
    end = tokenizer.vocabulary.role("eos")
    if end is not None and (not len(ids) or ids[-1] != end):
        ids = np.append(ids, np.int32(end))
    prompt = record.prompt if isinstance(record, TextRecord) else ""
    begin = 0
    if prompt:
        asked = tokenizer.encode(prompt)
        begin = len(asked) - len(tokenizer.after)
        if not np.array_equal(ids[:begin], asked[:begin]):
            raise InputError(
                "The tokenizer joins the end of the instruction and the begin of its answer in one token.",
                hint="End the instruction, or begin the answer, with another character.",
            )
    span: Span = (begin, len(ids))
    return ids, [span]


def _records(path: Path) -> Iterator[TextRecord]:
    suffixes = [s.lower() for s in PurePath(check_file(path)).suffixes if s.lower() not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".json":
        yield from (_of_object(item, number) for number, item in enumerate(_list(path), 1))
        return
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if kind != ".jsonl":
            yield TextRecord(line, number=number)
            continue
        try:
            yield _of_object(json.loads(line), number)
        except json.JSONDecodeError as error:
            problem = InputError(f"The line is no JSON ({error.msg}).", position=error.pos + 1)
            yield TextRecord("", number=number, problem=problem)


def _list(path: Path) -> list[Any]:
    with open_text(path) as file:
        try:
            found = json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"This is no JSON: line {error.lineno}: {error.msg}.", path=path) from None
    if not isinstance(found, list):
        raise InputError("This is no list of texts.", path=path, hint="A JSON object per line has the suffix .jsonl.")
    return found


def _of_object(item: Any, number: int) -> TextRecord:
    """One text, or the reason why it is none."""
    found: Mapping[str, Any] = item if isinstance(item, dict) else {}
    name = str(found.get("name", ""))
    prompt, text = "", found.get("text")
    if text is None:
        parts = [found.get(key) for key in ("instruction", "output")]
        more = found.get("input") or ""
        if all(isinstance(part, str) and part for part in (*parts, more or "-")):
            prompt = f"{parts[0]} {more}" if more else str(parts[0])
            text = f"{prompt} {parts[1]}"
    if not isinstance(text, str) or not text:
        return TextRecord("", name, number, InputError(f"The object has no {KEYS.removeprefix('a ')}."))
    return TextRecord(text, name, number, prompt=prompt)

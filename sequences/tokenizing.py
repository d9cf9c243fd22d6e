"""Files to a token store, in parallel processes, whole or not at all.

While it is made, a store stands beside its place as ``<name>.partial``, with a note (``partial.json``) of how far it
is; so a run that was killed goes on from there. What is written does not depend on the number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..errors import ConfigError, InputError, OutputError
from .chunks import Chunk, Encoded, Unusable
from .files import check_writable, replacing
from .records import OnError
from .store import StoreWriter, TokenStore
from .tokenizer import Tokenizer, tokenizer_to_dict
from .workers import map_in_order

NOTE, UNUSABLE = "partial.json", "unusable.tsv"
NOTE_SECONDS = 10.0

Source = Callable[[], Iterable[Chunk]]


@dataclass
class Progress:
    """How far a store is.

    Attributes:
        chunks: done, of all files together.
        sequences: written.
        tokens: written.
        spans: written; None: sequences have none.
        unusable_bytes: length of the list of unusable records.
        files: of each file its records and how many of them are unusable.
    """

    chunks: int = 0
    sequences: int = 0
    tokens: int = 0
    spans: int | None = None
    unusable_bytes: int = 0
    files: list[dict[str, int]] = field(default_factory=list)


def tokenize_files(
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    workers: int = 1,
    on_error: OnError = "raise",
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TokenStore:
    """Tokenize chunks of files in parallel and put them, in order, into the store ``out``.

    Args:
        sources: for each file, by the name that errors and ``store.json`` use, what yields its chunks: the same ones
            each time. A domain's ``chunks`` makes them.
        tokenizer: it is written into the store.
        out: folder of the store; there must be none.
        workers: processes that tokenize; this one reads and writes. With one, none is started.
        on_error: stop at a record that cannot be used, or leave it out and list it in the store's ``unusable.tsv``.
        resume: go on with a store that was begun from the same files; without it, that is thrown away.
        identity: plain values that tell these files from others (sizes, hashes); with the tokenizer they must be the
            same to resume. They are written into the store.
        progress: show a bar.

    Raises:
        InputError: a file cannot be read, a record cannot be used (with "raise"), or none can.
        ConfigError: ``out`` exists, or it was begun from other files.
        OutputError: the disk is full or the folder cannot be written.
    """
    out = Path(out)
    if workers < 1:
        raise ConfigError(f"There must be at least one worker, not {workers}.")
    if out.exists():
        raise ConfigError(f"{out} exists already. Choose another folder, or remove it.")
    check_writable(out)
    known = json.loads(json.dumps({"tokenizer": tokenizer_to_dict(tokenizer), **(identity or {})}))
    folder = out.with_name(f"{out.name}.partial")
    done = _begin(folder, known, resume=resume)
    try:
        _fill(folder, sources, tokenizer, done, known, workers=workers, on_error=on_error, progress=progress)
        folder.rename(out)
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    return TokenStore(out)


def _begin(folder: Path, known: Mapping[str, Any], *, resume: bool) -> Progress:
    """Return how far ``folder`` is, made empty where nothing can be kept."""
    note = folder / NOTE
    if resume and note.is_file():
        begun = json.loads(note.read_text(encoding="utf-8"))
        if json.dumps(begun["identity"]) != json.dumps(known):  # as text, in which NaN equals NaN
            raise ConfigError(
                f"{folder} was begun from other files or with another tokenizer. Run without --resume to start again."
            )
        return Progress(**begun["progress"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Progress()


def _fill(
    folder: Path,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    done: Progress,
    known: Mapping[str, Any],
    *,
    workers: int,
    on_error: OnError,
    progress: bool,
) -> None:
    where: list[int] = []  # the file that each chunk under way is of
    chunks = _chunks(sources, where, skip=done.chunks)
    names = list(sources)
    del done.files[len(names) :]
    done.files += [{"records": 0, "unusable": 0, "numbers": 0} for _ in names[len(done.files) :]]
    size = len(tokenizer.vocabulary)
    with (
        StoreWriter(folder, size, sequences=done.sequences, tokens=done.tokens, spans=done.spans) as writer,
        (folder / UNUSABLE).open("r+b" if done.chunks else "wb") as listed,
        tqdm(desc="tokenize", unit=" records", unit_scale=True, disable=not progress, mininterval=0.5) as bar,
    ):
        listed.truncate(done.unusable_bytes)
        listed.seek(done.unusable_bytes)
        bar.update(sum(counts["records"] for counts in done.files))
        noted = time.monotonic()
        for encoded in map_in_order(partial(_encode, tokenizer=tokenizer), chunks, workers=workers):
            file = where.pop(0)
            writer.append(encoded.tokens, encoded.lengths, encoded.spans)
            _count(done.files[file], encoded, names[file], listed, on_error)
            done.chunks += 1
            bar.update(encoded.records)
            bar.set_postfix_str(f"{writer.tokens:,} tokens, {names[file]}", refresh=False)
            if time.monotonic() - noted > NOTE_SECONDS:
                _note(folder, done, writer, listed, known)
                noted = time.monotonic()
        if not writer.sequences:
            raise InputError("No record can be used.", path=names[0] if len(names) == 1 else None)
        listed.flush()
        os.fsync(listed.fileno())
        counts = [{"records": f["records"], "unusable": f["unusable"]} for f in done.files]
        writer.finish({"records": dict(zip(names, counts, strict=True)), **known})
    (folder / NOTE).unlink(missing_ok=True)


def _chunks(sources: Mapping[str, Source], where: list[int], *, skip: int) -> Iterator[Chunk]:
    """All chunks but the first ``skip``; the number of the file of each goes onto ``where``."""
    seen = 0
    for number, (name, source) in enumerate(sources.items()):
        try:
            for chunk in source():
                seen += 1
                if seen > skip:
                    where.append(number)
                    yield chunk
        except InputError as error:
            raise error if error.path is not None else error.at(path=name) from None


def _encode(chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
    encoded = chunk.encode(tokenizer)
    narrow = "u1" if len(tokenizer.vocabulary) <= 2**8 else "u2" if len(tokenizer.vocabulary) <= 2**16 else "u4"
    return encoded._replace(tokens=encoded.tokens.astype(narrow, copy=False))


def _count(counts: dict[str, int], encoded: Encoded, name: str, listed: IO[bytes], on_error: OnError) -> None:
    """Count a chunk's records and list those that cannot be used."""
    for within, title, reason in encoded.unusable:
        number = counts["numbers"] + within
        if on_error == "raise":
            hint = "Mend it, or pass --on-error skip (in Python: on_error='skip') to go on without it."
            raise InputError(reason, path=name, record=number, name=title or None, hint=hint)
        line = (name, str(number), title, reason)
        listed.write(("\t".join(" ".join(part.split()) for part in line) + "\n").encode())
    counts["records"] += encoded.records
    counts["unusable"] += len(encoded.unusable)
    counts["numbers"] += encoded.numbers


def _note(folder: Path, done: Progress, writer: StoreWriter, listed: IO[bytes], known: Mapping[str, Any]) -> None:
    """Bring what is done to the disk and note how much it is."""
    writer.sync()
    listed.flush()
    os.fsync(listed.fileno())
    done.sequences, done.tokens, done.unusable_bytes = writer.sequences, writer.tokens, listed.tell()
    done.spans = writer.spans
    with replacing(folder / NOTE) as new:
        new.write_text(json.dumps({"identity": known, "progress": asdict(done)}), encoding="utf-8")


def read_unusable(store: TokenStore) -> list[tuple[str, Unusable]]:
    """The records that a store left out, each with its file."""
    found = []
    for line in (store.path / UNUSABLE).read_text(encoding="utf-8").splitlines():
        file, number, name, reason = line.split("\t")
        found.append((file, Unusable(int(number), name, reason)))
    return found

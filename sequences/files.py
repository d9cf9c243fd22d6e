"""Reading text of any packing, and writing outputs whole or not at all."""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from safetensors import SafetensorError

from ..errors import InputError, OutputError, needs

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def check_file(path: str | Path) -> Path:
    """Return ``path`` if it is a readable, non-empty file.

    Raises:
        InputError: it is missing, a directory, unreadable or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError("This is a directory, not a file.", path=path, hint="Name one file in it.")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise InputError("There is no such file.", path=path) from None
    except OSError as error:
        raise InputError(f"The file cannot be read ({error.strerror}).", path=path) from None
    if size == 0 and path.is_file():
        raise InputError("The file is empty.", path=path)
    return path


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a zstandard file; unlike the library's own stream reader it notices a cut-short file."""

    def __init__(self, raw: IO[bytes]) -> None:
        with needs("tables"):
            import zstandard
        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame: Callable[[], Any] = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame, self._ready = self._new_frame(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(1 << 16)
            if not compressed:
                if not self._frame.eof:
                    raise EOFError("the last frame does not end")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = self._frame.decompress(compressed)
            except self._error as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


@contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """Open a plain, gzip or zstandard text file (told by its first bytes, not its name).

    Errors met while the body reads (a truncated archive, bytes that are not UTF-8) become one ``InputError``.

    Raises:
        InputError: the file is missing, a directory, empty, truncated or not text.
    """
    path = check_file(path)
    with path.open("rb") as raw:
        magic = raw.peek(4)[:4]
        binary: IO[bytes]
        if magic.startswith(GZIP):
            binary = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif magic.startswith(ZSTD):
            binary = cast(IO[bytes], io.BufferedReader(_ZstdReader(raw)))
        else:
            binary = raw
        try:
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as text:
                yield text
        except UnicodeDecodeError:
            raise InputError(
                "This is not a text file.", path=path, hint="Plain, .gz and .zst UTF-8 text can be read."
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"The compressed file is damaged or cut short ({error}).", path=path, hint="Fetch it again."
            ) from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, line without its end)`` of a text file, blank lines included.

    Raises:
        InputError: as ``open_text``; and a NUL byte, which no text holds.
    """
    with open_text(path) as text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise InputError("This is not a text file.", path=path, record=number)
            yield number, line.rstrip("\r\n")


def read_blocks(path: str | Path, *, before: str = "", size: int = 2**20) -> Iterator[str]:
    """Yield the text in blocks of whole lines, at least ``size`` characters but for the last.

    With ``before`` every block but the first begins with it: ``">"`` keeps the records of FASTA whole. The blocks are
    the same each time.

    Raises:
        InputError: as ``read_lines``.
    """
    mark = f"\n{before}"
    held: list[str] = []
    with open_text(path) as text:
        while block := text.read(size):
            block += text.readline()
            if "\0" in block:
                raise InputError("This is not a text file.", path=path)
            cut = block.rfind(mark) + 1
            if cut or (held and block.startswith(before)):
                yield "".join([*held, block[:cut]])
                held = [block[cut:]] if cut < len(block) else []
            else:
                held.append(block)
    if held:
        yield "".join(held)


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, SafetensorError):  # it wraps the operating system's error in words of its own
        return "the disk is full" if f"os error {errno.ENOSPC}" in str(error) else str(error)
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the folder cannot be written"
    return (error.strerror or str(error)).lower()


def _file_mode() -> int:
    """Mode of a new file under the user's umask."""
    umask = os.umask(0o022)
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the body ends well.

    The body may make the temporary path a file or a folder. On any error it is removed and what stood at ``path``
    before is untouched. A file is replaced in one step; a folder is swapped, so that a whole one exists at any moment
    under ``path`` or its ``.old`` neighbour.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {_reason(error)}.") from error
    new = scratch / path.name
    try:
        try:
            yield new
            for part in sorted(new.rglob("*")) if new.is_dir() else [new]:
                if part.is_file():
                    part.chmod(_file_mode())  # some writers (safetensors) leave files that only their owner can read
                    with part.open("rb+") as handle:
                        os.fsync(handle.fileno())
            if new.is_dir() and path.is_dir():
                old = path.with_name(f"{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                new.replace(path)
        except OutputError:
            raise
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{path} cannot be written: {_reason(error)}. What stood there before is untouched."
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raise ``OutputError`` now if ``path`` cannot be written later, before hours of work go into it."""
    path = Path(path)
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {_reason(error)}.") from error

"""What the user sees when something goes wrong: one line on stderr, and a warning as one line."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ProcessiveError

FAILED, INTERRUPTED = 1, 130


class Stopped(ProcessiveError):
    """The user pressed Ctrl-C, and the verb says what is kept and how to go on."""


def exit_status(error: BaseException) -> int:
    """Exit status for an error: 130 for Ctrl-C as shells expect, 1 for the rest."""
    return INTERRUPTED if isinstance(error, KeyboardInterrupt | Stopped) else FAILED


def explain(error: BaseException) -> str:
    """Say in one line what went wrong.

    Errors of processive say what, where and what to do themselves. Libraries that write files (h5py, pyarrow,
    safetensors) hide a full disk in errors of their own, so it is looked for along the whole chain.
    """
    if isinstance(error, ProcessiveError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "Interrupted."
    elif any(_is_disk_full(link) for link in _chain(error)):
        text = "The disk is full. Free some space, or write to another disk; what was written before is untouched."
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        text = f"Not enough memory ({error}). Use a smaller batch or a smaller model."
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}."
    else:
        text = f"Unexpected {type(error).__name__}: {error}. Run again with --debug to see where it comes from."
    return one_line(text)


def say(text: str) -> None:
    """Print one line to stderr, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(f"processive: {one_line(text)}", file=sys.stderr)


def say_error(error: BaseException, *, debug: bool) -> None:
    """Print the error's one line, after its traceback when ``debug``."""
    if debug:
        traceback.print_exception(error)
    say(explain(error))


@contextmanager
def messages_as_lines(*, debug: bool) -> Iterator[None]:
    """Print the package's messages and the warnings meant for users as one line each.

    Warnings meant for developers (of deprecations, of resources) are shown only when ``debug``.
    """

    def show(message: Warning | str, *details: object, **more: object) -> None:
        say(f"warning: {message}")

    package, lines = logging.getLogger(__package__.partition(".")[0]), _Lines()
    level = package.level
    package.addHandler(lines)
    package.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                for category in (UserWarning, RuntimeWarning):
                    warnings.simplefilter("default", category)
            warnings.showwarning = show
            yield
    finally:
        package.removeHandler(lines)
        package.setLevel(level)


class _Lines(logging.Handler):
    """Messages of the package's loggers, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        say(self.format(record))


def one_line(text: str) -> str:
    """Join lines and runs of blanks."""
    return " ".join(text.split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)

"""The errors processive raises, and the one line each of them prints.

Raised where the cause is known, never caught to continue in silence. The command line prints
``str(error)`` and exits with a non-zero status; ``--debug`` shows the traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ProcessiveError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(ProcessiveError, ValueError):
    """A configuration, recipe or option that cannot work, with the value that is wrong."""


class ShapeError(ProcessiveError, ValueError):
    """Tensors that do not fit together."""

    def __init__(self, name: str, got: object, expected: object) -> None:
        super().__init__(f"{name}: got shape {got}, expected {expected}.")


class InputError(ProcessiveError, ValueError):
    """Input that cannot be used: what is wrong, where it stands, and what to do.

    Attributes:
        reason: what is wrong, a sentence without the place.
        path: the file, when there is one.
        record: number of the record in its file, counted from 1.
        name: the record's own name.
        position: position in the record, counted from 1.
        hint: what to do about it.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: str | Path | None = None,
        record: int | None = None,
        name: str | None = None,
        position: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.reason, self.path, self.record = reason, path, record
        self.name, self.position, self.hint = name, position, hint
        super().__init__(reason)

    def __str__(self) -> str:
        place = []
        if self.path is not None:
            place.append(str(self.path))
        if self.record is not None:
            place.append(f"record {self.record}" + (f" ({self.name})" if self.name else ""))
        elif self.name:
            place.append(self.name)
        if self.position is not None:
            place.append(f"position {self.position}")
        where = ", ".join(place)
        return (f"{where}: " if where else "") + self.reason + (f" {self.hint}" if self.hint else "")

    def at(self, *, path: str | Path | None = None, record: int | None = None, name: str | None = None) -> InputError:
        """Return the same error with the file, record or name that only the caller knows."""
        return InputError(
            self.reason,
            path=self.path if path is None else path,
            record=self.record if record is None else record,
            name=self.name if name is None else name,
            position=self.position,
            hint=self.hint,
        )


class OutputError(ProcessiveError, OSError):
    """An output that could not be written; what stood there before is untouched."""


class MissingExtra(ProcessiveError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is needed here and is not installed: pip install 'processive[{extra}]'")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a failed import of an optional package into ``MissingExtra``.

    >>> with needs("chem"):
    ...     from rdkit import Chem
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("processive"):
            raise
        raise MissingExtra(error.name or "a package", extra) from error

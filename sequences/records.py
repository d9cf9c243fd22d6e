"""What a reader returns: every record of a file, the ones that cannot be used included."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Record:
    """One record of a text file.

    Attributes:
        text: the sequence or string, as the domain's tokenizer takes it.
        name: its identifier in the file, or "".
        number: its number in the file, from 1 (a line number where a line is a record).
        problem: why it cannot be used, or None.
    """

    text: str
    name: str = ""
    number: int = 1
    problem: InputError | None = None


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """All records of a file, in its order, unusable ones in their place, so that results stay aligned with the file."""

    records: tuple[Record, ...]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # the overloads of Sequence say it
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def usable(self) -> list[Record]:
        """The records without a problem."""
        return [record for record in self.records if record.problem is None]

    @property
    def rejected(self) -> list[Record]:
        """The records with a problem."""
        return [record for record in self.records if record.problem is not None]

    def checked(self, on_error: OnError) -> Records:
        """Apply the policy: raise the first problem, or warn of all of them in one line and go on.

        Raises:
            InputError: ``on_error`` is "raise" and a record has a problem, or no record is usable.
        """
        bad = self.rejected
        if bad and on_error == "raise":
            problem = bad[0].problem
            assert problem is not None
            more = f" {len(bad) - 1} more of {len(self)} records cannot be used." if len(bad) > 1 else ""
            hint = f"Mend it, or pass --on-error skip (in Python: checked('skip')) to go on without it.{more}"
            raise InputError(
                problem.reason,
                path=problem.path if problem.path is not None else self.path,
                record=bad[0].number,
                name=bad[0].name or None,
                position=problem.position,
                hint=f"{problem.hint} {hint}" if problem.hint else hint,
            )
        if not self.usable:
            raise InputError("The file holds no usable record.", path=self.path)
        if bad:
            numbers = ", ".join(str(record.number) for record in bad[:10]) + (", ..." if len(bad) > 10 else "")
            where = f"{self.path}: " if self.path is not None else ""
            warnings.warn(
                f"{where}{len(bad)} of {len(self)} records cannot be used (records {numbers}); first: {bad[0].problem}",
                stacklevel=2,
            )
        return self


def texts_of(records: Sequence[Record | str], encode: Callable[[str], object], *, what: str) -> list[str | None]:
    """Texts of records, or plain ones; None for a record with a problem.

    Each is given to ``encode``, the tokenizer's, before any is used, so that a text it refuses costs no time.

    Raises:
        InputError: a text is refused, with its number and name; or this is one string (and no list of ``what``).
    """
    if isinstance(records, str):
        raise InputError(f"This is one string, not a list of {what}s.", hint=f"Put it in brackets: [{what}].")
    texts: list[str | None] = []
    for number, given in enumerate(records, 1):
        record = Record(given, number=number) if isinstance(given, str) else given
        if record.problem is None:
            try:
                encode(record.text)
            except InputError as error:
                raise error.at(record=record.number, name=record.name or None) from None
        texts.append(record.text if record.problem is None else None)
    return texts

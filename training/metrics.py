"""Metrics as JSON lines: ``metrics.jsonl``, a line every few steps, readable while the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..sequences import replacing

NAME = "metrics.jsonl"


def append_metrics(out: Path, values: dict[str, Any]) -> None:
    """Add one line.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        with (out / NAME).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")
    except OSError as error:
        raise OutputError(f"{out / NAME} cannot be written: {(error.strerror or str(error)).lower()}.") from error


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run so far; a last line cut short by a killed process is left out."""
    path = Path(out) / NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise
    return values


def keep_metrics(out: Path, *, until: int) -> None:
    """Drop the lines of steps after ``until``: they belong to work that a killed run lost."""
    kept = [line for line in read_metrics(out) if line["step"] <= until]
    with replacing(out / NAME) as new:
        new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

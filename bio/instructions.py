"""Proteins as text with instructions, as ProLLaMA reads and writes them (Lv et al. 2024, arXiv:2402.16445).

Text to go on with pretraining is ``Seq=<MKT...>``. An instruction asks for the superfamily of a sequence, or for a
sequence of a superfamily, and its answer is what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InputError
from ..sequences import Record, read_lines, replacing

GENERATE, DETERMINE = "[Generate by superfamily]", "[Determine superfamily]"


def protein_text(sequence: str) -> str:
    """Return the text of a protein: ``Seq=<MKT...>``."""
    return f"Seq=<{sequence.upper()}>"


def superfamily_text(superfamily: str) -> str:
    """Return the text of a superfamily: ``Superfamily=<...>``."""
    return f"Superfamily=<{superfamily}>"


def superfamily_prompt(superfamily: str) -> str:
    """Return the prompt for a sequence of a superfamily, for ``generate``."""
    return f"{GENERATE} {superfamily_text(superfamily)}"


def write_instructions(
    path: str | Path, records: Iterable[Record], superfamilies: Mapping[str, str] | None = None
) -> int:
    """Write proteins as JSON lines that ``processive train prollama`` takes; records with a problem are left out.

    Args:
        path: the file.
        records: the proteins.
        superfamilies: the superfamily of each by its name: two instructions for each protein that has one, which asks
            for either. None: the proteins alone, as text.

    Returns:
        the number of lines.

    Raises:
        InputError: nothing is left to be written.
        OutputError: the folder cannot be written, or the disk is full.
    """
    lines: list[dict[str, str]] = []
    for record in records:
        if record.problem is not None:
            continue
        protein = protein_text(record.text)
        if superfamilies is None:
            lines.append({"text": protein})
        elif record.name in superfamilies:
            family = superfamily_text(superfamilies[record.name])
            lines.append({"instruction": GENERATE, "input": family, "output": protein})
            lines.append({"instruction": DETERMINE, "input": protein, "output": family})
    if not lines:
        raise InputError("No protein has a superfamily.", hint="Superfamilies are given by the names of the records.")
    with replacing(path) as new:
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def read_superfamilies(path: str | Path) -> dict[str, str]:
    """Read a table of two columns by tabs: the name of a protein and its superfamily.

    Raises:
        InputError: a line has no two columns.
    """
    found: dict[str, str] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise InputError(f"Line {number} is not a name, a tab and a superfamily.", path=path)
        found[cells[0].strip()] = cells[1].strip()
    return found

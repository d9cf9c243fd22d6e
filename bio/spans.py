"""Tables of named spans of sequences (genes, domains, sites), for training that masks them first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from ..errors import InputError, needs
from ..sequences import Record, Span, check_file, open_text, read_lines

SpanTable = Mapping[str, Sequence[Span]]

GFF = (".gff", ".gff3", ".gtf")
GENBANK = (".gb", ".gbk", ".genbank")
COMMENTS = ("#", "track", "browser")  # of BED and GFF


def read_spans(path: str | Path, *, kinds: Sequence[str] = ("gene",)) -> dict[str, list[Span]]:
    """Read spans by the name of the sequence that they lie in.

    - ``.gff``, ``.gff3``, ``.gtf``: features, from the first letter (counted from 1) to the last.
    - ``.gb``, ``.gbk``: features of a GenBank file (Biopython), each of their parts a span; a sequence has the name of
      its version (NC_000932.1).
    - anything else, BED: name, start (counted from 0) and end (past the last letter), by tabs or blanks.

    Plain, gzip and zstandard files are told by content. Which strand a feature is on is no matter.

    Args:
        path: the file.
        kinds: of a GFF or GenBank file only features of these kinds; of a GFF all if there are none of them.

    Returns:
        spans in the order of the file, as the first letter, from 0, and the one past the last.

    Raises:
        InputError: the file cannot be read, a line is no span, or there is none.
        MissingExtra: a GenBank file needs Biopython.
    """
    path = check_file(path)
    suffix = next((s for s in reversed(PurePath(path).suffixes) if s.lower() not in (".gz", ".zst")), "").lower()
    if suffix in GENBANK:
        found = list(_genbank(path, kinds))
    else:
        found = list(_table(path, gff=suffix in GFF))
        if any(kind in kinds for *_, kind in found):
            found = [span for span in found if span[3] in kinds]
    if not found:
        raise InputError("The file holds no span.", path=path)
    spans: dict[str, list[Span]] = {}
    for name, start, end, _ in found:
        spans.setdefault(name, []).append((start, end))
    return spans


def spans_by_record(records: Sequence[Record], table: SpanTable) -> list[list[Span]]:
    """Return the spans of each record, by its name; spans of other names are of other files.

    Raises:
        InputError: no record has a name of the table, two have the same one of its names, or a span ends beyond its
            record.
    """
    seen: set[str] = set()
    for record in records:
        if record.name in table:
            if record.name in seen:
                raise InputError(
                    "Another record has the same name, so its spans cannot be told.",
                    record=record.number,
                    name=record.name,
                )
            seen.add(record.name)
    if not seen:
        known = ", ".join(list(table)[:3])
        raise InputError(
            f"No record has a name of the table of spans ({known}, ...).",
            hint="A record's name is the first word behind '>'.",
        )
    return [list(table.get(record.name, ())) for record in records]


def _table(path: Path, *, gff: bool) -> Iterator[tuple[str, int, int, str]]:
    start_column, end_column = (3, 4) if gff else (1, 2)
    for number, line in read_lines(path):
        if line.startswith(">"):  # sequences at the end of a GFF3 file
            return
        if not line.strip() or line.startswith(COMMENTS):
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        try:
            start, end = int(cells[start_column]) - gff, int(cells[end_column])
        except (IndexError, ValueError):
            start = end = 0
        if not 0 <= start < end:
            what = "columns 4 and 5 of a GFF file" if gff else "name, start and end (BED)"
            raise InputError(f"Line {number} is no span: it has no {what}.", path=path)
        yield cells[0], start, end, cells[2] if gff else ""


def _genbank(path: Path, kinds: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    with needs("bio"):
        from Bio import SeqIO
    with open_text(path) as file:
        for record in SeqIO.parse(file, "genbank"):  # type: ignore[no-untyped-call]
            for feature in record.features:
                if feature.type in kinds:
                    for part in feature.location.parts:
                        yield record.id, int(part.start), int(part.end), feature.type

"""Files of molecules to records: SMILES lists, tables, SDF, each plain, .gz, .zst or alone in a .zip."""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

from ..errors import ConfigError, InputError, needs
from ..sequences import (
    Encoded,
    Record,
    RecordChunk,
    Records,
    Tokenizer,
    check_file,
    encode_records,
    in_chunks,
    read_blocks,
    read_lines,
    replacing,
)
from .molecules import parse_smiles
from .tokenizer import SmilesTokenizer

Lines = Iterator[tuple[int, str]]

SMILES_COLUMNS = ("smiles", "canonical_smiles", "isomeric_smiles", "canonicalsmiles", "isomericsmiles", "smi", "mol")
NAME_COLUMNS = ("name", "id", "mol_id", "compound id", "chembl_id", "molecule chembl id", "cmpd_chemblid", "cid")
COMMENTS = ("#", "//")  # neither can begin a SMILES


def read(path: str | Path, *, column: str | None = None, sanitize: bool = True) -> Records:
    """Read the molecules of a file; what cannot be used stays in its place with ``problem`` set.

    - ``.csv``, ``.tsv``, and any text whose first line names a SMILES column: that column, or ``column``. Doubled
      backslashes (some published tables, ChEBI-20 among them, escape them) become single ones.
    - ``.sdf``, ``.sd``, ``.mol``: each molecule's canonical SMILES.
    - anything else: a SMILES per line, then white space and a name. A first line that begins with the word "smiles"
      is a header; blank lines and lines that begin with ``#`` or ``//`` are passed over.
    - ``.zip`` holding one such file. Gzip and zstandard are told by content.

    A record's number is its line in the file (in an SDF, its molecule), both from 1.

    Args:
        path: the file.
        column: the table column that holds the SMILES.
        sanitize: also ask RDKit whether the string is a molecule; otherwise only that it can be tokenized.

    Raises:
        InputError: the file cannot be read, holds no record, or no column holds SMILES.
    """
    path = check_file(path)
    name, lines = _lines(path)
    suffix = PurePath(name).suffix.lower()
    try:
        if suffix in (".sdf", ".sd", ".mol"):
            found = list(_read_sdf(lines, sanitize=sanitize))
        else:
            rows = _read_text(lines, column=column, table=suffix in (".csv", ".tsv"))
            found = _checked(rows, sanitize=sanitize)
    except InputError as error:
        raise error.at(path=path) from None
    if not found:
        raise InputError("The file holds no molecule.", path=path)
    return Records(tuple(found), path)


@dataclass(frozen=True)
class SmilesChunk:
    """Lines of a list of SMILES; a header line among them is left empty."""

    text: str
    sanitize: bool = False

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        """Token ids of the records, whose numbers are those of their lines."""
        lines = self.text.split("\n")
        check = parse_smiles if self.sanitize else None
        return encode_records(_read_list(enumerate(lines, 1)), tokenizer, check=check, numbers=len(lines) - 1)


def chunks(
    path: str | Path, tokenizer: Tokenizer, *, sanitize: bool = False
) -> Iterator[SmilesChunk] | Iterator[RecordChunk]:
    """Yield a file that ``read`` reads in parts of some 20,000 molecules.

    Tables and SDF are parsed here, a list of SMILES where it is tokenized. With ``sanitize`` RDKit is asked, there
    too, whether each string is a molecule; it takes twenty times as long as the tokens do.

    Raises:
        InputError: as ``read``.
    """
    del tokenizer  # the domains' functions take the same arguments
    path = check_file(path)
    name, lines = _lines(path)
    suffix = PurePath(name).suffix.lower()
    check = parse_smiles if sanitize else None
    if suffix in (".sdf", ".sd", ".mol"):
        return in_chunks(_read_sdf(lines, sanitize=sanitize))
    table = suffix in (".csv", ".tsv")
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise InputError("The file holds no molecule.", path=path)
    zipped = name != (path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path).name
    if table or zipped or _is_table(first[1]):
        return in_chunks(_read_text(_lines(path)[1], column=None, table=table), check=check)
    header = first[1] if _is_header(first[1]) else None
    return _list_chunks(path, header, sanitize=sanitize)


def _list_chunks(path: Path, header: str | None, *, sanitize: bool) -> Iterator[SmilesChunk]:
    for number, text in enumerate(read_blocks(path)):
        yield SmilesChunk(text if number or header is None else text.replace(header, "", 1), sanitize)


def write_smiles(path: str | Path, smiles: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Write a SMILES and a name (``molecule_1``, ``molecule_2``, ... if not given) per line, whole or not at all.

    Raises:
        ConfigError: there are not as many names as molecules.
        OutputError: the file cannot be written.
    """
    if names is None:
        names = [f"molecule_{number}" for number in range(1, len(smiles) + 1)]
    if len(names) != len(smiles):
        raise ConfigError(f"{len(names)} names for {len(smiles)} molecules.")
    with replacing(path) as new:
        new.write_text("".join(f"{text} {name}\n" for text, name in zip(smiles, names, strict=True)), encoding="utf-8")


def _lines(path: Path) -> tuple[str, Lines]:
    """The name that tells the format, and the numbered lines, of a file or of the only file in a zip."""
    with path.open("rb") as raw:
        zipped = raw.read(4) == b"PK\x03\x04"
    if not zipped:
        name = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
        return name.name, read_lines(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/") and not m.startswith("__MACOSX/")]
            if len(members) != 1:
                shown = ", ".join(members[:5]) + (", ..." if len(members) > 5 else "")
                raise InputError(
                    f"The zip holds {len(members)} files ({shown}), not one.", path=path, hint="Unpack it and name one."
                )
            text = archive.read(members[0]).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("The file in the zip is not a text file.", path=path) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"The zip is damaged, cut short or locked ({error}).", path=path, hint="Fetch it again."
        ) from None
    return members[0], ((number, line.rstrip("\r\n")) for number, line in enumerate(io.StringIO(text), 1))


def _read_text(lines: Lines, *, column: str | None, table: bool) -> Iterable[Record]:
    """Records, not yet checked, of a table or of a list of SMILES."""
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return ()
    number, line = first
    delimiter, heads = _heads(line)
    if not (table or column is not None or _is_table(line)):
        return _read_list(lines if _is_header(line) else chain([first], lines))
    return _read_table(lines, heads, delimiter, number, column)


def _heads(line: str) -> tuple[str, list[str]]:
    """The delimiter of a table and the names of its columns."""
    delimiter = max("\t,;", key=line.count) if any(d in line for d in "\t,;") else ","
    return delimiter, [head.strip() for head in next(csv.reader([line], delimiter=delimiter))]


def _is_table(line: str) -> bool:
    """Whether a first line names several columns, one of them of SMILES."""
    heads = _heads(line)[1]
    return len(heads) > 1 and any(head.lower() in SMILES_COLUMNS for head in heads)


def _is_header(line: str) -> bool:
    """Whether the first line of a list is a header."""
    return line.split(maxsplit=1)[0].lower() in SMILES_COLUMNS


def _read_list(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        text, _, name = line.strip().partition("\t") if "\t" in line.strip() else line.strip().partition(" ")
        if text and not text.startswith(COMMENTS):
            yield Record(text.rstrip(), name.strip(), number)


def _read_table(
    lines: Lines, heads: list[str], delimiter: str, header_line: int, column: str | None
) -> Iterator[Record]:
    text_at = _column(heads, column)
    lowered = [head.lower() for head in heads]
    name_at = next((lowered.index(name) for name in NAME_COLUMNS if name in lowered), None)
    rows = csv.reader((f"{line}\n" for _, line in lines), delimiter=delimiter)
    last = 0
    try:
        for row in rows:
            number, last = header_line + last + 1, rows.line_num  # a quoted cell may run over several lines
            if not any(cell.strip() for cell in row):
                continue
            text = row[text_at].strip() if text_at < len(row) else ""
            name = row[name_at].strip() if name_at is not None and name_at < len(row) else ""
            yield Record(text.replace("\\\\", "\\"), name, number)
    except csv.Error as error:
        raise InputError(f"The table cannot be read: {error}.", record=header_line + rows.line_num) from None


def _column(heads: list[str], wanted: str | None) -> int:
    """Index of the column that holds SMILES."""
    lowered = [head.lower() for head in heads]
    if wanted is not None:
        found = [i for i, head in enumerate(heads) if head == wanted] or [
            i for i, head in enumerate(lowered) if head == wanted.lower()
        ]
    else:
        found = [lowered.index(name) for name in SMILES_COLUMNS if name in lowered] or [
            i for i, head in enumerate(lowered) if "smiles" in head
        ]
    if not found:
        shown = ", ".join(heads[:10]) + (", ..." if len(heads) > 10 else "")
        raise InputError(
            f"No column is called {wanted!r}; there are: {shown}."
            if wanted is not None
            else f"No column is called smiles; there are: {shown}.",
            hint="Name the column that holds the SMILES.",
        )
    return found[0]


def _checked(records: Iterable[Record], *, sanitize: bool) -> list[Record]:
    """The records with ``problem`` set where the text cannot be tokenized or is no molecule."""
    checks: list[Callable[[str], object]] = [SmilesTokenizer().encode, *([parse_smiles] if sanitize else [])]
    found = []
    for record in records:
        try:
            if not record.text:
                raise InputError("There is no SMILES in this row.")
            for check in checks:
                check(record.text)
            found.append(record)
        except InputError as error:
            problem = error.at(record=record.number, name=record.name or None)
            found.append(Record(record.text, record.name, record.number, problem))
    return found


def _read_sdf(lines: Lines, *, sanitize: bool) -> Iterator[Record]:
    """Records of an SDF; the title line is the name."""
    with needs("chem"):
        from rdkit import Chem, rdBase
    block: list[str] = []
    number = 0
    for _, line in chain(lines, [(0, "$$$$")]):
        if not line.startswith("$$$$"):
            block.append(line)
            continue
        if any(part.strip() for part in block):
            number += 1
            name = block[0].strip()
            with rdBase.BlockLogs():
                molecule = Chem.MolFromMolBlock("\n".join(block), sanitize=sanitize)
                text = Chem.MolToSmiles(molecule) if molecule is not None else ""
            reason = None if text else InputError("RDKit cannot read this molecule.", record=number, name=name or None)
            yield Record(text, name, number, reason)
        block = []

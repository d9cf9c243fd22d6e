"""Gene vocabularies: which genes a model knows, under which names, and how much of each is usual."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import open_text
from .matrix import Expression, find_expression

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame
    from scipy.sparse import csr_matrix
else:
    AnnData = DataFrame = csr_matrix = Any

SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")
ID_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id")
SYMBOL_COLUMNS = ("symbol", "gene_symbol", "gene_symbols", "gene_name", "feature_name")
DEPTH = 10_000.0  # molecules a cell is brought to before medians are taken
VALUES_HELD = 2**26  # at one time, while medians are taken: 1 GB with the sort's copy
LEAST_SHARED = 0.05  # of the smaller gene set; below this the names are of another species or another kind

_VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+(_PAR_Y)?$")


def gene_name(name: str) -> str:
    """Return a gene's name without the version of an Ensembl id ("ENSG00000139618.15"), blanks as "_"."""
    return _VERSION.sub(r"\1", "_".join(str(name).split()))


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which token each gene of a matrix is.

    Attributes:
        column: the column of ``var`` whose names matched best, or "index".
        ids: token id of each gene, -1 where the vocabulary does not know it, [genes].
        known: genes in the vocabulary.
    """

    column: str
    ids: NDArray[np.int64]
    known: int

    @property
    def matched(self) -> int:
        """Genes of the matrix that the vocabulary knows."""
        return int((self.ids >= 0).sum())

    def __str__(self) -> str:
        return f"{self.matched} of {len(self.ids)} genes ({self.column}) are in the vocabulary of {self.known}"

    def sum_duplicates(self, block: csr_matrix, tokens: int) -> csr_matrix:
        """Turn [cells, genes] into [cells, tokens]; genes that are the same token are added up."""
        from scipy import sparse

        kept = np.flatnonzero(self.ids >= 0)
        entries = (np.ones(len(kept)), (kept, self.ids[kept]))
        return block @ sparse.csr_matrix(entries, shape=(len(self.ids), tokens))


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """Genes in token order, with the median of each gene's nonzero depth-normalised values.

    Attributes:
        tokens: every token, index = id; the special ones stand in angle brackets.
        medians: nonzero median per 10,000 molecules, NaN for special tokens, [tokens].
        aliases: another name of each token (the symbol of an Ensembl id), or "".
    """

    tokens: tuple[str, ...]
    medians: NDArray[np.float64]
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.medians) != len(self.tokens) or len(self.aliases) not in (0, len(self.tokens)):
            raise ConfigError(
                f"A gene vocabulary of {len(self.tokens)} tokens came with {len(self.medians)} medians "
                f"and {len(self.aliases)} aliases."
            )
        genes = ~np.isnan(self.medians)
        bad = np.flatnonzero(genes & ~((self.medians > 0) & np.isfinite(self.medians)))
        if len(bad):
            raise ConfigError(f"The median of {self.tokens[bad[0]]} is {self.medians[bad[0]]:g}; it must be positive.")
        if not genes.any():
            raise ConfigError("A gene vocabulary needs at least one gene.")

    @property
    def known(self) -> int:
        """Number of genes, special tokens left out."""
        return int((~np.isnan(self.medians)).sum())

    @cached_property
    def _exact(self) -> dict[str, int]:
        """Name or alias -> id; an alias of several genes is none, and a name goes before an alias."""
        return _unambiguous(self._aliases) | self._names

    @cached_property
    def _folded(self) -> dict[str, int]:
        """Upper-case name or alias -> id, where that means one gene only."""
        return _unambiguous([(name.upper(), i) for name, i in (*self._names.items(), *self._aliases)])

    @property
    def _names(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if not np.isnan(self.medians[i])}

    @property
    def _aliases(self) -> list[tuple[str, int]]:
        return [(alias, i) for i, alias in enumerate(self.aliases) if alias]

    def with_specials(self, specials: Sequence[str]) -> GeneVocabulary:
        """Return the vocabulary with special tokens behind the others."""
        if not specials:
            return self
        blank = ("",) * len(specials) if self.aliases else ()
        medians = np.concatenate([self.medians, np.full(len(specials), np.nan)])
        return GeneVocabulary((*self.tokens, *specials), medians, (*self.aliases, *blank))

    def find(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Token id of each gene name, -1 where there is none: versions cut, in any case where that is unambiguous."""
        clean = [gene_name(name) for name in names]
        return np.array([self._exact.get(n, self._folded.get(n.upper(), -1)) for n in clean], dtype=np.int64)

    def match(self, var: DataFrame) -> GeneMatch:
        """Find the genes of a matrix by the index of ``var`` or the id or symbol column that fits best.

        Raises:
            InputError: nearly none is known; examples from both sides are named.
        """
        columns = {"index": var.index} | {c: var[c] for c in (*ID_COLUMNS, *SYMBOL_COLUMNS) if c in var}
        matches = [GeneMatch(column, self.find(names), self.known) for column, names in columns.items()]
        best = max(matches, key=lambda match: match.matched)
        if best.matched < max(1, LEAST_SHARED * min(len(var), self.known)):
            ours = [token for token, median in zip(self.tokens, self.medians, strict=True) if not np.isnan(median)]
            raise InputError(
                f"Only {best}: here they are called {', '.join(map(str, var.index[:3]))}, "
                f"in the vocabulary {', '.join(ours[:3])}.",
                hint="Use data of the same species, or set adata.var_names to the same kind of names.",
            )
        return best

    @classmethod
    def from_adata(cls, adata: AnnData, *, min_cells: int = 1) -> GeneVocabulary:
        """Take the genes and nonzero medians of ``adata``: ``<pad> <mask> <cls> <eos>``, then genes as they stand.

        Counts are brought to 10,000 per cell; normalised values are taken as they are. Genes found in fewer than
        ``min_cells`` cells are left out, columns of one name are added up. The medians are exact: the matrix is read
        once to count and then once for every ``VALUES_HELD`` nonzero values, so memory stays bounded.

        Raises:
            InputError: no matrix can be used, or no gene is found in ``min_cells`` cells.
        """
        expression = find_expression(adata)
        names = list(dict.fromkeys(gene_name(name) for name in expression.var.index))
        number = {name: i for i, name in enumerate(names)}
        ids = np.array([number[gene_name(name)] for name in expression.var.index], dtype=np.int64)
        merge = GeneMatch("index", ids, len(names))
        cells = np.zeros(len(names), np.int64)
        for _, indices in _normalised(expression, merge):
            cells += np.bincount(indices, minlength=len(names))
        medians = _nonzero_medians(expression, merge, cells)
        kept = np.flatnonzero(cells >= max(min_cells, 1))
        if not len(kept):
            raise InputError(f"No gene is found in {max(min_cells, 1)} cells or more.", hint="Lower min_cells.")
        alias = next((c for c in (*SYMBOL_COLUMNS, *ID_COLUMNS) if c in expression.var), None)
        other = {} if alias is None else dict(zip(ids.tolist(), map(gene_name, expression.var[alias]), strict=True))
        blank = ("",) * len(SPECIALS)
        return cls(
            tokens=(*SPECIALS, *(names[i] for i in kept)),
            medians=np.concatenate([np.full(len(SPECIALS), np.nan), medians[kept]]),
            aliases=() if alias is None else (*blank, *(other[int(i)] for i in kept)),
        )

    @classmethod
    def from_table(cls, path: str | Path) -> GeneVocabulary:
        """Read a table (csv or tsv, plain, gz or zst) such as Geneformer's.

        Columns: the gene (``ensembl_id``, ``gene_id`` or ``symbol``, ...), ``median``, and if there is one ``token``:
        these ids are kept, and the special tokens are the rows ``<...>``. Without it the rows follow
        ``<pad> <mask> <cls> <eos>`` in their order.

        Raises:
            InputError: a column is missing, a line cannot be read, a gene stands twice, ids have gaps.
        """
        rows = list(_read_table(Path(path)))
        if rows and rows[0].token is None:
            rows = [_Row(special, float("nan"), "", None) for special in SPECIALS] + rows
        else:
            rows.sort(key=lambda row: row.token if row.token is not None else -1)
            gap = next((i for i, row in enumerate(rows) if row.token != i), None)
            if gap is not None:
                raise InputError(
                    f"The token ids must be 0, 1, 2, ... without gaps; {gap} is missing or twice.", path=path
                )
        tokens = tuple(row.name for row in rows)
        if len(set(tokens)) < len(tokens):
            twice = sorted({token for token in tokens if tokens.count(token) > 1})
            raise InputError(f"These genes stand twice: {', '.join(twice[:3])}.", path=path)
        aliases = tuple(row.alias for row in rows)
        try:
            return cls(tokens, np.array([row.median for row in rows]), aliases if any(aliases) else ())
        except ConfigError as error:
            raise InputError(str(error), path=path) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the median of a special token is None."""
        medians = [None if np.isnan(median) else float(median) for median in self.medians]
        return {"tokens": list(self.tokens), "medians": medians, "aliases": list(self.aliases)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GeneVocabulary:
        """Inverse of ``to_dict``."""
        medians = np.array([np.nan if median is None else median for median in data["medians"]], dtype=np.float64)
        return cls(tuple(data["tokens"]), medians, tuple(data["aliases"]))


def _unambiguous(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    meant: dict[str, set[int]] = {}
    for name, i in pairs:
        meant.setdefault(name, set()).add(i)
    return {name: min(ids) for name, ids in meant.items() if len(ids) == 1}


def _normalised(
    expression: Expression, merge: GeneMatch
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.integer[Any]]]]:
    """Yield nonzero values per 10,000 molecules and the merged gene each belongs to."""
    for _, block in expression.blocks():
        if expression.kind == "counts":
            depth = np.asarray(block.sum(1)).ravel()
            block.data *= np.repeat(DEPTH / np.maximum(depth, 1e-300), np.diff(block.indptr))
        merged = merge.sum_duplicates(block, merge.known)
        present = merged.data > 0
        yield merged.data[present], merged.indices[present]


def _nonzero_medians(expression: Expression, merge: GeneMatch, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exact median of each gene's nonzero values, genes taken in groups of at most ``VALUES_HELD`` values."""
    medians = np.full(len(counts), np.nan)
    group = (np.cumsum(counts) - 1) // VALUES_HELD  # a gene that straddles two groups belongs to the later one
    for number in np.unique(group[counts > 0]):
        members = group == number
        taken = [(v[members[g]], g[members[g]]) for v, g in _normalised(expression, merge)]
        values, genes = np.concatenate([v for v, _ in taken]), np.concatenate([g for _, g in taken])
        values = values[np.lexsort((values, genes))]
        ends = np.cumsum(np.where(members, counts, 0))
        present = members & (counts > 0)
        start, end = (ends - counts)[present], ends[present]
        medians[present] = (values[(start + end - 1) // 2] + values[(start + end) // 2]) / 2
    return medians


@dataclass(frozen=True)
class _Row:
    name: str
    median: float
    alias: str
    token: int | None


def _column(header: Sequence[str], names: Sequence[str], path: Path) -> int:
    found = next((name for name in names if name in header), None)
    if found is None:
        raise InputError(
            f"The table needs a column {' or '.join(names)}; it has {', '.join(header[:6])}.", path=path, record=1
        )
    return header.index(found)


def _read_table(path: Path) -> Iterator[_Row]:
    with open_text(path) as text:
        first = text.readline()
        delimiter = "\t" if "\t" in first else ","
        header = next(csv.reader([first], delimiter=delimiter))
        gene = _column(header, (*ID_COLUMNS, "gene", *SYMBOL_COLUMNS), path)
        median = _column(header, ("median",), path)
        token = header.index("token") if "token" in header else None
        alias = next((header.index(c) for c in SYMBOL_COLUMNS if c in header and header.index(c) != gene), None)
        for line, fields in enumerate(csv.reader(text, delimiter=delimiter), 2):
            if not fields:
                continue
            try:
                name = gene_name(fields[gene])
                special = name.startswith("<") and name.endswith(">")
                yield _Row(
                    name,
                    float("nan") if special else float(fields[median]),
                    "" if alias is None else gene_name(fields[alias]),
                    None if token is None else int(fields[token]),
                )
            except (ValueError, IndexError):
                raise InputError(
                    f"This line is no gene with a median: {delimiter.join(fields)[:60]!r}.", path=path, record=line
                ) from None

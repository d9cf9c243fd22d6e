"""The expression matrix of an AnnData: which one it is, what its values are, and its rows in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, needs

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame
    from scipy.sparse import csr_matrix
else:
    AnnData = DataFrame = csr_matrix = Any  # they come with the extra "cells"; annotations are checked while tests run

Kind = Literal["counts", "normalised", "log1p"]

SOURCES = ("X", "layers['counts']", "raw.X")
BLOCK_ROWS = 2048
SAMPLE = 4096  # values looked at, in each of eight places, to tell what a matrix holds
NONZEROS_HELD = 2**25  # of a matrix stored by columns on disk, at one time: 0.5 GB
LARGEST_LOG1P = 20.0  # log1p of a depth of 1e6 is 13.8; a fraction above this is no logarithm
WHOLE = 0.2  # a multiple of the cell's smallest value this near an integer is one; float32 logarithms are off by 0.11

DESCRIPTIONS: dict[Kind, str] = {
    "counts": "counts",
    "normalised": "depth-normalised values",
    "log1p": "log1p-normalised values, taken back with expm1",
}


@dataclass(frozen=True, eq=False)
class Expression:
    """The matrix of an AnnData that ranks are taken from; made by ``find_expression``.

    Attributes:
        adata: the object it belongs to, not copied.
        source: "X", "layers['counts']" or "raw.X".
        kind: "counts" (integers), "normalised" (fractions) or "log1p" (logarithms of 1 + fractions).
        log_base: base of the logarithm where ``kind`` is "log1p".
    """

    adata: AnnData
    source: str
    kind: Kind
    log_base: float = float(np.e)

    def __str__(self) -> str:
        return f"{self.source} ({DESCRIPTIONS[self.kind]})"

    @property
    def var(self) -> DataFrame:
        """Annotation of the matrix' own genes; ``raw`` may have others than ``X``."""
        var: DataFrame = self.adata.raw.var if self.source == "raw.X" else self.adata.var
        return var

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, csr_matrix]]:
        """Yield ``(number of the first cell, csr float64 [cells, genes])``, contiguous rows, logarithms taken back.

        A backed matrix is read block by block and never held whole.

        Raises:
            InputError: a value is negative or not finite; the cell is named.
        """
        for start, block in _row_blocks(self.adata, self.source, rows):
            if block.nnz and not (np.isfinite(block.data).all() and block.data.min() >= 0):
                wrong = int(np.flatnonzero(~np.isfinite(block.data) | (block.data < 0))[0])
                cell = start + int(np.searchsorted(block.indptr, wrong, "right")) - 1
                raise InputError(
                    f"{self.source} holds {block.data[wrong]:g}, which is no amount of RNA.",
                    record=cell + 1,
                    name=str(self.adata.obs_names[cell]),
                    hint="Put raw counts in adata.layers['counts'].",
                )
            if self.kind == "log1p":
                block.data = np.expm1(block.data * np.log(self.log_base))
            yield start, block


def find_expression(adata: AnnData) -> Expression:
    """Return the matrix to rank genes by: counts before depth-normalised values before logarithms.

    Looked for in ``X``, ``layers["counts"]`` and ``raw``, in this order. Dividing a cell by its depth does not change
    the order of its genes, so log1p-normalised values serve once ``expm1`` has taken them back. What a matrix holds is
    told from a sample of its nonzero values.

    Raises:
        InputError: there is no cell, no gene, or no matrix without negative (scaled, corrected) values; or ``adata`` is
            a view of a backed object.
    """
    if not adata.n_obs or not adata.n_vars:
        raise InputError(f"The AnnData holds {adata.n_obs} cells and {adata.n_vars} genes; there is nothing to rank.")
    if adata.isbacked and adata.is_view:
        raise InputError("A part of a backed AnnData cannot be read in blocks.", hint="Call .to_memory() on it first.")
    found: list[Expression] = []
    refused: list[str] = []
    for source in SOURCES:
        matrix = _matrix(adata, source)
        if matrix is None:
            continue
        kind = _kind(_sample(matrix), named_counts="counts" in source)
        if kind is None:
            refused.append(source)
            continue
        base = (adata.uns.get("log1p") or {}).get("base") or np.e  # where scanpy notes the base of its logarithm
        found.append(Expression(adata, source, kind, float(base)))
    if not found:
        raise InputError(
            f"{' and '.join(refused) or 'The AnnData'} "
            + ("holds negative (scaled or corrected) values" if refused else "holds no matrix")
            + ", and there are no counts or log1p values beside them to rank genes by.",
            hint="Put the raw counts in adata.layers['counts'], or pass the object as it was before sc.pp.scale.",
        )
    order: list[Kind] = ["counts", "normalised", "log1p"]
    return min(found, key=lambda expression: order.index(expression.kind))


def whole_counts(block: csr_matrix) -> csr_matrix:
    """Turn depth-normalised cells back into counts, up to one factor per cell, where they are whole multiples.

    A normalised cell is its counts times one number, and its smallest value is nearly always a single count. So a cell
    gives exactly the same ranks, ties included, from counts and from their normalised or log1p values. Cells whose
    values are not whole multiples of the smallest stay as they are.
    """
    nonzero = block.copy()
    nonzero.eliminate_zeros()
    lengths = np.diff(nonzero.indptr)
    filled = lengths > 0
    if not filled.any():
        return nonzero
    starts = nonzero.indptr[:-1][filled]
    smallest = np.minimum.reduceat(nonzero.data, starts)
    multiples = nonzero.data / np.repeat(smallest, lengths[filled])
    nearest = np.rint(multiples)
    whole = np.maximum.reduceat(np.abs(multiples - nearest), starts) < WHOLE
    nonzero.data = np.where(np.repeat(whole, lengths[filled]), nearest, nonzero.data)
    return nonzero


def _matrix(adata: AnnData, source: str) -> Any:
    """The matrix in memory, or anndata's or h5py's handle of it on disk, or None."""
    if source == "X":
        return adata.X
    if source == "raw.X":
        return None if adata.raw is None else adata.raw.X
    return adata.layers.get("counts")


def _sample(matrix: Any) -> NDArray[np.float64]:
    values = matrix.group["data"] if hasattr(matrix, "group") else matrix.data if hasattr(matrix, "indptr") else matrix
    size = SAMPLE if len(values.shape) == 1 else max(1, SAMPLE // max(values.shape[1], 1))
    starts = np.unique(np.linspace(0, max(values.shape[0] - size, 0), 8).astype(int))
    pieces = [np.asarray(values[start : start + size], np.float64).ravel() for start in starts]
    sample: NDArray[np.float64] = np.concatenate(pieces)
    nonzero: NDArray[np.float64] = sample[sample != 0]
    return nonzero


def _kind(sample: NDArray[np.float64], *, named_counts: bool) -> Kind | None:
    finite = sample[np.isfinite(sample)]
    if (finite < 0).any():
        return None
    if (np.abs(finite - np.rint(finite)) <= 1e-6).all():
        return "counts"
    if named_counts or finite.max() > LARGEST_LOG1P:
        return "normalised"
    return "log1p"


def _row_blocks(adata: AnnData, source: str, rows: int) -> Iterator[tuple[int, csr_matrix]]:
    with needs("cells"):
        from scipy import sparse

    matrix = _matrix(adata, source)
    if getattr(matrix, "format", "") == "csc":
        if hasattr(matrix, "group"):
            yield from _transposed_blocks(matrix.group, matrix.shape, rows)
            return
        matrix = matrix.tocsr()  # in one pass; taking rows of columns would pass over everything for each block
    for start in range(0, adata.n_obs, rows):
        yield start, sparse.csr_matrix(matrix[start : start + rows], dtype=np.float64, copy=True)


def _transposed_blocks(group: Any, shape: tuple[int, int], rows: int) -> Iterator[tuple[int, csr_matrix]]:
    """Rows of a csc matrix on disk: as many cells per pass over the file as fit in ``NONZEROS_HELD``."""
    from scipy import sparse

    cells, genes = shape
    values, indices, indptr = group["data"], group["indices"], group["indptr"][:]
    nonzeros = len(values)
    per_pass = max(rows, int(cells * min(1.0, NONZEROS_HELD / max(nonzeros, 1))))
    step = max(NONZEROS_HELD // 4, 1)
    for first in range(0, cells, per_pass):
        held = sparse.csr_matrix((min(per_pass, cells - first), genes), dtype=np.float64)
        for low in range(0, nonzeros, step):
            high = min(low + step, nonzeros)
            row = indices[low:high] - first
            keep = (row >= 0) & (row < held.shape[0])
            column = np.searchsorted(indptr, np.arange(low, high), "right") - 1
            entries = (values[low:high][keep].astype(np.float64), (row[keep], column[keep]))
            held = held + sparse.csr_matrix(entries, shape=held.shape)
        for start in range(0, held.shape[0], rows):
            yield first + start, held[start : start + rows]

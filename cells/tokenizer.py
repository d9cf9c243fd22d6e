"""Rank-value tokens: a cell is the list of its genes, the one most above its usual level first.

Theodoris et al. 2023 (Geneformer): a gene's value divided by its nonzero median over many cells, in falling order.
Dividing a cell by its depth changes no order, so depth is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Vocabulary
from .vocabulary import GeneMatch, GeneVocabulary

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
else:
    csr_matrix = Any

ROLES = {"pad": "<pad>", "mask": "<mask>", "bos": "<cls>", "eos": "<eos>"}
LOW = np.uint64(0xFFFFFFFF)


class RankTokenizer:
    """Cells to genes in falling order of value / median, between ``<cls>`` and ``<eos>`` where the vocabulary has them.

    Values over medians are compared in float32; equal ones go by token id, so a cell has one encoding whatever the
    order of the matrix' columns. A gene without a count is never a token.

    Attributes:
        genes: the gene vocabulary, medians included.
        vocabulary: its tokens and their roles.
        max_genes: genes kept of each cell, the first ones; None keeps all.
    """

    name: ClassVar[str] = "cells-rank"
    domain: ClassVar[str] = "cells"

    def __init__(self, genes: GeneVocabulary, *, max_genes: int | None = None) -> None:
        """Make a tokenizer.

        Raises:
            ConfigError: ``max_genes`` is below 1.
        """
        if max_genes is not None and max_genes < 1:
            raise ConfigError(f"max_genes is {max_genes}; a cell needs at least one gene (None keeps all).")
        self.genes = genes
        self.max_genes = max_genes
        specials = tuple(t for t, median in zip(genes.tokens, genes.medians, strict=True) if np.isnan(median))
        roles = {role: token for role, token in ROLES.items() if token in specials}
        self.vocabulary = Vocabulary(genes.tokens, roles, specials)
        self._before = np.array([i for i in [self.vocabulary.role("bos")] if i is not None], np.int32)
        self._after = np.array([i for i in [self.vocabulary.role("eos")] if i is not None], np.int32)

    @classmethod
    def from_table(
        cls, path: str | Path, *, most_tokens: int | None = None, added: Sequence[str] = ()
    ) -> RankTokenizer:
        """Read a table of genes, such as Geneformer's; see ``GeneVocabulary.from_table``.

        Args:
            path: the table.
            most_tokens: of a cell, begin and end included; None keeps all.
            added: special tokens behind those of the table.

        Raises:
            InputError: the table cannot be read.
            ConfigError: ``most_tokens`` leaves no room for a gene.
        """
        genes = GeneVocabulary.from_table(path).with_specials(added)
        frame = sum(ROLES[role] in genes.tokens for role in ("bos", "eos"))
        return cls(genes, max_genes=None if most_tokens is None else most_tokens - frame)

    def encode(self, record: Any) -> NDArray[np.int32]:
        """Token ids of one cell.

        Args:
            record: a mapping of gene name to value; a pair (gene token ids, values); the genes already in order as one
                string ("LYZ CD74 CST3"), the inverse of ``decode``; or an integer array of token ids, such as
                ``tokenize`` gives, which is returned as it is.

        Raises:
            InputError: a gene is unknown (its position is told), a value is negative or not finite, no gene is left.
        """
        if isinstance(record, np.ndarray) and record.ndim == 1 and np.issubdtype(record.dtype, np.integer):
            if len(record) and not 0 <= int(record.min()) <= int(record.max()) < len(self.vocabulary):
                raise InputError(f"A cell holds a token id outside 0..{len(self.vocabulary) - 1}.")
            return record.astype(np.int32, copy=False)
        if isinstance(record, str):
            names = record.split()
            ids = self._known(names)
            if len(np.unique(ids)) < len(ids):
                twice = next(i for i, gene in enumerate(ids) if gene in ids[:i])
                raise InputError(f"{names[twice]} stands twice in the cell.", position=twice + 1)
            return self._framed(ids.astype(np.int32)[: self.max_genes])
        if isinstance(record, Mapping):
            ids, values = self._known(list(record)), np.array(list(record.values()), np.float64)
        elif isinstance(record, tuple) and len(record) == 2:
            ids, values = np.asarray(record[0], np.int64), np.asarray(record[1], np.float64)
            self._check_genes(ids, values)
        else:
            raise InputError(
                f"A cell is a mapping of genes to values or a pair (token ids, values), not {type(record).__name__}.",
                hint="For an AnnData use cells.tokenize.",
            )
        bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
        if len(bad):
            raise InputError(f"A gene's value is {values[bad[0]]:g}, which is no amount.", position=int(bad[0]) + 1)
        unique, where = np.unique(ids, return_inverse=True)
        summed: NDArray[np.float64] = np.bincount(where, values, minlength=len(unique)).astype(np.float64)
        keys = self._keys(unique[summed > 0], summed[summed > 0])
        keys.sort()
        return self._framed((keys & LOW).astype(np.int32)[: self.max_genes])

    def encode_block(self, block: csr_matrix, match: GeneMatch) -> list[NDArray[np.int32]]:
        """Token ids of each row of a csr block [cells, genes]; a cell without a known gene gives an empty array."""
        ids = match.ids
        if len(np.unique(ids[ids >= 0])) < match.matched:
            block, ids = match.sum_duplicates(block, len(self.vocabulary)), np.arange(len(self.vocabulary))
        tokens = ids[block.indices]
        keep = (tokens >= 0) & (block.data > 0)
        ends = np.concatenate([[0], np.cumsum(keep)])[block.indptr]
        keys = self._keys(tokens[keep], block.data[keep])
        for start, end in pairwise(ends):
            keys[start:end].sort()
        ranked = (keys & LOW).astype(np.int32)
        most = len(ranked) if self.max_genes is None else self.max_genes
        return [self._framed(ranked[start : min(end, start + most)], empty=True) for start, end in pairwise(ends)]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Gene names in order, joined by blanks, special tokens left out."""
        special = self.vocabulary.special_ids
        return " ".join(self.vocabulary.decode(int(i) for i in ids if int(i) not in special))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the vocabulary and its medians included."""
        return {"genes": self.genes.to_dict(), "max_genes": self.max_genes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RankTokenizer:
        """Inverse of ``to_dict``."""
        return cls(GeneVocabulary.from_dict(data["genes"]), max_genes=data["max_genes"])

    def _keys(self, ids: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.uint64]:
        """One sortable integer per gene: falling value / median above, token id below.

        Positive floats sort as their bits do, so the inverted bits sort the other way round, and one sort of plain
        integers ranks the genes with ties in token order.
        """
        with np.errstate(over="ignore"):
            ratio = (values / self.genes.medians[ids]).astype(np.float32)
        keys: NDArray[np.uint64] = (~ratio.view(np.uint32)).astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
        return keys

    def _framed(self, ranked: NDArray[np.int32], *, empty: bool = False) -> NDArray[np.int32]:
        if not len(ranked):
            if empty:
                return ranked
            raise InputError("The cell has no gene of the vocabulary with a count.")
        return np.concatenate([self._before, ranked, self._after])

    def _known(self, names: list[str]) -> NDArray[np.int64]:
        ids = self.genes.find(names)
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            raise InputError(
                f"{names[unknown[0]]!r} is no gene of the vocabulary.",
                position=int(unknown[0]) + 1,
                hint=f"Leave out this and {len(unknown) - 1} more of {len(names)} genes." if len(unknown) > 1 else None,
            )
        return ids

    def _check_genes(self, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        if ids.shape != values.shape or ids.ndim != 1:
            raise InputError(f"A cell came with {ids.size} token ids and {values.size} values.")
        inside = (ids >= 0) & (ids < len(self.vocabulary))
        bad = np.flatnonzero(~inside | np.isnan(self.genes.medians[np.where(inside, ids, 0)]))
        if len(bad):
            raise InputError(f"Token id {ids[bad[0]]} is no gene.", position=int(bad[0]) + 1)

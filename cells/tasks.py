"""The verbs of single cells: tokenize, embed, score."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import inference
from ..errors import ConfigError, InputError
from ..sequences import Encoded, Unusable
from .matrix import Expression, find_expression, whole_counts
from .readers import read
from .tokenizer import RankTokenizer
from .vocabulary import GeneMatch, GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from ..models import LanguageModel
else:
    AnnData = LanguageModel = csr_matrix = Any

logger = logging.getLogger(__name__)

STEP_CELLS = 256  # embedded between two steps of the progress bar
FEW_GENES = 0.5  # of the smaller gene set; a smaller share is warned of


def make_tokenizer(settings: Mapping[str, Any], adata: AnnData) -> RankTokenizer:
    """Make the tokenizer of a recipe's ``[tokenizer]`` table.

    Args:
        settings: ``gene_table`` (a file, see ``GeneVocabulary.from_table``; without it the genes and medians of
            ``adata`` are taken), ``min_cells`` (genes of fewer cells are left out; only without a table), and
            ``max_genes`` (genes kept of each cell); ``name`` must be "cells-rank" where it stands.
        adata: the training cells.

    Raises:
        ConfigError: a setting is unknown.
    """
    known = {"name", "gene_table", "min_cells", "max_genes"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"Unknown tokenizer setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    if settings.get("name", RankTokenizer.name) != RankTokenizer.name:
        raise ConfigError(f"Cells are tokenized by {RankTokenizer.name!r}, not {settings['name']!r}.")
    if "gene_table" in settings and "min_cells" in settings:
        raise ConfigError("min_cells is for genes counted in the data; a gene_table names its own.")
    genes = (
        GeneVocabulary.from_table(settings["gene_table"])
        if "gene_table" in settings
        else GeneVocabulary.from_adata(adata, min_cells=settings.get("min_cells", 1))
    )
    return RankTokenizer(genes, max_genes=settings.get("max_genes"))


def tokenize(adata: AnnData, tokenizer: RankTokenizer) -> list[NDArray[np.int32]]:
    """Token ids of every cell, in order; an empty array, and one warning, for cells without a known gene.

    Raises:
        InputError: no matrix can be used, nearly no gene is known, or no cell has any.
    """
    expression, match = _find(adata, tokenizer)
    cells = [cell for block in _token_blocks(expression, match, tokenizer) for cell in block]
    _report(adata, [len(cell) > 0 for cell in cells])
    return cells


@dataclass(frozen=True)
class CellChunk:
    """Some cells of a matrix, csr [cells, genes]."""

    counts: csr_matrix
    whole: bool  # whether they are counts, or values to be taken back to counts
    match: GeneMatch
    names: tuple[str, ...]

    def encode(self, tokenizer: RankTokenizer) -> Encoded:
        """Token ids of the cells; one without a known gene is unusable."""
        cells = tokenizer.encode_block(self.counts if self.whole else whole_counts(self.counts), self.match)
        reason = "The cell has no known gene with a count."
        empty = (Unusable(i + 1, self.names[i], reason) for i, cell in enumerate(cells) if not len(cell))
        lengths = np.array([len(cell) for cell in cells if len(cell)], np.int64)
        return Encoded(np.concatenate(cells), lengths, len(cells), len(cells), tuple(empty))


def chunks(path: str | Path, tokenizer: RankTokenizer) -> Iterator[CellChunk]:
    """Yield the cells of an ``.h5ad`` file in blocks; its matrix stays on disk.

    Raises:
        InputError: as ``read``; no matrix can be used, or nearly no gene is known.
    """
    adata = read(path, backed=True)
    expression, match = _find(adata, tokenizer)
    for start, block in expression.blocks():
        names = tuple(adata.obs_names[start : start + block.shape[0]])
        yield CellChunk(block, expression.kind == "counts", match, names)


def embed(
    adata: AnnData,
    model: LanguageModel,
    *,
    layer: int = -1,
    pooling: Literal["mean", "last"] = "mean",
    key_added: str | None = None,
    copy: bool = False,
    progress: bool = False,
) -> AnnData | None:
    """Embed every cell.

    Sets ``adata.obsm["X_<model>"]`` (float32, cells x width; NaN rows for cells without a known gene) and
    ``adata.uns["<model>"]["params"]``, where <model> is the model's name; nothing else of ``adata`` is touched.
    A backed object is read in blocks.

    Args:
        adata: cells with counts or log1p-normalised values in ``X``, ``layers["counts"]`` or ``raw``.
        model: a model with a rank tokenizer.
        layer: hidden layer, counted as Python does; -1 is the last.
        pooling: mean over the genes, or the last token.
        key_added: keys of ``obsm`` and ``uns``, exactly, in place of ``X_<model>`` and ``<model>``.
        copy: return a copy with the embedding and leave ``adata`` as it is.
        progress: show a bar.

    Raises:
        InputError: no matrix can be used, nearly no gene is known, or no cell has any.
        ConfigError: the model is not for cells, or an option cannot be used.

    >>> cells.embed(adata, pv.load("runs/cells"))
    >>> sc.pp.neighbors(adata, use_rep="X_cells")
    """
    if pooling not in ("mean", "last"):
        raise ConfigError(f"A cell has one embedding; pooling {pooling!r} is not one of 'mean' and 'last'.")
    if adata.isbacked and copy:
        raise ConfigError(
            "copy=True would read the whole backed AnnData. Call .to_memory() on it first, or embed in place."
        )
    tokenizer = _rank_tokenizer(model)
    expression, match = _find(adata, tokenizer)
    rows = np.full((adata.n_obs, model.width), np.nan, np.float32)
    usable: list[bool] = []
    for block in _progress(_token_blocks(expression, match, tokenizer), adata.n_obs, "embed", progress):
        records = [cell if len(cell) else None for cell in block]
        rows[len(usable) : len(usable) + len(block)] = inference.embed(model, records, layer=layer, pooling=pooling)
        usable += [record is not None for record in records]
    _report(adata, usable)
    result = adata.copy() if copy else adata
    result.obsm[key_added or f"X_{model.name}"] = rows
    params = {
        "model": model.name,
        "layer": layer,
        "pooling": pooling,
        "expression": expression.source,
        "values": expression.kind,
        "genes": len(match.ids),
        "genes_matched": match.matched,
    }
    result.uns[key_added or model.name] = {"params": params}
    return result if copy else None


def score(adata: AnnData, model: LanguageModel, *, progress: bool = False) -> NDArray[np.float64]:
    """Log-likelihood in nats of every cell's ranking of its genes under a causal model, [cells]; NaN as in ``embed``.

    Raises:
        ConfigError: the model is masked. Its pseudo-likelihood would take a pass per gene of every cell and is no
            likelihood of a ranking: a masked gene is nearly given by the genes around it.
    """
    tokenizer = _rank_tokenizer(model)
    if not model.causal:
        raise ConfigError(
            f"{model.name} is a masked model, which gives a cell no likelihood. Use embed, or a causal model."
        )
    expression, match = _find(adata, tokenizer)
    scores = np.full(adata.n_obs, np.nan)
    usable: list[bool] = []
    for block in _progress(_token_blocks(expression, match, tokenizer), adata.n_obs, "score", progress):
        records = [cell if len(cell) else None for cell in block]
        scores[len(usable) : len(usable) + len(block)] = inference.log_likelihood(model, records)
        usable += [record is not None for record in records]
    _report(adata, usable)
    return scores


def _rank_tokenizer(model: LanguageModel) -> RankTokenizer:
    if not isinstance(model.tokenizer, RankTokenizer):
        raise ConfigError(f"{model.name} reads {model.tokenizer.domain} ({model.tokenizer.name}), not cells.")
    return model.tokenizer


def _find(adata: AnnData, tokenizer: RankTokenizer) -> tuple[Expression, GeneMatch]:
    """Find the matrix and its genes, and say which: a warning where a user should look at it, else the log."""
    expression = find_expression(adata)
    match = tokenizer.genes.match(expression.var)
    said = f"Genes are ranked by {expression}; {match}."
    if expression.kind != "counts" or match.matched < FEW_GENES * min(len(match.ids), match.known):
        warnings.warn(said, stacklevel=3)
    else:
        logger.info(said)
    return expression, match


def _token_blocks(
    expression: Expression, match: GeneMatch, tokenizer: RankTokenizer
) -> Iterator[list[NDArray[np.int32]]]:
    for _, block in expression.blocks():
        counts = block if expression.kind == "counts" else whole_counts(block)
        yield tokenizer.encode_block(counts, match)


def _progress(
    blocks: Iterator[list[NDArray[np.int32]]], cells: int, verb: str, show: bool
) -> Iterator[list[NDArray[np.int32]]]:
    """Blocks of at most ``STEP_CELLS`` cells, with a bar over the cells."""
    with tqdm(total=cells, desc=verb, unit="cell", disable=not show) as bar:
        for block in blocks:
            for start in range(0, len(block), STEP_CELLS):
                yield block[start : start + STEP_CELLS]
                bar.update(len(block[start : start + STEP_CELLS]))


def _report(adata: AnnData, usable: list[bool]) -> None:
    """Warn once of the cells without a known gene, by name and number."""
    bad = np.flatnonzero(~np.array(usable))
    if len(bad) == len(usable):
        raise InputError("No cell has a known gene with a count.")
    if len(bad):
        cells = ", ".join(f"{adata.obs_names[i]} (row {i + 1})" for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
        warnings.warn(
            f"{len(bad)} of {len(usable)} cells have no known gene with a count and cannot be used: {cells}.",
            stacklevel=3,
        )

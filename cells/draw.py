"""Pictures of cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, needs
from ..sequences import replacing

if TYPE_CHECKING:
    from anndata import AnnData
else:
    AnnData = Any


def draw_umap(
    adata: AnnData, path: str | Path, *, use_rep: str, color: str | None = None, neighbors: int = 15, seed: int = 0
) -> NDArray[np.float32]:
    """Draw the UMAP of ``adata.obsm[use_rep]``, coloured by a column of ``obs``, to a picture file.

    The same as ``sc.pp.neighbors(adata, use_rep=...)``, ``sc.tl.umap(adata)`` and ``sc.pl.umap(adata, color=...)``,
    without writing into ``adata`` and without a screen.

    Args:
        adata: cells with an embedding.
        path: the picture; its suffix (.png, .pdf, .svg) tells the format.
        use_rep: key of ``obsm``, such as "X_cells". Cells with NaN rows are left out.
        color: column of ``obs``, a label or a number.
        neighbors: neighbours per cell.
        seed: of the layout.

    Returns:
        The coordinates, float32 [cells, 2], NaN where there is no embedding.

    Raises:
        InputError: ``use_rep`` or ``color`` is not there, or fewer than three cells have an embedding.
        OutputError: the picture cannot be written.
    """
    with needs("cells"):
        import anndata
        import scanpy as sc
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    if use_rep not in adata.obsm:
        raise InputError(
            f"adata.obsm has no {use_rep!r}; it has {', '.join(adata.obsm) or 'nothing'}.",
            hint="Run cells.embed(adata, model) first.",
        )
    if color is not None and color not in adata.obs:
        raise InputError(f"adata.obs has no {color!r}; it has {', '.join(map(str, adata.obs)) or 'nothing'}.")
    embedding = np.asarray(adata.obsm[use_rep], dtype=np.float32)
    placed = np.isfinite(embedding).all(1)
    if placed.sum() < 3:
        raise InputError(f"{int(placed.sum())} cells have an embedding in {use_rep!r}; a map needs three.")
    plain = anndata.AnnData(
        obs=adata.obs.loc[placed, [color] if color else []].copy(), obsm={use_rep: embedding[placed]}
    )
    if color is not None and f"{color}_colors" in adata.uns:
        plain.uns[f"{color}_colors"] = list(adata.uns[f"{color}_colors"])
    sc.pp.neighbors(plain, use_rep=use_rep, n_neighbors=min(neighbors, int(placed.sum()) - 1), random_state=seed)
    sc.tl.umap(plain, random_state=seed)
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    sc.pl.umap(plain, color=color, ax=figure.subplots(), show=False, title=color or use_rep)
    with replacing(path) as new:
        figure.savefig(new, dpi=150)
    coordinates = np.full((len(embedding), 2), np.nan, np.float32)
    coordinates[placed] = plain.obsm["X_umap"]
    return coordinates

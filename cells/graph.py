"""Cells to graphs: the neighbours that scanpy finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import ConfigError, InputError, needs

if TYPE_CHECKING:
    from anndata import AnnData
    from torch_geometric.data import Data
else:
    AnnData = Data = object

SCANPY_PCA_FROM = 50  # genes beyond which scanpy seeks neighbours among principal components, told no representation


def neighbor_graph(
    adata: AnnData, *, n_neighbors: int | None = None, use_rep: str | None = None, key: str = "neighbors", seed: int = 0
) -> Data:
    """Return the k-nearest-neighbour graph of the cells; ``adata`` is left as it is.

    Without ``n_neighbors`` and ``use_rep`` it is the graph that ``scanpy.pp.neighbors`` left in ``adata.uns[key]``.
    When there is none, or one of the two is given, scanpy computes it (15 neighbours and scanpy's choice of
    representation, where not given), the cell itself counted as its first neighbour, as scanpy does.

    The graph has ``edge_index`` int64 [2, edges] in both directions, ``edge_weight`` float32 [edges] (scanpy's
    connectivities, 0 to 1), ``num_nodes`` cells in the order of ``adata``, and ``x`` float32 [cells, width]: the
    representation that neighbours were sought in, where ``adata.obsm`` or the computation names one, else absent.

    >>> graph = cells.neighbor_graph(adata, n_neighbors=15, use_rep="X_cells")

    Raises:
        ConfigError: ``n_neighbors`` cannot work, or ``use_rep`` is not in ``adata.obsm``.
        InputError: ``adata`` has fewer than two cells, or its stored neighbours are incomplete.
    """
    with needs("graphs"):
        from torch_geometric.data import Data

    if adata.n_obs < 2:
        raise InputError(f"The AnnData has {adata.n_obs} cells; a neighbour graph needs two or more.")
    if use_rep is not None and use_rep != "X" and use_rep not in adata.obsm:
        raise ConfigError(f"There is no obsm[{use_rep!r}]; there are {', '.join(adata.obsm) or 'none'}.")
    if n_neighbors is not None and not 2 <= n_neighbors <= adata.n_obs:
        raise ConfigError(f"n_neighbors is {n_neighbors}; for {adata.n_obs} cells it is 2 to {adata.n_obs}.")
    if n_neighbors is not None or use_rep is not None or key not in adata.uns:
        adata = _with_neighbors(adata, n_neighbors or min(15, adata.n_obs), use_rep, seed, key)
    stored = adata.uns[key]
    name = stored.get("connectivities_key", "connectivities")
    if name not in adata.obsp:
        raise InputError(f"uns[{key!r}] names neighbours, but obsp[{name!r}] is absent.", hint="Run sc.pp.neighbors.")
    weights = adata.obsp[name].tocoo()
    order = np.lexsort((weights.row, weights.col))
    edges = np.stack([weights.row[order], weights.col[order]]).astype(np.int64)
    graph = Data(
        edge_index=torch.from_numpy(edges),
        edge_weight=torch.from_numpy(weights.data[order].astype(np.float32)),
        num_nodes=adata.n_obs,
    )
    params = stored.get("params", {})
    rep = params.get("use_rep", "X_pca" if adata.n_vars > SCANPY_PCA_FROM else "X")
    if rep in adata.obsm:
        values = np.asarray(adata.obsm[rep], dtype=np.float32)[:, : params.get("n_pcs")]
        graph.x = torch.from_numpy(np.ascontiguousarray(values))
    return graph


def _with_neighbors(adata: AnnData, n_neighbors: int, use_rep: str | None, seed: int, key: str) -> AnnData:
    """Neighbours on a second AnnData that shares the values and owns nothing of the first one's annotation."""
    with needs("cells"):
        import anndata
        import scanpy

    light = anndata.AnnData(X=adata.X, obs=adata.obs[[]], var=adata.var, obsm=dict(adata.obsm))
    scanpy.pp.neighbors(light, n_neighbors=n_neighbors, use_rep=use_rep, random_state=seed, key_added=key)
    return light

import warnings

import numpy as np
import pytest
import scanpy
import torch
from processive.cells.graph import neighbor_graph
from processive.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def adata():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scanpy.datasets.pbmc68k_reduced()


def keys(adata):
    return {name: sorted(getattr(adata, name)) for name in ("obs", "var", "uns", "obsm", "varm", "obsp", "layers")}


def test_stored_neighbors_are_taken(adata):
    graph = neighbor_graph(adata)
    matrix = adata.obsp["connectivities"]
    assert graph.num_nodes == adata.n_obs
    assert graph.edge_index.shape == (2, matrix.nnz)
    source, target = graph.edge_index.numpy()
    np.testing.assert_allclose(graph.edge_weight, np.asarray(matrix[target, source]).ravel(), rtol=1e-6)
    assert torch.equal(graph.x, torch.from_numpy(adata.obsm["X_pca"].astype(np.float32)))
    assert not graph.has_self_loops()
    dense = torch.zeros(matrix.shape)
    dense[source, target] = graph.edge_weight
    assert torch.equal(dense, dense.T)


def test_computed_on_a_copy(adata):
    before, values = keys(adata), adata.X.copy()
    stored = adata.obsp["connectivities"].copy()
    graph = neighbor_graph(adata, n_neighbors=5, use_rep="X_umap")
    assert keys(adata) == before
    assert np.array_equal(adata.X, values)
    assert (adata.obsp["connectivities"] != stored).nnz == 0
    assert graph.x.shape == (700, 2)
    assert 2 * 700 < graph.edge_index.shape[1] < 2 * 4 * 700  # four others each, made symmetric
    distance = (graph.x[graph.edge_index[0]] - graph.x[graph.edge_index[1]]).norm(dim=1)
    assert distance.mean() < 0.1 * torch.pdist(graph.x).mean()
    again = neighbor_graph(adata, n_neighbors=5, use_rep="X_umap")
    assert torch.equal(again.edge_index, graph.edge_index)


def test_computed_when_there_are_none(adata):
    bare = scanpy.AnnData(adata.X[:60].copy())
    graph = neighbor_graph(bare)
    assert graph.num_nodes == 60
    assert graph.x.shape == (60, 50)
    assert not bare.uns and not bare.obsm and not bare.obsp


def test_bad_input(adata):
    with pytest.raises(ConfigError, match="X_scvi"):
        neighbor_graph(adata, use_rep="X_scvi")
    with pytest.raises(ConfigError, match="n_neighbors is 1;"):
        neighbor_graph(adata, n_neighbors=1)
    with pytest.raises(InputError, match="1 cells"):
        neighbor_graph(adata[:1])
    broken = scanpy.AnnData(adata.X[:5].copy(), uns={"neighbors": {"params": {}}})
    with pytest.raises(InputError, match="connectivities"):
        neighbor_graph(broken)

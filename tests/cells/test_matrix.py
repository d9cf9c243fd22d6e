import anndata
import numpy as np
import pytest
from processive.cells import find_expression, matrix
from processive.errors import InputError
from scipy import sparse


def counts(rng, cells=30, genes=20):
    values = rng.poisson(1.5, size=(cells, genes)).astype(np.float32)
    values[:, 0] = 1  # so that no cell is empty, and a single count is each cell's smallest value
    return values


def log1p(values, depth=1e4):
    return np.log1p(values / values.sum(1, keepdims=True) * depth).astype(np.float32)


def dense(expression, **options):
    return np.concatenate([block.toarray() for _, block in expression.blocks(**options)])


FORMATS = {
    "dense": np.asarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
}


@pytest.mark.parametrize("form", FORMATS)
def test_counts_in_x(form, rng):
    values = counts(rng)
    expression = find_expression(anndata.AnnData(FORMATS[form](values)))
    assert (expression.source, expression.kind) == ("X", "counts")
    assert str(expression) == "X (counts)"
    np.testing.assert_array_equal(dense(expression, rows=7), values)


def test_counts_go_before_logarithms(rng):
    values = counts(rng)
    adata = anndata.AnnData(log1p(values))
    adata.layers["counts"] = sparse.csr_matrix(values)
    expression = find_expression(adata)
    assert (expression.source, expression.kind) == ("layers['counts']", "counts")
    np.testing.assert_array_equal(dense(expression), values)


def test_raw_has_its_own_genes(rng):
    values = counts(rng)
    full = anndata.AnnData(log1p(values))
    adata = full[:, :5].copy()
    adata.raw = full
    adata.X = adata.X - adata.X.mean(0)
    expression = find_expression(adata)
    assert (expression.source, expression.kind) == ("raw.X", "log1p")
    assert len(expression.var) == 20
    cp10k = values / values.sum(1, keepdims=True) * 1e4
    np.testing.assert_allclose(dense(expression), cp10k, rtol=1e-5)


def test_logarithm_of_another_base(rng):
    values = counts(rng)
    adata = anndata.AnnData((log1p(values) / np.log(2)).astype(np.float32))
    adata.uns["log1p"] = {"base": 2}
    expression = find_expression(adata)
    assert expression.kind == "log1p"
    np.testing.assert_allclose(dense(expression), values / values.sum(1, keepdims=True) * 1e4, rtol=1e-5)


def test_depth_normalised_without_logarithm(rng):
    values = counts(rng)
    normalised = values / values.sum(1, keepdims=True) * 1e4
    expression = find_expression(anndata.AnnData(normalised))
    assert expression.kind == "normalised"
    np.testing.assert_allclose(dense(expression), normalised)


def test_scaled_alone_is_refused(rng):
    adata = anndata.AnnData(rng.normal(size=(10, 4)))
    with pytest.raises(InputError, match=r"X holds negative .*layers\['counts'\]"):
        find_expression(adata)


def test_nothing_to_rank():
    with pytest.raises(InputError, match="0 cells"):
        find_expression(anndata.AnnData(np.zeros((0, 3))))
    with pytest.raises(InputError, match="no matrix"):
        find_expression(anndata.AnnData(shape=(2, 3)))


@pytest.mark.parametrize("wrong", [np.nan, -1.0, np.inf])
def test_impossible_value_names_the_cell(wrong, rng):
    values = counts(rng, cells=9000, genes=30)
    values[4321, 1] = wrong  # between the places that the sample looks at
    adata = anndata.AnnData(sparse.csr_matrix(values))
    adata.obs_names = [f"cell{i}" for i in range(9000)]
    with pytest.raises(InputError, match=r"record 4322 \(cell4321\)"):
        dense(find_expression(adata))


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
@pytest.mark.parametrize("place", ["X", "raw.X"])
def test_backed(form, place, rng, tmp_path, monkeypatch):
    values = counts(rng, cells=50)
    adata = anndata.AnnData(FORMATS[form](values))
    if place == "raw.X":
        adata.raw = adata
        adata.X = values - values.mean(0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    expression = find_expression(backed)
    assert expression.source == place
    np.testing.assert_array_equal(dense(expression, rows=8), values)
    monkeypatch.setattr(matrix, "NONZEROS_HELD", 64)  # several passes, several pieces in each
    np.testing.assert_array_equal(dense(expression, rows=8), values)
    with pytest.raises(InputError, match="to_memory"):
        find_expression(backed[10:40])


def test_a_backed_matrix_is_never_read_whole(rng, tmp_path, monkeypatch):
    anndata.AnnData(sparse.csr_matrix(counts(rng, cells=500))).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    rows = [block.shape[0] for _, block in find_expression(backed).blocks(rows=100)]
    assert rows == [100] * 5
    assert backed.isbacked


def test_blocks_leave_the_object_alone(rng):
    values = sparse.csr_matrix(log1p(counts(rng)))
    adata = anndata.AnnData(values.copy())
    dense(find_expression(adata))
    assert abs(adata.X - values).sum() == 0


def test_whole_counts_brings_back_counts_and_leaves_the_rest(rng):
    values = counts(rng)
    normalised = sparse.csr_matrix(np.expm1(log1p(values).astype(np.float64)))
    np.testing.assert_array_equal(matrix.whole_counts(normalised).toarray(), values)
    fractions = sparse.csr_matrix(np.array([[1.0, 1.5, 0.0, 2.3], [0.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(matrix.whole_counts(fractions).toarray(), fractions.toarray())
    nothing = sparse.csr_matrix((3, 4))
    assert matrix.whole_counts(nothing).nnz == 0

import os
import subprocess
import sys
import warnings

import anndata
import numpy as np
import pytest
import scanpy as sc
from jaxtyping import TypeCheckError
from processive import cells
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.cells import GeneVocabulary, RankTokenizer
from processive.errors import ConfigError, InputError, OutputError
from processive.models import LanguageModel
from scipy import sparse

pytestmark = pytest.mark.filterwarnings("ignore:Genes are ranked by")


@pytest.fixture(scope="module")
def pbmc():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.datasets.pbmc68k_reduced()


@pytest.fixture
def counts(rng):
    """40 cells x 25 genes with tied ratios, an empty cell, doubled medians."""
    values = rng.poisson(1.2, size=(40, 25)).astype(np.float32)
    values[:, 0] += values.sum(1) == 0
    values[7] = 0
    adata = anndata.AnnData(sparse.csr_matrix(values))
    adata.obs_names = [f"cell{i}" for i in range(40)]
    return adata


@pytest.fixture
def tokenizer(counts):
    names = ("<pad>", "<mask>", "<cls>", "<eos>", *counts.var_names)
    return RankTokenizer(GeneVocabulary(names, np.array([np.nan] * 4 + [1.0, 2.0, 0.5, 4.0, 1.7] * 5)))


def lists(adata, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [cell.tolist() for cell in cells.tokenize(adata, tokenizer)]


def small(tokenizer, causal=False, name="cells-tiny"):
    size = {"vocabulary_size": len(tokenizer.vocabulary), "width": 16, "depth": 1, "heads": 2}
    config = XLSTMConfig(**size) if causal else TransformerConfig(**size, direction="bidirectional")
    return LanguageModel(tokenizer, config, name=name)


def test_every_storage_gives_the_same_tokens(counts, tokenizer, tmp_path):
    expected = lists(counts, tokenizer)
    assert expected[7] == []
    assert all(len(cell) > 2 for i, cell in enumerate(expected) if i != 7)
    for form in (sparse.csc_matrix, sparse.csr_array, lambda matrix: matrix.toarray(), lambda m: m.astype(np.int64)):
        other = anndata.AnnData(form(counts.X), obs=counts.obs, var=counts.var)
        assert lists(other, tokenizer) == expected
        other.write_h5ad(tmp_path / "a.h5ad")
        assert lists(cells.read(tmp_path / "a.h5ad", backed=True), tokenizer) == expected
    assert lists(counts[5:20], tokenizer) == expected[5:20]


@pytest.mark.parametrize("target", [1e4, 1e6, 733.3])
def test_logarithms_give_the_same_tokens_as_counts(counts, tokenizer, target):
    expected = lists(counts, tokenizer)
    values = counts.X.toarray()
    normalised = (values / np.maximum(values.sum(1, keepdims=True), 1) * target).astype(np.float32)
    assert lists(anndata.AnnData(normalised), tokenizer) == expected
    assert lists(anndata.AnnData(np.log1p(normalised)), tokenizer) == expected


def test_duplicated_names_and_versions_are_summed(tokenizer):
    genes = GeneVocabulary(
        ("<pad>", "<mask>", "ENSG00000000003", "ENSG00000000005"), np.array([np.nan, np.nan, 1.0, 1.0])
    )
    adata = anndata.AnnData(np.array([[2.0, 3.0, 2.0], [0.0, 3.0, 2.0]], np.float32))
    adata.var_names = ["ENSG00000000003.14", "ENSG00000000005.2", "ENSG00000000003.9_PAR_Y"]
    assert lists(adata, RankTokenizer(genes)) == [[2, 3], [3, 2]]


def test_unusable_cells_are_named_and_keep_their_place(counts, tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 40 cells .* cell7 \(row 8\)"):
        tokens = cells.tokenize(counts, tokenizer)
    assert len(tokens) == 40
    with pytest.raises(InputError, match="No cell has a known gene"):
        cells.tokenize(counts[7:8], tokenizer)


def test_it_says_which_matrix(pbmc, counts, tokenizer, caplog):
    with pytest.warns(UserWarning, match=r"raw\.X \(log1p.*765 of 765 genes \(index\)"):
        cells.tokenize(pbmc, cells.make_tokenizer({}, pbmc))
    with caplog.at_level("INFO", "processive"), warnings.catch_warnings():
        warnings.simplefilter("error")
        cells.tokenize(counts[:5], tokenizer)
    assert "X (counts); 25 of 25 genes" in caplog.text


def test_a_small_overlap_is_warned_of(counts, tokenizer):
    other = counts[:5].copy()
    other.var_names = [*counts.var_names[:10], *(f"other{i}" for i in range(15))]
    with pytest.warns(UserWarning, match="10 of 25 genes"):
        cells.tokenize(other, tokenizer)


def test_unknown_genes_and_scaled_values(counts, tokenizer, tmp_path):
    other = counts.copy()
    other.var_names = [f"ENSMUSG{i:011d}" for i in range(25)]
    cells.write_h5ad(tmp_path / "mouse.h5ad", other)
    with pytest.raises(InputError, match=r"Only 0 of 25 genes .* ENSMUSG00000000000"):
        cells.tokenize(cells.read(tmp_path / "mouse.h5ad"), tokenizer)
    values = counts.X.toarray()
    scaled = anndata.AnnData((values - values.mean(0)) / values.std(0))
    cells.write_h5ad(tmp_path / "scaled.h5ad", scaled)
    with pytest.raises(InputError, match="negative"):
        cells.tokenize(cells.read(tmp_path / "scaled.h5ad"), tokenizer)


def test_make_tokenizer(pbmc, tmp_path):
    tokenizer = cells.make_tokenizer({"name": "cells-rank", "max_genes": 64, "min_cells": 10}, pbmc)
    assert tokenizer.max_genes == 64
    assert max(map(len, cells.tokenize(pbmc, tokenizer))) == 66
    (tmp_path / "genes.csv").write_text("symbol,median\nLYZ,3\nCD74,2.5\n")
    assert cells.make_tokenizer({"gene_table": tmp_path / "genes.csv"}, pbmc).genes.known == 2
    for settings, message in {
        "typo": ({"max_gene": 3}, "max_gene"),
        "other": ({"name": "smiles"}, "smiles"),
        "both": ({"gene_table": "x", "min_cells": 3}, "min_cells"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            cells.make_tokenizer(settings, pbmc)


def test_embed_writes_what_scanpy_reads_and_nothing_else(counts, tokenizer, monkeypatch):
    monkeypatch.setattr("processive.cells.tasks.STEP_CELLS", 16)
    model = small(tokenizer)
    before = counts.copy()
    with pytest.warns(UserWarning, match="cell7"):
        assert cells.embed(counts, model) is None
    rows = counts.obsm["X_cells-tiny"]
    assert rows.shape == (40, 16)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    assert np.isnan(rows).all(1).nonzero()[0].tolist() == [7]
    assert np.isfinite(np.delete(rows, 7, 0)).all()
    assert counts.uns["cells-tiny"]["params"] == {
        "model": "cells-tiny",
        "layer": -1,
        "pooling": "mean",
        "expression": "X",
        "values": "counts",
        "genes": 25,
        "genes_matched": 25,
    }
    assert (counts.X != before.X).nnz == 0
    assert list(counts.obsm) == ["X_cells-tiny"]
    assert list(counts.uns) == ["cells-tiny"]
    assert list(counts.obs) == list(counts.var) == list(counts.layers) == []

    with pytest.warns(UserWarning, match="cell7"):
        other = cells.embed(counts, model, key_added="mine", copy=True, layer=0, pooling="last")
    assert list(counts.obsm) == ["X_cells-tiny"]
    assert other.uns["mine"]["params"]["layer"] == 0
    assert not np.allclose(other.obsm["mine"][0], rows[0])


def test_an_embedding_does_not_depend_on_the_company(counts, tokenizer):
    model = small(tokenizer)
    alone = counts[3:4].copy()
    cells.embed(alone, model)
    few = counts[:7].copy()
    cells.embed(few, model)
    np.testing.assert_allclose(few.obsm["X_cells-tiny"][3], alone.obsm["X_cells-tiny"][0], atol=1e-5)


def test_embed_backed_then_write(counts, tokenizer, tmp_path):
    model = small(tokenizer)
    counts.write_h5ad(tmp_path / "a.h5ad")
    backed = cells.read(tmp_path / "a.h5ad", backed=True)
    with pytest.raises(ConfigError, match="to_memory"):
        cells.embed(backed, model, copy=True)
    with pytest.raises(InputError, match="to_memory"):
        cells.embed(backed[:3], model)
    with pytest.warns(UserWarning, match="cell7"):
        cells.embed(backed, model)
        cells.embed(counts, model)
    cells.write_h5ad(tmp_path / "b.h5ad", backed)
    again = cells.read(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(again.obsm["X_cells-tiny"], counts.obsm["X_cells-tiny"])
    assert again.uns["cells-tiny"]["params"]["expression"] == "X"


def test_embed_refuses(counts, tokenizer):
    with pytest.raises((ConfigError, TypeCheckError)):  # the annotation checker, on in tests, may speak first
        cells.embed(counts, small(tokenizer), pooling="tokens")
    with pytest.raises(ConfigError, match="layer 5"):
        cells.embed(counts, small(tokenizer), layer=5)

    class Other:
        name, tokenizer = "chem", type("Smiles", (), {"domain": "chem", "name": "smiles"})()

    with pytest.raises(ConfigError, match="chem reads chem"):
        cells.embed(counts, Other())


def test_score(counts, tokenizer):
    with pytest.raises(ConfigError, match="masked"):
        cells.score(counts, small(tokenizer))
    with pytest.warns(UserWarning, match="cell7"):
        scores = cells.score(counts, small(tokenizer, causal=True))
    assert scores.shape == (40,)
    assert np.isnan(scores).nonzero()[0].tolist() == [7]
    assert (np.delete(scores, 7) < 0).all()


@pytest.mark.slow  # UMAP is compiled at its first call
def test_umap(pbmc, tmp_path):
    adata = pbmc[:80].copy()
    embedding = adata.obsm["X_pca"][:, :10].astype(np.float32)
    embedding[5] = np.nan
    adata.obsm["X_some"] = embedding
    keys = [list(adata.obsm), list(adata.uns), list(adata.obsp)]
    place = cells.draw_umap(adata, tmp_path / "map.png", use_rep="X_some", color="bulk_labels")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert place.shape == (80, 2)
    assert np.isnan(place).all(1).nonzero()[0].tolist() == [5]
    assert keys == [list(adata.obsm), list(adata.uns), list(adata.obsp)]
    for options, message in (
        ({"use_rep": "X_none"}, "no 'X_none'; it has X_pca"),
        ({"use_rep": "X_some", "color": "age"}, "no 'age'; it has bulk_labels"),
    ):
        with pytest.raises(InputError, match=message):
            cells.draw_umap(adata, tmp_path / "map.png", **options)
    adata.obsm["X_some"] = np.full((80, 3), np.nan, np.float32)
    with pytest.raises(InputError, match="0 cells have an embedding"):
        cells.draw_umap(adata, tmp_path / "map.png", use_rep="X_some")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        cells.draw_umap(pbmc[:30], tmp_path / "file" / "map.png", use_rep="X_pca")


def test_import_needs_no_optional_package():
    program = (
        "import sys\n"
        "for name in ('scanpy', 'anndata', 'scipy', 'pandas', 'h5py', 'matplotlib'): sys.modules[name] = None\n"
        "from processive import cells\n"
        "from processive.errors import MissingExtra\n"
        "import numpy as np\n"
        "t = cells.RankTokenizer(cells.GeneVocabulary(('<cls>', 'LYZ', 'CD74'), np.array([np.nan, 1., 2.])))\n"
        "assert t.encode({'CD74': 3, 'LYZ': 1}).tolist() == [0, 2, 1]\n"
        "try: cells.read('a.h5ad')\n"
        "except MissingExtra as error: assert 'processive[cells]' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.shared_data
@pytest.mark.parametrize("table", ["gc30M", "gc104M"])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("pbmc68k_reduced", "raw.X"),
        ("symphony_pbmc_3tech_1200", "layers['counts']"),
        ("celltypist_sample_pbmc_559", "X"),
    ],
)
def test_real_files_with_geneformers_genes(shared, name, source, table):
    adata = cells.read(shared / "cells" / f"{name}.h5ad")
    genes = GeneVocabulary.from_table(shared / "cells" / f"geneformer_{table}_tokens_medians.tsv.gz")
    tokenizer = RankTokenizer(genes, max_genes=2048)
    assert cells.find_expression(adata).source == source
    tokens = cells.tokenize(adata, tokenizer)
    assert len(tokens) == adata.n_obs
    assert 100 < np.mean([len(cell) for cell in tokens]) <= 2050
    for cell in tokens[:20]:
        assert len(np.unique(cell)) == len(cell)
        assert tokenizer.encode(tokenizer.decode(cell)).tolist() == cell.tolist()


@pytest.mark.shared_data
def test_real_logarithms_and_counts_give_one_order(shared):
    adata = cells.read(shared / "cells" / "symphony_pbmc_3tech_1200.h5ad")
    tokenizer = RankTokenizer(GeneVocabulary.from_table(shared / "cells" / "geneformer_gc104M_tokens_medians.tsv.gz"))
    from_counts = lists(adata, tokenizer)
    del adata.layers["counts"]
    assert cells.find_expression(adata).kind == "log1p"
    assert lists(adata, tokenizer) == from_counts

import gzip

import anndata
import numpy as np
import pytest
from processive.cells import GeneVocabulary, find_expression, vocabulary
from processive.errors import ConfigError, InputError
from scipy import sparse

TABLE = """ensembl_id\ttoken\tmedian\tsymbol
<pad>\t0\t\t
<mask>\t1\t\t
ENSG00000000005.6\t3\t2.0\tTNMD
ENSG00000000003\t2\t4.0\tTSPAN6
"""


def write(tmp_path, text, name="genes.tsv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def adata(values, names, **columns):
    result = anndata.AnnData(np.asarray(values, dtype=np.float32))
    result.var_names = names
    for column, content in columns.items():
        result.var[column] = content
    return result


@pytest.mark.parametrize("name", ["genes.tsv", "genes.tsv.gz"])
def test_table_keeps_its_token_ids(tmp_path, name):
    genes = GeneVocabulary.from_table(write(tmp_path, TABLE, name))
    assert genes.tokens == ("<pad>", "<mask>", "ENSG00000000003", "ENSG00000000005")
    np.testing.assert_array_equal(genes.medians, [np.nan, np.nan, 4.0, 2.0])
    assert genes.known == 2
    assert genes.find(["TNMD", "tspan6", "ENSG00000000003.15", "ensg00000000005", "<pad>", "X"]).tolist() == [
        3,
        2,
        2,
        3,
        -1,
        -1,
    ]


def test_table_without_ids_gets_the_special_tokens(tmp_path):
    genes = GeneVocabulary.from_table(write(tmp_path, "symbol,median\nLYZ,3\nCD74,2.5\n", "genes.csv"))
    assert genes.tokens == ("<pad>", "<mask>", "<cls>", "<eos>", "LYZ", "CD74")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("symbol,level\nLYZ,3\n", "record 1: The table needs a column median; it has symbol, level"),
        ("name,median\nLYZ,3\n", "needs a column ensembl_id or"),
        ("symbol,median\nLYZ,3\nCD74,high\n", "record 3: This line is no gene with a median"),
        ("symbol,median\nLYZ\n", "record 2"),
        ("symbol,median\nLYZ,3\nLYZ,4\n", "twice: LYZ"),
        ("symbol,median\nLYZ,0\n", "must be positive"),
        ("symbol,median\n", "at least one gene"),
        ("symbol,median,token\nLYZ,3,0\nCD74,2,2\n", "1 is missing or twice"),
        ("symbol,median,token\nLYZ,3,0\nCD74,2,0\n", "1 is missing or twice"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        GeneVocabulary.from_table(write(tmp_path, text, "genes.csv"))


def test_bad_values():
    with pytest.raises(ConfigError, match="1 medians"):
        GeneVocabulary(("a", "b"), np.array([1.0]))
    with pytest.raises(ConfigError, match="positive"):
        GeneVocabulary(("a",), np.array([-1.0]))


@pytest.mark.parametrize("held", [2**26, 7, 1])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_medians_are_the_nonzero_medians(rng, monkeypatch, held, form):
    monkeypatch.setattr(vocabulary, "VALUES_HELD", held)
    values = rng.poisson(0.8, size=(41, 9)).astype(np.float32)
    values[:, 0] += 1
    values[:, 5] = 0
    data = anndata.AnnData(form(values))
    genes = GeneVocabulary.from_adata(data)
    cp10k = values / values.sum(1, keepdims=True) * 1e4
    expected = [np.median(column[column > 0]) for column in cp10k.T if (column > 0).any()]
    np.testing.assert_allclose(genes.medians[4:], expected, rtol=1e-6)
    assert genes.tokens[4:] == tuple(name for name in data.var_names if name != "5")


def test_logarithms_give_the_medians_of_what_they_came_from(rng):
    values = rng.poisson(1.5, size=(41, 9)) + 1.0
    logs = anndata.AnnData(np.log1p(values / values.sum(1, keepdims=True) * 1e4).astype(np.float32))
    np.testing.assert_allclose(
        GeneVocabulary.from_adata(logs).medians[4:],
        GeneVocabulary.from_adata(anndata.AnnData(values)).medians[4:],
        rtol=1e-5,
    )


def test_rare_genes_can_be_left_out():
    data = adata([[1, 0, 2], [1, 0, 0], [1, 1, 2]], ["a", "b", "c"])
    assert GeneVocabulary.from_adata(data, min_cells=2).tokens[4:] == ("a", "c")
    with pytest.raises(InputError, match="4 cells or more"):
        GeneVocabulary.from_adata(data, min_cells=4)


def test_versions_are_cut_and_duplicates_summed():
    data = adata([[1, 2, 5]], ["ENSG00000000003.14", "ENSG00000000003.15_PAR_Y", "a b"])
    genes = GeneVocabulary.from_adata(data)
    assert genes.tokens[4:] == ("ENSG00000000003", "a_b")
    np.testing.assert_allclose(genes.medians[4:], [3750, 6250])
    assert vocabulary.gene_name("AC000001.3") == "AC000001.3"  # a clone, no version


def test_match_takes_the_column_that_fits(tmp_path):
    genes = GeneVocabulary.from_table(write(tmp_path, TABLE))
    data = adata([[1, 1, 1]], ["g1", "g2", "g3"], gene_ids=["ENSG00000000005.2", "ENSG00000000003.9", "other"])
    match = genes.match(data.var)
    assert (match.column, match.ids.tolist(), match.matched) == ("gene_ids", [3, 2, -1], 2)
    assert str(match) == "2 of 3 genes (gene_ids) are in the vocabulary of 2"


def test_match_refuses_another_species(tmp_path):
    genes = GeneVocabulary.from_table(write(tmp_path, TABLE))
    data = adata([[1, 1]], ["ENSMUSG00000000001", "ENSMUSG00000000003"])
    with pytest.raises(InputError, match=r"Only 0 of 2.*ENSMUSG00000000001, .*ENSG00000000003, ENSG00000000005"):
        genes.match(data.var)


def test_letter_case_counts_only_where_it_must():
    genes = GeneVocabulary(("Actb", "ACTB", "Lyz"), np.array([1.0, 2.0, 3.0]))
    assert genes.find(["Actb", "ACTB", "actb", "LYZ"]).tolist() == [0, 1, -1, 2]


def test_an_alias_of_two_genes_is_no_name():
    genes = GeneVocabulary(("g1", "g2", "g3"), np.ones(3), ("A", "A", "g1"))
    assert genes.find(["A", "g1", "g3"]).tolist() == [-1, 0, 2]


def test_symbols_beside_ids_are_learnt_as_aliases():
    data = adata([[1, 2]], ["ENSG00000000003", "ENSG00000000005"], feature_name=["TSPAN6", "TNMD"])
    genes = GeneVocabulary.from_adata(data)
    assert genes.find(["TNMD", "TSPAN6"]).tolist() == [5, 4]
    again = GeneVocabulary.from_dict(genes.to_dict())
    assert again.to_dict() == genes.to_dict()
    assert again.find(["TNMD"]).tolist() == [5]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("table", "tokens", "specials"), [("gc30M", 25_426, 2), ("gc104M", 20_275, 4)], ids=["V1", "V2"]
)
def test_geneformer(shared, table, tokens, specials):
    genes = GeneVocabulary.from_table(shared / "cells" / f"geneformer_{table}_tokens_medians.tsv.gz")
    assert (len(genes.tokens), genes.known) == (tokens, tokens - specials)
    lyz = genes.find(["LYZ"])[0]
    assert lyz == genes.find(["ENSG00000090382.7"])[0]
    assert genes.medians[lyz] == pytest.approx({"gc30M": 22.7, "gc104M": 14.6}[table], abs=0.1)
    data = anndata.read_h5ad(shared / "cells" / "celltypist_sample_pbmc_559.h5ad")
    match = genes.match(find_expression(data).var)
    assert 15_000 < match.matched < len(match.ids)

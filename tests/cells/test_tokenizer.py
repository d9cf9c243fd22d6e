import json
import warnings

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.cells import GeneVocabulary, RankTokenizer, tokenize
from processive.errors import ConfigError, InputError
from processive.sequences import Tokenizer, tokenizer_from_dict, tokenizer_to_dict
from scipy import sparse

SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")


def make(medians, max_genes=None, specials=SPECIALS):
    names = (*specials, *(f"g{i}" for i in range(len(medians))))
    return RankTokenizer(GeneVocabulary(names, np.array([np.nan] * len(specials) + list(medians))), max_genes=max_genes)


def matrix(values, names=None):
    adata = anndata.AnnData(values)
    adata.var_names = names or [f"g{i}" for i in range(values.shape[1])]
    return adata


def ranked(values, medians):
    """The definition: value / median falling, ties by gene number, zeros left out."""
    ratio = (np.asarray(values, np.float64) / medians).astype(np.float32)
    return sorted(np.flatnonzero(np.asarray(values) > 0).tolist(), key=lambda g: (-ratio[g], g))


def test_ranks_by_value_over_median():
    tokenizer = make([10.0, 1.0, 1.0, 2.0])
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode({"g0": 20, "g1": 3, "g2": 0, "g3": 6})
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "g1 g3 g0"  # 3 = 3 > 2, the tie in token order, the zero absent
    assert ids.tolist() == [2, 5, 7, 4, 3]


def test_pair_string_and_ready_array():
    tokenizer = make([1.0, 1.0, 1.0])
    ids = tokenizer.encode((np.array([4, 5, 6, 5]), np.array([2.0, 1.0, 2.5, 1.0])))  # gene 5 twice: 2
    assert ids.tolist() == [2, 6, 4, 5, 3]
    assert tokenizer.encode("g2 G0 g1").tolist() == ids.tolist()
    np.testing.assert_array_equal(tokenizer.encode(ids), ids)
    np.testing.assert_array_equal(tokenizer.encode(ids.astype(np.uint16)), ids)


def test_max_genes_keeps_the_first():
    tokenizer = make([1.0, 1.0, 1.0], max_genes=2)
    assert tokenizer.decode(tokenizer.encode({"g0": 1, "g1": 2, "g2": 3})) == "g2 g1"
    assert tokenizer.decode(tokenizer.encode("g2 g1 g0")) == "g2 g1"
    cells = tokenize(matrix(np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])), tokenizer)
    assert [cell.tolist() for cell in cells] == [[2, 6, 5, 3], [2, 5, 3]]
    with pytest.raises(ConfigError, match="at least one"):
        make([1.0], max_genes=0)


def test_a_vocabulary_without_cls_and_eos():
    tokenizer = make([1.0, 1.0], specials=("<pad>", "<mask>"))
    assert tokenizer.encode({"g1": 1}).tolist() == [3]
    assert tokenizer.vocabulary.role("bos") is None
    assert tokenizer.vocabulary.special_ids == {0, 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"g0": 1, "x": 2}, r"position 2: 'x' is no gene"),
        ("g0 y", r"position 2: 'y' is no gene"),
        ("g0 g1 g0", r"position 3: g0 stands twice"),
        ({"g0": -1.0}, r"position 1: A gene's value is -1"),
        ({"g0": float("nan")}, "value is nan"),
        ({"g0": 0.0}, "no gene of the vocabulary with a count"),
        ({}, "no gene of the vocabulary"),
        ("", "no gene of the vocabulary"),
        ((np.array([2]), np.array([1.0])), "Token id 2 is no gene"),
        ((np.array([99]), np.array([1.0])), "Token id 99 is no gene"),
        ((np.array([4]), np.array([1.0, 2.0])), "1 token ids and 2 values"),
        (np.array([4, 99]), "outside 0..5"),
        (17, "not int"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(InputError, match=message):
        make([1.0, 1.0]).encode(record)


values_strategy = st.lists(
    st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e9, allow_subnormal=False)), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=150)
@given(values=values_strategy, data=st.data())
def test_encode_then_decode_keeps_the_ranked_order(values, data):
    medians = data.draw(
        st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.3]), min_size=len(values), max_size=len(values))
    )
    tokenizer = make(medians)
    expected = " ".join(f"g{i}" for i in ranked(values, np.array(medians)))
    names = data.draw(st.permutations(range(len(values))))
    cell = {f"g{i}": values[i] for i in names}  # the order of a mapping means nothing
    if not expected:
        with pytest.raises(InputError):
            tokenizer.encode(cell)
        return
    ids = tokenizer.encode(cell)
    assert tokenizer.decode(ids) == expected
    assert tokenizer.encode(expected).tolist() == ids.tolist()
    block = tokenizer.encode_block(
        sparse.csr_matrix(np.array([values])), tokenizer.genes.match(matrix(np.array([values])).var)
    )
    assert block[0].tolist() == ids.tolist()


@settings(deadline=None, max_examples=50)
@given(order=st.lists(st.integers(0, 39), min_size=1, unique=True))
def test_sentence_round_trip(order):
    sentence = " ".join(f"g{i}" for i in order)
    tokenizer = make([1.0] * 40)
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(1, 12), genes=st.integers(1, 40))
def test_permuting_the_columns_changes_nothing(seed, cells, genes):
    rng = np.random.default_rng(seed)
    values = rng.poisson(1.0, size=(cells, genes)).astype(np.float32)
    values[0, 0] = 1
    tokenizer = make(rng.choice([0.5, 1.0, 2.0, 3.3], size=genes))
    adata = matrix(values)
    shuffled = adata[:, rng.permutation(genes)].copy()
    first, second = tokenize_quietly(adata, tokenizer), tokenize_quietly(shuffled, tokenizer)
    assert [cell.tolist() for cell in first] == [cell.tolist() for cell in second]
    for cell, row in zip(first, values, strict=True):
        expected = [f"g{g}" for g in ranked(row, tokenizer.genes.medians[4:])]
        assert tokenizer.decode(cell).split() == expected


def tokenize_quietly(adata, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(adata, tokenizer)


def test_json_round_trip():
    tokenizer = make([1.5, 2.0], max_genes=7)
    data = json.loads(json.dumps(tokenizer_to_dict(tokenizer), allow_nan=False))
    assert data["name"] == "cells-rank"
    again = tokenizer_from_dict(data)
    assert isinstance(again, RankTokenizer)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.encode({"g0": 1, "g1": 2}).tolist() == [2, 5, 4, 3]

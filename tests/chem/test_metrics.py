import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.chem import metrics
from processive.errors import ConfigError, InputError

Chem = pytest.importorskip("rdkit.Chem")

# six strings: five valid, of which "OCC" repeats "CCO", so four molecules
GENERATED = ["CCO", "OCC", "c1ccccc1", "C1CC", "CC(=O)O", "CCN"]
TRAINING = ["C(C)O", "C1=CC=CC=C1", "CCCC"]


def test_shares_are_nested():
    assert metrics.validity(GENERATED) == 5 / 6
    assert metrics.uniqueness(GENERATED) == 4 / 5
    assert metrics.novelty(GENERATED, TRAINING) == 2 / 4
    assert metrics.canonical_smiles(GENERATED) == ["CCO", "CCO", "c1ccccc1", None, "CC(=O)O", "CCN"]


def test_empty_string_is_no_molecule():
    assert metrics.validity(["", "C"]) == 0.5


def test_shares_of_nothing_are_nan():
    assert math.isnan(metrics.validity([]))
    assert math.isnan(metrics.uniqueness(["C1CC"]))
    assert math.isnan(metrics.novelty(["C1CC"], TRAINING))
    assert math.isnan(metrics.internal_diversity(["CCO", "OCC"]))


def test_internal_diversity_is_the_mean_distance_of_pairs():
    from rdkit.Chem.AllChem import GetMorganFingerprintAsBitVect

    smiles = ["CCO", "CCCO", "c1ccccc1O", "CCN"]
    bits = [np.array(list(GetMorganFingerprintAsBitVect(Chem.MolFromSmiles(s), 2, 2048)), bool) for s in smiles]
    distances = [1 - (a & b).sum() / (a | b).sum() for i, a in enumerate(bits) for b in bits[:i]]
    assert metrics.internal_diversity([*smiles, "OCC", "C1CC"]) == pytest.approx(np.mean(distances))


def test_internal_diversity_of_a_sample_depends_on_the_seed_and_not_on_the_order():
    smiles = ["C" * n + end for n in range(1, 15) for end in ("O", "N", "c1ccccc1", "C(=O)O")]
    first = metrics.internal_diversity(smiles, sample=10, seed=1)
    assert first == metrics.internal_diversity(smiles[::-1], sample=10, seed=1)
    assert first != metrics.internal_diversity(smiles, sample=10, seed=2)
    assert 0 < first < 1


def test_property_table_is_aligned_and_right():
    table = metrics.property_table(["CCO", "C1CC", "c1ccccc1"])
    assert all(values.shape == (3,) and np.isnan(values[1]) for values in table.values())
    assert table["molecular weight"][0] == pytest.approx(46.069, abs=1e-3)
    assert table["logP"][2] == pytest.approx(1.6866, abs=1e-4)
    assert table["TPSA"][0] == pytest.approx(20.23)
    assert (table["H-bond donors"][0], table["rings"][2], table["rotatable bonds"][2]) == (1, 1, 0)
    assert 0 < table["QED"][0] < 1


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    st.floats(-10, 10),
)
def test_wasserstein_is_the_distance_of_sorted_samples(a, b, shift):
    a, b = np.array(a), np.array(b)
    # of two samples as long as each other, the mean distance of the i-th smallest values
    repeated = np.sort(np.repeat(a, len(b))), np.sort(np.repeat(b, len(a)))
    want = np.abs(repeated[0] - repeated[1]).mean()
    assert metrics.wasserstein(a, b) == pytest.approx(want, abs=1e-9)
    assert metrics.wasserstein(a, a + shift) == pytest.approx(abs(shift), abs=1e-9)


def test_wasserstein_leaves_nan_out():
    a = np.array([1.0, np.nan, 3.0])
    assert metrics.wasserstein(a, np.array([2.0, 4.0])) == 1.0
    assert math.isnan(metrics.wasserstein(a, np.array([np.nan])))


def test_report_holds_what_the_functions_say():
    report = metrics.report(GENERATED, TRAINING)
    assert (report.count, report.valid, report.unique, report.novel) == (6, 5 / 6, 4 / 5, 2 / 4)
    assert report.internal_diversity == metrics.internal_diversity(GENERATED)
    table = metrics.property_table(GENERATED)
    for name, values in report.generated.items():
        assert np.array_equal(values, table[name][~np.isnan(table[name])])
        assert len(report.reference[name]) == len(TRAINING)
        assert report.distances[name] == metrics.wasserstein(values, report.reference[name])


def test_report_prints_as_a_table_and_goes_to_json():
    report = metrics.report(GENERATED, TRAINING)
    lines = str(report).splitlines()
    assert lines[0].startswith("6 strings: valid 0.833, unique (of valid) 0.800, novel (of unique) 0.500")
    assert len(lines) == 2 + len(report.generated)
    assert len({len(line) for line in lines[1:]}) == 1
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["valid"] == 5 / 6
    assert plain["properties"]["logP"]["wasserstein"] == report.distances["logP"]


def test_report_without_a_reference():
    report = metrics.report(GENERATED)
    assert report.novel is None and report.reference == {} and report.distances == {}
    assert "novel" not in str(report) and "reference" not in str(report)


def test_report_of_nothing_valid_still_reports():
    report = metrics.report(["C1CC", "xx"], TRAINING)
    assert report.valid == 0 and math.isnan(report.unique)
    assert "valid 0.000" in str(report)


def test_report_samples_a_large_reference_and_counts_all_of_it_for_novelty():
    training = [f"{'C' * n}O" for n in range(1, 60)]
    report = metrics.report(training[-5:], training, sample=10)
    assert report.novel == 0
    assert len(report.reference["logP"]) == 10


def test_nothing_to_report_on_is_an_error():
    with pytest.raises(ConfigError, match="nothing to report"):
        metrics.report([])
    with pytest.raises(InputError, match="reference set holds no molecule"):
        metrics.report(GENERATED, ["C1CC"])

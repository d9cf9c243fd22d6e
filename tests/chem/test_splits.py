import json

import numpy as np
import pytest
from processive.chem import PropertyPredictor
from processive.chem.splits import random_split, read_split, scaffold_groups, scaffold_split, write_split
from processive.errors import ConfigError, InputError, OutputError
from processive.training import cluster_folds, fit_folds, predict_folds

Chem = pytest.importorskip("rdkit.Chem")

RINGS = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccsc1", "C1CCNC1", "c1ccc2ccccc2c1", "c1c[nH]cn1", "C1CCOC1", "C1CC1"]
MOLECULES = [f"{'C' * n}{ring}" for n in range(1, 8) for ring in RINGS] + [f"{'C' * n}O" for n in range(1, 20)]
SPLITS = [scaffold_split, random_split]


def parts(split):
    return {"train": split.train, "valid": split.valid, "test": split.test}


def scaffold(smiles):
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    return MurckoScaffoldSmiles(smiles)


@pytest.mark.parametrize("split_by", SPLITS)
def test_every_row_belongs_to_one_part(split_by):
    split = split_by(MOLECULES)
    rows = np.concatenate([*parts(split).values(), split.unusable])
    assert sorted(rows) == list(range(len(MOLECULES)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts(split).values())
    shares = [len(part) / len(MOLECULES) for part in parts(split).values()]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_no_scaffold_stands_in_two_parts(seed):
    split = scaffold_split(MOLECULES, seed=seed)
    scaffolds = [{scaffold(MOLECULES[i]) for i in part} - {""} for part in parts(split).values()]
    assert not (scaffolds[0] & scaffolds[1] or scaffolds[0] & scaffolds[2] or scaffolds[1] & scaffolds[2])


@pytest.mark.parametrize("split_by", SPLITS)
@pytest.mark.parametrize("seed", [0, 7])
def test_row_order_does_not_matter(split_by, seed):
    rng = np.random.default_rng(1)
    split = split_by(MOLECULES, seed=seed)
    order = rng.permutation(len(MOLECULES))
    shuffled = [MOLECULES[i] for i in order]
    # another way to write each molecule must not matter either
    rewritten = [Chem.MolToSmiles(Chem.MolFromSmiles(s), canonical=False, rootedAtAtom=0) for s in shuffled]
    for texts in (shuffled, rewritten):
        again = split_by(texts, seed=seed)
        for name, part in parts(again).items():
            assert sorted(order[part]) == parts(split)[name].tolist()


@pytest.mark.parametrize("split_by", SPLITS)
def test_seed_decides(split_by):
    first, again, other = split_by(MOLECULES, seed=1), split_by(MOLECULES, seed=1), split_by(MOLECULES, seed=2)
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


@pytest.mark.parametrize("split_by", SPLITS)
def test_rows_of_one_molecule_share_a_part(split_by):
    twice = MOLECULES + [Chem.MolToSmiles(Chem.MolFromSmiles(s), doRandom=True) for s in MOLECULES]
    split = split_by(twice)
    for part in parts(split).values():
        assert {i % len(MOLECULES) for i in part} == {i for i in part if i < len(MOLECULES)}


def test_a_scaffold_too_large_for_a_held_out_part_trains():
    benzenes = [f"{'C' * n}c1ccccc1" for n in range(1, 31)]
    for seed in range(5):
        assert set(range(30)) <= set(scaffold_split(benzenes + MOLECULES, seed=seed).train.tolist())


def test_unusable_rows_belong_to_no_part():
    rows = ["C1CC", *MOLECULES, "", "Xx"]
    split = scaffold_split(rows)
    assert split.unusable.tolist() == [0, len(rows) - 2, len(rows) - 1]
    assert not set(split.unusable) & set(np.concatenate(list(parts(split).values())))


def test_parts_may_be_empty():
    split = scaffold_split(MOLECULES, (0.7, 0, 0.3))
    assert len(split.valid) == 0 and len(split.test)
    assert len(random_split(MOLECULES, (1, 0, 0)).train) == len(MOLECULES)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ConfigError, match="sum to 1"):
        scaffold_split(MOLECULES, fractions)


@pytest.mark.parametrize("split_by", SPLITS)
def test_nothing_to_split_is_an_error(split_by):
    with pytest.raises(InputError, match="No row is a molecule"):
        split_by(["Xx", ""])


def test_index_file_is_read_back_for_the_same_rows_only(tmp_path):
    path = tmp_path / "split.json"
    rows = ["Xx", *MOLECULES]
    split = scaffold_split(rows, seed=3)
    write_split(path, split, rows)
    again = read_split(path, rows)
    assert (again.method, again.seed, again.fractions) == ("scaffold", 3, (0.8, 0.1, 0.1))
    for name in ("train", "valid", "test", "unusable"):
        assert np.array_equal(getattr(again, name), getattr(split, name))
    with pytest.raises(InputError, match="other rows"):
        read_split(path, rows[::-1])
    with pytest.raises(InputError, match="other rows"):
        read_split(path, rows[:-1])


def test_changed_or_foreign_index_files_are_refused(tmp_path):
    path = tmp_path / "split.json"
    write_split(path, scaffold_split(MOLECULES), MOLECULES)
    content = json.loads(path.read_text())

    moved = {**content, "train": content["train"][1:], "test": [*content["test"], content["train"][0]]}
    for changed, reason in [
        (moved, "changed"),
        ({**content, "format": 9}, "format 9"),
        ({"train": []}, "not a split file"),
        ([1, 2], "not a split file"),
        ({**content, "fractions": [1]}, "not a split file"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=reason):
            read_split(path, MOLECULES)
    path.write_text("no json")
    with pytest.raises(InputError, match="not a split file"):
        read_split(path, MOLECULES)
    with pytest.raises(InputError, match="no such file"):
        read_split(tmp_path / "absent.json", MOLECULES)


def test_an_index_file_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_split(tmp_path / "file" / "split.json", scaffold_split(MOLECULES), MOLECULES)


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "usable"), [("esol", 1128), ("bbbp", 2039)])
def test_published_sets_split_alike_in_any_row_order(shared, name, usable):
    from processive.chem.readers import read

    rows = [record.text for record in read(shared / "chem" / "moleculenet" / f"{name}.csv", sanitize=False)]
    order = np.random.default_rng(0).permutation(len(rows))
    first, second = scaffold_split(rows, seed=4), scaffold_split([rows[i] for i in order], seed=4)
    assert sorted(order[second.test]) == first.test.tolist()
    assert len(first.train) + len(first.valid) + len(first.test) == usable
    assert abs(len(first.test) - usable / 10) <= 2


def test_folds_of_scaffolds_are_whole_and_make_an_ensemble():
    smiles = [
        "c1ccccc1O",
        "c1ccccc1N",
        "C1CCCCC1O",
        "C1CCCCC1N",
        "c1ccncc1C",
        "c1ccncc1O",
        "CCO",
        "CCCN",
        "no molecule",
    ]
    groups = scaffold_groups(smiles)
    assert groups[0] == groups[1] == "c1ccccc1" and groups[6] == "acyclic CCO" and groups[8] is None
    folds = cluster_folds(groups, 2)
    assert folds[8] == -1 and sorted(np.bincount(folds[:8])) == [4, 4]
    assert all(folds[i] == folds[i + 1] for i in (0, 2, 4))
    y = np.arange(9.0)

    def make(number):
        return PropertyPredictor(width=8, depth=1, descriptors=False, ensemble=1, epochs=1, seed=number, progress=False)

    found = predict_folds(fit_folds(make, smiles, y, folds), smiles[:8])
    assert found.mean.shape == (8,) and (found.deviation > 0).all()

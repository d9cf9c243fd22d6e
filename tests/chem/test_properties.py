import ast
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from processive.chem.descriptors import Scaling, descriptor_names, molecule_descriptors
from processive.chem.properties import PropertyPredictor
from processive.errors import ConfigError, InputError
from rdkit import Chem

SMILES = [
    f"{head}{'C' * length}{tail}"
    for head in ("C", "N", "c1ccccc1C", "FC(F)(F)")
    for length in range(1, 7)
    for tail in ("", "O", "C(=O)O")
]
QUICK = {
    "width": 16,
    "depth": 2,
    "ensemble": 1,
    "epochs": 3,
    "batch_size": 32,
    "progress": False,
    "dropout": 0.0,
    "descriptors": False,
}


def oxygens(smiles):
    return np.array([sum(a.GetSymbol() == "O" for a in Chem.MolFromSmiles(s).GetAtoms()) for s in smiles], float)


def lengths(smiles):
    return np.array([Chem.MolFromSmiles(s).GetNumAtoms() for s in smiles], float)


@pytest.fixture(scope="module")
def regression():
    torch.manual_seed(0)
    return PropertyPredictor(**QUICK).fit(SMILES, lengths(SMILES) * 10 + 100)


@pytest.mark.parametrize("options", [{}, {"descriptors": True}, {"encoder": "attention"}], ids=str)
def test_learns(options):
    train, test = SMILES[::2], SMILES[1::2]
    predictor = PropertyPredictor(**{**QUICK, "epochs": 40, "batch_size": 16, "learning_rate": 8e-3, **options})
    predictor.fit(train, lengths(train) * 10 + 100)
    assert predictor.score(test, lengths(test) * 10 + 100) > 0.9


def test_classification_with_unknown_labels(rng):
    y = np.stack([oxygens(SMILES) > 0, lengths(SMILES) > 10], 1).astype(float)
    y[rng.random(y.shape) < 0.3] = np.nan
    y[4] = np.nan
    predictor = PropertyPredictor("classification", **{**QUICK, "epochs": 40, "batch_size": 16, "learning_rate": 8e-3})
    with pytest.warns(UserWarning, match="no known property and are left out"):
        predictor.fit(SMILES, y)
    want = np.stack([oxygens(SMILES) > 0, lengths(SMILES) > 10], 1).astype(float)
    probabilities = predictor.predict_proba(SMILES)
    assert probabilities.shape == want.shape
    assert np.array_equal(predictor.predict(SMILES), probabilities >= 0.5)
    assert predictor.score(SMILES, want) > 0.9
    single = PropertyPredictor("classification", **QUICK).fit(SMILES, want[:, 0])
    assert single.predict_proba(SMILES[:3]).shape == (3, 2)
    np.testing.assert_allclose(single.predict_proba(SMILES[:3]).sum(1), 1)
    assert single.predict(SMILES[:3]).shape == (3,)


def test_one_seed_one_result(regression):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = PropertyPredictor(**QUICK).fit(SMILES, lengths(SMILES) * 10 + 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(again.predict(SMILES), regression.predict(SMILES))
    other = PropertyPredictor(**QUICK, seed=1).fit(SMILES, lengths(SMILES) * 10 + 100)
    assert not np.array_equal(other.predict(SMILES), regression.predict(SMILES))


def test_alone_equals_in_company(regression):
    alone = np.concatenate([regression.predict([s]) for s in SMILES[:5]])
    np.testing.assert_allclose(alone, regression.predict(SMILES)[:5], rtol=1e-4)


def test_rows_stay_aligned(regression):
    rows = [SMILES[0], "not a molecule", None, "", SMILES[1]]
    with pytest.warns(UserWarning, match=r"3 of 5 rows are no molecule; .*NaN \(rows 2, 3, 4\)"):
        got = regression.predict(rows)
    assert np.isnan(got).tolist() == [False, True, True, True, False]
    np.testing.assert_allclose(got[[0, 4]], regression.predict([SMILES[0], SMILES[1]]), rtol=1e-5)
    assert regression.predict([]).shape == (0,)


def test_fit_leaves_bad_rows_out(regression):
    rows, y = ["C1CC", *SMILES], np.array([1e9, *(lengths(SMILES) * 10 + 100)])
    with pytest.warns(UserWarning, match=r"1 of 73 training rows are no molecule and are left out \(rows 1\)"):
        predictor = PropertyPredictor(**QUICK).fit(rows, y)
    assert np.array_equal(predictor.predict(SMILES), regression.predict(SMILES))


def test_validation_keeps_the_best_epoch():
    predictor = PropertyPredictor(**{**QUICK, "epochs": 40, "patience": 4, "ensemble": 2, "learning_rate": 2e-2})
    noise = np.random.default_rng(0).normal(size=36)
    predictor.fit(SMILES[:36], noise, (SMILES[36:], np.zeros(36)))
    for member in range(2):
        losses = [line["validation_loss"] for line in predictor.history_ if line["network"] == member]
        assert len(losses) < 40
        assert int(np.argmin(losses)) == len(losses) - 1 - 4
    predictor.networks_ = predictor.networks_[1:]
    kept = np.mean((predictor.predict(SMILES[36:]) / predictor.scale_) ** 2)  # the wanted values are 0
    assert kept == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("descriptors", [True, False])
def test_save_and_load(tmp_path, descriptors):
    y = np.stack([lengths(SMILES), oxygens(SMILES)], 1)
    predictor = PropertyPredictor(**{**QUICK, "epochs": 1, "ensemble": 2, "descriptors": descriptors}).fit(SMILES, y)
    predictor.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["kind"] == "molecule-property"
    back = PropertyPredictor.load(tmp_path / "model")
    assert back.get_params() == predictor.get_params()
    assert np.array_equal(back.predict(SMILES), predictor.predict(SMILES))
    assert "| molecules | 72 |" in (tmp_path / "model" / "README.md").read_text()
    beside = tmp_path / "model" / "notes.txt"
    beside.write_text("mine")
    back.save(tmp_path / "model")
    assert beside.read_text() == "mine"


def test_damaged_folders(tmp_path, regression):
    with pytest.raises(InputError, match="no such file"):
        PropertyPredictor.load(tmp_path / "absent")
    folder = tmp_path / "model"
    regression.save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(InputError, match="damaged"):
        PropertyPredictor.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    for change, reason in (
        ({"kind": "language-model"}, "language-model model, not a molecule-property"),
        ({"format": 2}, "format 2"),
        ({"tasks": 3}, "do not fit"),
        ({"params": {"colour": 1}}, "not a predictor's config"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=reason):
            PropertyPredictor.load(folder)
    shutil.rmtree(folder)


def test_scikit_learn_conventions():
    from sklearn.base import clone, is_classifier, is_regressor
    from sklearn.model_selection import cross_val_score

    predictor = PropertyPredictor(**QUICK)
    assert clone(predictor).get_params() == predictor.get_params()
    assert predictor.set_params(epochs=2, width=8) is predictor
    assert predictor.get_params()["epochs"] == 2
    assert is_regressor(predictor) and not is_classifier(predictor)
    assert is_classifier(PropertyPredictor("classification"))
    scores = cross_val_score(predictor.set_params(epochs=1), SMILES, lengths(SMILES), cv=2)
    assert scores.shape == (2,) and np.isfinite(scores).all()
    with pytest.raises(ConfigError, match="'colour'"):
        predictor.set_params(colour="red")
    call = ast.parse(repr(predictor), mode="eval").body
    assert call.func.id == "PropertyPredictor"
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} == predictor.get_params()


def test_bad_input(regression):
    with pytest.raises(ConfigError, match="not been fitted"):
        PropertyPredictor().predict(["C"])
    with pytest.raises(ConfigError, match="predict_proba"):
        regression.predict_proba(["C"])
    with pytest.raises(ConfigError, match="task is 'ranking'"):
        PropertyPredictor("regression").set_params(task="ranking").fit(["C"], [1.0])
    with pytest.raises(ConfigError, match="epochs is 0"):
        PropertyPredictor(epochs=0).fit(["C"], [1.0])
    with pytest.raises(InputError, match="2 molecules need"):
        PropertyPredictor(**QUICK).fit(["C", "CC"], [1.0])
    with pytest.raises(InputError, match=r"record 2: y is 2; classification takes 0, 1"):
        PropertyPredictor("classification", **QUICK).fit(["C", "CC"], [1, 2])
    with pytest.raises(InputError, match="y is inf"):
        PropertyPredictor(**QUICK).fit(["C", "CC"], [1, np.inf])
    with pytest.raises(InputError, match="None of the 1 training rows"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PropertyPredictor(**QUICK).fit(["C1"], [1.0])
    with pytest.raises(InputError, match="2 tasks"):
        PropertyPredictor(**QUICK).fit(SMILES, lengths(SMILES), (["C"], [[1.0, 2.0]]))


def test_descriptors_and_their_scaling():
    names = descriptor_names()
    assert {"MolLogP", "TPSA", "MolWt"} <= set(names)
    ethanol = dict(zip(names, molecule_descriptors(Chem.MolFromSmiles("CCO"), names), strict=True))
    assert ethanol["MolWt"] == pytest.approx(46.07, abs=0.01)
    assert ethanol["NumHDonors"] == 1
    with pytest.raises(ConfigError, match="NoSuchThing"):
        molecule_descriptors(Chem.MolFromSmiles("C"), ["NoSuchThing"])
    values = np.array([[1.0, 5, np.nan, np.nan], [2, 5, np.nan, 1], [3, 5, np.nan, 3]])
    scaled = Scaling.fit(values)(np.array([[2.0, 9, 1, np.nan], [1e9, 5, np.nan, 2], [-1e9, 5, 0, 1]]))
    assert scaled.dtype == np.float32
    assert scaled[0].tolist() == [0, 0, 0, 0]
    assert scaled[1, 0] == pytest.approx(1.22, abs=0.02)  # clipped to the largest value of training
    assert scaled[2, 0] == -scaled[1, 0]
    assert np.isfinite(scaled).all()

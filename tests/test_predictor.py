"""The predictor of labels: it learns, keeps its best epoch, saves, and leaves its base alone."""

from __future__ import annotations

import numpy as np
import processive as pv
import pytest
import torch
from processive import bio, training
from processive.backbones import TransformerConfig
from processive.errors import ConfigError
from processive.models import AdapterConfig, LanguageModel
from processive.training import TrainingConfig


@pytest.fixture
def base():
    tokenizer = bio.ProteinTokenizer()
    torch.manual_seed(0)
    config = TransformerConfig(len(tokenizer.vocabulary), 16, 1, heads=2, direction="bidirectional")
    return LanguageModel(tokenizer, config, name="base").eval()


@pytest.fixture
def proteins(rng):
    return ["".join(rng.choice(list("ACDEFGHIKL"), rng.integers(4, 15))) for _ in range(60)]


QUICK = TrainingConfig(epochs=25, batch_tokens=150, learning_rate=1e-2)


@pytest.mark.parametrize("tuning", ["head", "lora", "full"])
def test_numbers_are_learned_saved_and_loaded(tuning, base, proteins, tmp_path):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    y = np.array([2.0 + protein.count("A") / len(protein) for protein in proteins])
    y[3] = np.nan
    adapter = AdapterConfig(rank=2) if tuning == "lora" else None
    predictor = pv.SequencePredictor(base, tuning=tuning, config=QUICK, adapter=adapter, names=["share"])
    assert predictor.fit(proteins, y) is predictor
    found = predictor.predict(proteins)
    known = ~np.isnan(y)
    assert np.corrcoef(found[known], y[known])[0, 1] > 0.8
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items()) and base.task is None
    predictor.save(tmp_path / "model")
    again = pv.load(tmp_path / "model")
    assert again.task_config.names == ("share",)
    np.testing.assert_allclose(again.predict(proteins), found, rtol=1e-6)


def test_the_best_epoch_is_kept(base, proteins, rng):
    y = (rng.random(60) < 0.5).astype(float)  # nothing to learn: validation only gets worse
    predictor = pv.SequencePredictor(base, kind="binary", tuning="full", config=QUICK)
    predictor.fit(proteins[:30], y[:30], validation=(proteins[30:], y[30:]))
    losses = [line["validation_loss"] for line in predictor.history_ if "validation_loss" in line]
    assert min(losses) < losses[-1]
    p = predictor.predict_proba(proteins[30:])
    loss = -np.mean(np.log(np.where(y[30:] == 1, p, 1 - p)))
    assert loss == pytest.approx(min(losses), rel=1e-4)
    assert set(predictor.predict(proteins)) <= {0.0, 1.0}


def test_classes_of_residues(base, proteins):
    labels = [["DE".find(letter) + 1 for letter in protein] for protein in proteins]
    predictor = pv.SequencePredictor(
        base, kind="classes", level="token", tuning="full", names=["rest", "D", "E"], config=QUICK
    ).fit(proteins, labels)
    found = predictor.predict(proteins[:5])
    assert [row.tolist() for row in found] == labels[:5]
    assert predictor.predict_proba(["AC"])[0].shape == (2, 3)


def test_an_ensemble_over_folds(base, proteins):
    y = np.array([float(protein.count("A")) for protein in proteins])
    folds = training.cluster_folds([protein[0] for protein in proteins], 3)
    config = TrainingConfig(epochs=3, batch_tokens=200)
    members = training.fit_folds(lambda fold: pv.SequencePredictor(base, config=config, seed=fold), proteins, y, folds)
    together = training.predict_folds(members, proteins[:4])
    assert together.mean.shape == (4,) and (together.deviation > 0).all()


def test_what_is_refused(base, proteins):
    predictor = pv.SequencePredictor(base, kind="binary")
    with pytest.raises(ConfigError, match="not been fitted"):
        predictor.predict(proteins)
    with pytest.raises(ConfigError, match="tuning is 'some'"):
        pv.SequencePredictor(base, tuning="some").fit(proteins, np.zeros(60))
    with pytest.raises(ConfigError, match="does regression"):
        pv.SequencePredictor(base).predict_proba(proteins)
    with pytest.raises(ConfigError, match="no parameter 'rank'"):
        predictor.set_params(rank=3)
    assert predictor.set_params(seed=3).get_params()["seed"] == 3

"""No fixed context length: what an xLSTM was trained on, or what its checkpoint says of it, limits nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from processive import models
from processive.backbones import XLSTMConfig
from processive.inference import embed, generate, score
from processive.models import LanguageModel
from processive.training import TrainingConfig, train

TRAINED = 16
BASE = XLSTMConfig(12, 16, 2, heads=2)
CONFIGS = {
    "mlstm": BASE,
    "slstm": replace(BASE, blocks="slstm"),
    "7b": replace(BASE, blocks="mlstm-7b"),
    "mixed, rotary over the width": replace(BASE, blocks=("mlstm", "slstm"), rotary="width"),
    "rotary by head": replace(BASE, rotary="head"),
    "sinusoidal": replace(BASE, positions="sinusoidal"),
    "alternating": replace(BASE, direction="alternating"),
    "bidirectional": replace(BASE, direction="bidirectional", blocks=("slstm", "mlstm-7b")),
    "tied": replace(BASE, direction="tied"),
    "both strands": replace(BASE, complement=(0, 1, 2, 3, 5, 4, 7, 6, 9, 8, 11, 10), rotary="head"),
}


def words(rng, *lengths):
    return ["".join("abcdefgh"[i] for i in rng.integers(0, 8, length)) for length in lengths]


@pytest.fixture(params=CONFIGS)
def trained(request, tokenizer, tmp_path, rng, monkeypatch):
    """A model trained on sequences of at most 16 tokens, saved and read back."""
    import processive.sequences.tokenizer as module

    monkeypatch.setattr(module, "tokenizer_class", {"letters": type(tokenizer)}.__getitem__)
    config = CONFIGS[request.param]
    model = LanguageModel(tokenizer, config)
    sequences = [tokenizer.encode(word) for word in words(rng, *[TRAINED - 2] * 8)]
    objective = "causal" if config.causal else "masked"
    settings = TrainingConfig(
        objective=objective, steps=2, batch_tokens=4 * TRAINED, max_length=TRAINED, learning_rate=0.05
    )
    train(model, sequences, settings, out=tmp_path)
    return models.load(tmp_path)


def test_three_times_the_training_length(trained, rng):
    (word,) = words(rng, 3 * TRAINED + 5)
    (rows,) = embed(trained, [word], pooling="tokens")
    assert rows.shape == (len(word), trained.width)
    assert np.isfinite(rows).all()
    assert len(np.unique(rows.round(5), axis=0)) == len(rows)  # no row stands for another
    changed = word[:-1] + ("a" if word[-1] != "a" else "b")
    assert np.abs(embed(trained, [changed], pooling="tokens")[0] - rows)[-1].max() > 1e-4  # the last letter is read
    assert score(trained, [word])[0] != score(trained, [changed])[0]
    if trained.causal:
        (start,) = embed(trained, [word[:TRAINED]], pooling="tokens")
        np.testing.assert_allclose(rows[:TRAINED], start, atol=1e-5)


def test_generation_goes_on_behind_the_training_length(trained, rng):
    if not trained.causal:
        pytest.skip("it does not generate")
    (prompt,) = words(rng, 2 * TRAINED)
    trained.backbone.requires_grad_(False)
    with torch.no_grad():
        trained.head.weight[trained.vocabulary.require("eos")] = 0
        trained.head.weight.mul_(0.1)  # nearly flat: ends are rare
    found = generate(trained, 8, prompts=prompt, max_length=3 * TRAINED, seed=1)
    longest = max(map(len, found))
    assert longest > 2 * TRAINED


def test_what_a_checkpoint_says_of_its_context_limits_nothing(tmp_path, rng, monkeypatch):
    """The package xlstm itself fails beyond its ``context_length``."""
    import processive.sequences.tokenizer as module
    from processive.sequences import IdTokenizer

    monkeypatch.setattr(module, "tokenizer_class", {"ids": IdTokenizer}.__getitem__)
    config = replace(BASE, blocks=("mlstm", "slstm"), norm_offset=True)
    model = LanguageModel(IdTokenizer(12), config).eval()
    model.card.recipe["context"] = TRAINED
    model.save(tmp_path, format="xlstm")
    assert f"context_length: {TRAINED}" in (tmp_path / "config.yaml").read_text()
    back = models.load(tmp_path)
    ids = [rng.integers(0, 12, 3 * TRAINED)]
    np.testing.assert_allclose(embed(back, ids), embed(model, ids), atol=1e-6)
    (rows,) = embed(back, ids, pooling="tokens", batch_tokens=10)
    assert rows.shape == (3 * TRAINED, 16)

"""RTD through the loop: two networks in the checkpoints, one in the folder; by hand, learned, resumed, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processive.backbones import TransformerConfig
from processive.errors import ConfigError
from processive.models import LanguageModel, load
from processive.sequences import PackedBatch
from processive.sequences import tokenizer as tokenizers
from processive.training import Electra, Sampled, TrainingConfig, add_detector, objectives, read_metrics, step, train
from safetensors.torch import load_file


@pytest.fixture
def make(make_model, tokenizer):
    def build(*, dropout: float = 0.0, seed: int = 0) -> Electra:
        detector = make_model("masked", dropout=dropout, seed=seed)
        add_detector(detector, seed=seed)
        small = TransformerConfig(len(tokenizer.vocabulary), 8, 1, heads=2, direction="bidirectional", dropout=dropout)
        return Electra(detector, LanguageModel(tokenizer, small))

    return build


def test_the_loss_by_hand(make, tokenizer):
    model = make()
    batch = PackedBatch.from_sequences([tokenizer.encode(word) for word in ("abcdefgh", "ddaa")])
    data = Sampled([tokenizer.encode("abcdefgh"), tokenizer.encode("ddaa")], share=0.5)
    found = data.objective(batch, np.arange(2), model)
    assert found.weight == 12
    model.eval()
    loss = found.loss_sum(model)
    assert loss.item() == found.loss_sum(model).item()  # in evaluation the draws are the same
    draws = torch.Generator().manual_seed(0)
    guess = objectives.masked(batch, model.detector.vocabulary, draws, share=0.5)
    at = guess.weights > 0
    logits = model.generator(guess.batch)[0]
    guessing = F.cross_entropy(logits[at], batch.tokens[at])
    seen = objectives.sampled(guess, logits[at], model.detector.vocabulary, draws).batch
    answers = model.detector.task(model.detector.backbone(seen)[0], seen, model.detector.vocabulary)[:, 0]
    wrong = (seen.tokens != batch.tokens).float()
    detecting = F.binary_cross_entropy_with_logits(answers, wrong, reduction="none")[batch.tokens >= 4].mean()
    assert 0 < wrong.sum() < at.sum() + 1
    assert loss.item() == pytest.approx(12 * (guessing + 50 * detecting).item(), rel=1e-5)


def test_both_learn_and_the_detector_is_kept(make, sequences, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "tokenizer_class", {"letters": type(tokenizer)}.__getitem__)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainingConfig(steps=40, batch_tokens=200, learning_rate=1e-2, log_every=1)

    def guessing(model):
        guess = objectives.masked(PackedBatch.from_sequences(sequences), model.generator.vocabulary, torch.Generator())
        return step.loss_sum(model.generator.eval(), guess).item() / guess.weight

    at_first = guessing(model)
    data = Sampled(sequences)
    metrics = train(model, data, config, out=tmp_path, validation=data, progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < 0.6 * losses[0] and metrics["validation_loss"] < 0.6 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    idle = {name for name in before if name.startswith("detector.head.")}
    assert changed == before.keys() - idle and idle
    checkpoint = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert changed == checkpoint.keys()
    back = load(tmp_path)
    assert back.task_config == model.detector.task_config and back.card.metrics["loss"] == metrics["loss"]
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.detector.state_dict().items())
    assert guessing(model) < at_first - 0.3


def test_a_killed_run_goes_on_bit_for_bit(make, sequences, tmp_path, interrupted):
    config = TrainingConfig(steps=6, batch_tokens=100, accumulation=2, checkpoint_every=2, log_every=1)
    data = Sampled(sequences)
    train(make(dropout=0.1), data, config, out=tmp_path / "whole", progress=False)
    with interrupted(3):
        train(make(dropout=0.1), data, config, out=tmp_path / "run", progress=False)
    train(make(dropout=0.1), data, config, out=tmp_path / "run", resume=True, progress=False)
    for part in ("model.safetensors", "checkpoint/model.safetensors"):
        one, other = (load_file(tmp_path / name / part) for name in ("whole", "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    lines = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_what_is_refused(make, make_model, sequences, tmp_path):
    config = TrainingConfig(steps=1)
    with pytest.raises(ConfigError, match=r"learned by training\.Electra"):
        train(make_model("masked"), Sampled(sequences), config, out=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="letters is of the class Electra"):
        train(make(), sequences, config, out=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="generator must read both ways"):
        Electra(make().detector, make_model())
    with pytest.raises(ConfigError, match="the model has none"):
        Electra(make_model("masked"), make_model("masked"))
    with pytest.raises(ConfigError, match="share lies between"):
        Sampled(sequences, share=1.0)
    assert not list(tmp_path.iterdir())

"""The training loop: determinism, accumulation, resuming, stopping, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import signal

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, InputError, OutputError, ProcessiveError
from processive.models import ModelCard
from processive.sequences import PackedBatch
from processive.training import TrainingConfig, checkpoint, loop, read_metrics, step, train
from processive.training import plan as training_plan
from processive.training.carried import Carried
from processive.training.data import Pieces
from processive.training.engines import plain
from processive.training.optimizer import make_optimizer
from processive.training.passes import Direct, chosen_precision
from processive.training.plan import plan
from safetensors import SafetensorError
from safetensors.torch import load_file


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_two_runs_with_one_seed_are_equal(kind, make_model, sequences, tmp_path):
    found = []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        model = make_model(kind)
        torch.rand(len(found) + 1)  # the state of the global generator does not matter
        config = TrainingConfig(objective=kind, steps=6, batch_tokens=80, seed=seed)
        train(model, sequences, config, out=tmp_path / name, progress=False)
        found.append(weights(model))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_training_lowers_the_loss_and_leaves_a_model_folder(make_model, sequences, tmp_path):
    model = make_model()
    config = TrainingConfig(epochs=8, batch_tokens=100, learning_rate=2e-2, log_every=2)
    card = ModelCard(data={"words.txt": "sha256:0"}, recipe={"name": "words"})
    metrics = train(model, sequences, config, out=tmp_path, validation=sequences[:5], card=card, progress=False)
    lines = read_metrics(tmp_path)
    assert lines[0]["loss"] > 2 and metrics["loss"] < 1.2 and metrics["validation_loss"] < 1.2
    assert metrics["epoch"] == 8 and metrics["interrupted"] is False and metrics["precision"] == "fp32"
    assert metrics["tokens"] == 8 * sum(len(s) for s in sequences)  # each sequence once per epoch
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert sum("validation_loss" in line for line in lines) == 8
    assert lines[-1]["learning_rate"] == pytest.approx(config.floor * config.learning_rate)
    saved = json.loads((tmp_path / "config.json").read_text())["card"]
    assert saved["data"] == card.data and saved["recipe"]["name"] == "words"
    assert saved["recipe"]["training"]["epochs"] == 8 and saved["metrics"]["loss"] == metrics["loss"]
    assert equal(load_file(tmp_path / "model.safetensors"), weights(model))


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_accumulation_equals_the_big_batch(kind, make_model, sequences):
    masks = torch.rand(sum(len(s) for s in sequences[:9]), generator=torch.Generator().manual_seed(1)) < 0.3
    used = [0]

    def taught(batch, model):  # the same masks whatever the batches are
        if kind == "causal":
            return step.causal(batch, model.vocabulary, torch.Generator())
        here = masks[used[0] : used[0] + len(batch.tokens)]
        used[0] += len(batch.tokens)
        tokens = torch.where(here, model.vocabulary.require("mask"), batch.tokens)
        inputs = PackedBatch(tokens, batch.cu_seqlens, batch.positions)
        return step.Objective(inputs, batch.tokens, here.float())

    results = []
    for groups in ([range(9)], [range(2), range(2, 8), range(8, 9)]):
        used[0] = 0
        model = make_model(kind, dropout=0.0)
        config = TrainingConfig(objective=kind, steps=1, clip=0.0)
        parts = [taught(PackedBatch.from_sequences([sequences[i] for i in group]), model) for group in groups]
        numbered = [(n, part, True) for n, part in enumerate(parts)]
        given = Direct(model), make_optimizer(model, config), numbered, config, Carried()
        loss, norm = step.gradient_step(*given, step=0)
        results.append((loss, norm, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_uninterrupted(number, make_model, sequences, tmp_path, signal_in_step):
    config = TrainingConfig(steps=9, batch_tokens=80, log_every=3)
    whole = make_model()
    train(whole, sequences, config, out=tmp_path / "whole", progress=False)
    before = signal.getsignal(number)
    stopped = make_model()
    signal_in_step(4, number)
    metrics = train(stopped, sequences, config, out=tmp_path / "run", progress=True)
    assert metrics["interrupted"] is True and metrics["step"] == 4
    assert not (tmp_path / "run" / "config.json").exists()
    assert signal.getsignal(number) is before
    resumed = make_model(seed=1)  # its weights come from the checkpoint
    metrics = train(resumed, sequences, config, out=tmp_path / "run", resume=True, progress=False)
    assert metrics["step"] == 9 and equal(weights(resumed), weights(whole))
    again = make_model(seed=2)  # a run that is done is done
    assert train(again, sequences, config, out=tmp_path / "run", resume=True, progress=False)["step"] == 9
    assert equal(weights(again), weights(whole))


def test_second_interrupt_stops_at_once(make_model, sequences, tmp_path, monkeypatch):
    def pressed_twice(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(plain, "gradient_step", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), sequences, TrainingConfig(steps=5), out=tmp_path, progress=False)


def test_minutes_end_a_run(make_model, sequences, tmp_path):
    config = TrainingConfig(minutes=0.01, batch_tokens=80, log_every=1)
    metrics = train(make_model(), sequences, config, out=tmp_path, progress=False)
    assert 0.5 < metrics["seconds"] < 5
    rates = [line["learning_rate"] for line in read_metrics(tmp_path)]
    assert max(rates) <= config.learning_rate and rates[-1] < max(rates)


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"log_every": 1}, {"checkpoint_every": 1}], ids=str
)
def test_options_that_do_not_change_the_weights(option, make_model, sequences, tmp_path):
    plain, other = make_model(), make_model()
    train(plain, sequences, TrainingConfig(steps=4, batch_tokens=80), out=tmp_path / "a", progress=False)
    train(other, sequences, TrainingConfig(steps=4, batch_tokens=80, **option), out=tmp_path / "b", progress=False)
    assert equal(weights(plain), weights(other))
    assert other.backbone.gradient_checkpointing is False  # as it was


@pytest.mark.parametrize("ahead", [1, 100, 10**6])
def test_steps_made_ready_together_are_those_of_the_plan(ahead, make_model, sequences, monkeypatch):
    monkeypatch.setattr(training_plan, "AHEAD", ahead)
    pieces, config = Pieces(sequences), TrainingConfig(objective="masked", steps=9, batch_tokens=80, accumulation=2)
    engine = plain.PlainEngine(make_model("masked"), config, Carried())
    each = next(plan(pieces, config, checkpoint.Standing())).of
    start = checkpoint.Standing(step=2, position=2)
    ready = list(itertools.islice(training_plan.ready_steps(pieces, config, start, engine), each))
    for number, (have, step_) in enumerate(zip(ready, plan(pieces, config, start), strict=False), 2):
        assert (have.step.epoch, have.step.position) == (step_.epoch, step_.position)
        batches = [pieces.batch(chosen, vocabulary_size=12) for chosen in step_.batches]
        assert have.tokens == sum(len(batch.tokens) for batch in batches)
        for n, (batch, (at, objective, counted)) in enumerate(zip(batches, have.objectives, strict=True)):
            wanted = step.make_objective(batch, engine.model, config, step.MASKS, number, n)
            assert (at, counted) == (n, True) and torch.equal(objective.weights, wanted.weights)
            assert torch.equal(objective.batch.tokens, wanted.batch.tokens)


def test_validation_does_not_change_the_weights(make_model, sequences, tmp_path):
    plain, other = make_model("masked"), make_model("masked")
    config = TrainingConfig(objective="masked", steps=4, batch_tokens=80, validate_every=2)
    train(plain, sequences, config, out=tmp_path / "a", progress=False)
    train(other, sequences, config, out=tmp_path / "b", validation=sequences[:3], progress=False)
    assert equal(weights(plain), weights(other))
    assert [line["step"] for line in read_metrics(tmp_path / "b") if "validation_loss" in line] == [2, 4]


def test_bf16_runs_and_says_so(make_model, sequences, tmp_path):
    model = make_model()
    config = TrainingConfig(steps=3, batch_tokens=80, precision="bf16")
    metrics = train(model, sequences, config, out=tmp_path, progress=False)
    assert metrics["precision"] == "bf16" and np.isfinite(metrics["loss"])
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert chosen_precision("auto", torch.device("cpu")) == "fp32"


def test_a_run_is_not_started_over(make_model, sequences, tmp_path):
    config = TrainingConfig(steps=2, batch_tokens=80)
    train(make_model(), sequences, config, out=tmp_path, progress=False)
    before = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        train(make_model(), sequences, config, out=tmp_path, progress=False)
    assert before == ((tmp_path / "model.safetensors").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())


def test_resuming_needs_the_same_settings_data_and_model(make_model, sequences, tmp_path):
    def again(model=None, data=sequences, **settings):
        config = TrainingConfig(**{"steps": 2, "batch_tokens": 80, **settings})
        return train(model or make_model(), data, config, out=tmp_path, resume=True, progress=False)

    again()  # nothing there yet: it starts
    again(log_every=1, checkpoint_every=7)  # these do not matter
    with pytest.raises(ConfigError, match=r"another settings.learning_rate \(0.001, now 0.1\)"):
        again(learning_rate=0.1)
    with pytest.raises(ConfigError, match="another data"):
        again(data=sequences[1:])
    with pytest.raises(ConfigError, match=r"another model.backbone.dropout \(0.1, now 0.3\)"):
        again(model=make_model(dropout=0.3))


def test_damaged_checkpoints_are_refused(make_model, sequences, tmp_path):
    config = TrainingConfig(steps=2, batch_tokens=80)
    train(make_model(), sequences, config, out=tmp_path, progress=False)
    file = tmp_path / "checkpoint" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        train(make_model(), sequences, config, out=tmp_path, resume=True, progress=False)
    run = tmp_path / "checkpoint" / "run.json"
    run.write_text(run.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(InputError, match="format 9"):
        train(make_model(), sequences, config, out=tmp_path, resume=True, progress=False)


def test_metrics_after_the_checkpoint_are_dropped(make_model, sequences, tmp_path):
    config = TrainingConfig(steps=4, batch_tokens=80, log_every=1)
    train(make_model(), sequences, config, out=tmp_path, progress=False)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(make_model(), sequences, config, out=tmp_path, resume=True, progress=False)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_keeps_the_last_checkpoint(make_model, sequences, tmp_path, monkeypatch):
    save_file, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 4:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = TrainingConfig(steps=4, batch_tokens=80, checkpoint_every=1)
    with pytest.raises(OutputError, match="cannot be written: the disk is full"):
        train(make_model(), sequences, config, out=tmp_path, progress=False)
    run = json.loads((tmp_path / "checkpoint" / "run.json").read_text())
    assert run["standing"]["step"] == 1 and not list(tmp_path.glob(".checkpoint.*"))


def test_a_folder_that_cannot_be_written(make_model, sequences, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(make_model(), sequences, TrainingConfig(steps=1), out=tmp_path / "file" / "run", progress=False)


def test_a_loss_that_is_no_number_is_an_error(make_model, sequences, tmp_path):
    model = make_model()
    config = TrainingConfig(steps=9, batch_tokens=80, log_every=1, checkpoint_every=1, warmup=0)
    train(model, sequences, TrainingConfig(steps=2), out=tmp_path / "good", progress=False)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ProcessiveError, match=r"failed at step 1.*lower learning rate"):
        train(model, sequences, config, out=tmp_path / "bad", progress=False)
    assert checkpoint.find_checkpoint(tmp_path / "bad") is None


def test_objective_and_backbone_must_fit(make_model, sequences, tmp_path):
    with pytest.raises(ConfigError, match="bidirectional"):
        train(make_model("masked"), sequences, TrainingConfig(steps=1), out=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="causal"):
        train(make_model(), sequences, TrainingConfig(objective="masked", steps=1), out=tmp_path, progress=False)


def test_plan_goes_on_where_it_stood(sequences):
    pieces = Pieces(sequences)
    config = TrainingConfig(epochs=2, batch_tokens=60, accumulation=2)
    steps = plan(pieces, config, loop.Standing())
    first = [next(steps) for _ in range(8)]
    assert {s.epoch for s in first} == {0, 1}
    for i, wanted in enumerate(first):
        found = next(plan(pieces, config, loop.Standing(epoch=wanted.epoch, position=wanted.position)))
        assert [b.tolist() for b in found.batches] == [b.tolist() for b in first[i].batches]

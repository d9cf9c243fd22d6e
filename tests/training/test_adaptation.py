"""Training a part of a model: an adapter, the head, blocks at rates of their own; and the record of a run."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from processive.errors import ConfigError, InputError
from processive.models import (
    AdapterConfig,
    ModelCard,
    add_adapter,
    fingerprint,
    load,
    load_adapter,
    merge_adapter,
    trainable_share,
)
from processive.models.adapters import base_tensors, low_ranks_of
from processive.training import TrainingConfig, train
from processive.training.engines import plain
from processive.training.optimizer import learning_rate_shares, make_optimizer, set_learning_rate
from processive.training.record import git_state, read_record
from safetensors.torch import load_file

SETTINGS = {"steps": 9, "batch_tokens": 80, "learning_rate": 3e-2, "log_every": 3}


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_only_the_adapter_is_trained(kind, make_model, sequences, tmp_path):
    model = make_model(kind)
    fresh = make_model(kind)
    add_adapter(model, AdapterConfig(rank=4, dropout=0.1, targets=("*",)), "letters")
    base, share = copies(base_tensors(model)), trainable_share(model)
    optimized = {id(p) for g in make_optimizer(model, TrainingConfig(**SETTINGS)).param_groups for p in g["params"]}
    assert optimized == {id(p) for r in low_ranks_of(model, "letters").values() for p in r.parameters()}
    config = TrainingConfig(objective=kind, **(SETTINGS | {"steps": 60}))
    metrics = train(model, sequences, config, out=tmp_path / "run", progress=False)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss"] < first["loss"] - 0.3
    assert equal(base, copies(base_tensors(model)))
    assert read_record(tmp_path / "run")["trainable_share"] == share < 1
    names = set(load_file(tmp_path / "run" / "checkpoint" / "model.safetensors"))
    assert names and all(".adapters.letters." in f".{name}" for name in names)  # nothing of the base is written
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert load_adapter(fresh, tmp_path / "run") == "letters"
    assert equal(copies(model.state_dict()), copies(fresh.state_dict()))
    with pytest.raises(InputError, match=r"This is an adapter, and no model by itself.*adapter=<this folder>"):
        load(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run already \(checkpoint\)"):
        train(model, sequences, config, out=tmp_path / "run", progress=False)


def test_an_adapter_that_was_stopped_goes_on_bit_for_bit(make_model, sequences, tmp_path, signal_in_step):
    def adapted(**options):
        model = make_model(**options)
        add_adapter(model, AdapterConfig(rank=2, dropout=0.2))
        return model

    config = TrainingConfig(**SETTINGS, gradient_checkpointing=True)
    whole, resumed = adapted(), adapted()
    train(whole, sequences, config, out=tmp_path / "whole", progress=False)
    signal_in_step(4)
    metrics = train(adapted(), sequences, config, out=tmp_path / "run", progress=False)
    assert metrics["interrupted"] and metrics["step"] == 4
    record = read_record(tmp_path / "run")
    assert record["status"] == "interrupted" and record["resumed"] == []
    train(resumed, sequences, config, out=tmp_path / "run", resume=True, progress=False)
    assert equal(copies(whole.state_dict()), copies(resumed.state_dict()))
    again = read_record(tmp_path / "run")
    assert again["status"] == "finished" and len(again["resumed"]) == 1
    assert (again["started"], again["start"]) == (record["started"], record["start"])
    assert record["start"] == fingerprint(adapted().state_dict())
    with pytest.raises(ConfigError, match="another frozen"):
        train(adapted(seed=1), sequences, config, out=tmp_path / "run", resume=True, progress=False)
    other = make_model()
    add_adapter(other, AdapterConfig(rank=2, dropout=0.3))
    with pytest.raises(ConfigError, match="another adapter"):
        train(other, sequences, config, out=tmp_path / "run", resume=True, progress=False)


def test_what_an_adapter_file_would_not_hold_is_refused(make_model, sequences, tmp_path):
    model = make_model()
    add_adapter(model, AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="frozen already"):
        train(model, sequences, TrainingConfig(trained="head", **SETTINGS), out=tmp_path, progress=False)
    model.head.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"head\.weight requires gradients"):
        train(model, sequences, TrainingConfig(**SETTINGS), out=tmp_path, progress=False)
    merge_adapter(model)
    with pytest.raises(ConfigError, match="Nothing is trained"):
        train(model, sequences, TrainingConfig(**SETTINGS), out=tmp_path, progress=False)


def test_head_alone(make_model, sequences, tmp_path):
    model = make_model()
    before = copies(model.state_dict())
    train(model, sequences, TrainingConfig(trained="head", **SETTINGS), out=tmp_path, progress=False)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.weight"]
    assert all(parameter.requires_grad for parameter in model.parameters())  # as it was
    assert set(load_file(tmp_path / "checkpoint" / "model.safetensors")) == {"head.weight"}


def test_shares_of_the_learning_rate_by_hand(make_model):
    shares = learning_rate_shares(make_model("causal"), 0.5)  # two blocks
    assert shares["head.weight"] == shares["backbone.norm.weight"] == 1
    assert {v for k, v in shares.items() if k.startswith("backbone.blocks.1.")} == {0.5}
    assert {v for k, v in shares.items() if k.startswith("backbone.blocks.0.")} == {0.25}
    assert shares["backbone.embedding.weight"] == 0.125
    assert set(learning_rate_shares(make_model("causal"), 1.0).values()) == {1.0}


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_each_block_learns_at_its_own_rate(kind, make_model):
    """AdamW's first step without decay moves every weight by its learning rate, whatever the gradient's size."""
    model = make_model(kind)
    optimizer = make_optimizer(model, TrainingConfig(steps=1, layer_decay=0.5, weight_decay=0.0))
    before = copies(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    shares = learning_rate_shares(model, 0.5)
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * shares[name]), rtol=1e-3, atol=1e-5)
    decayed = {(group["share"], group["weight_decay"]) for group in make_groups(model)}
    assert {(0.25, 0.1), (0.25, 0.0), (0.5, 0.1), (0.5, 0.0)} <= decayed


def make_groups(model):
    return make_optimizer(model, TrainingConfig(steps=1, layer_decay=0.5, weight_decay=0.1)).param_groups


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "tail"}, "trained is 'tail'; it can be all, head"),
        ({"layer_decay": 0.0}, "layer_decay is a factor"),
        ({"layer_decay": 1.5}, "layer_decay is a factor"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(steps=1, **settings)


def test_the_record_is_there_from_the_start_and_in_the_card(make_model, sequences, tmp_path, monkeypatch):
    seen, taken = [], plain.gradient_step

    def looking(*args, **kwargs):
        seen.append(read_record(tmp_path))
        return taken(*args, **kwargs)

    monkeypatch.setattr(plain, "gradient_step", looking)
    card = ModelCard(data={"file": "words.txt", "sha256": "0"}, recipe={"name": "words"})
    model = make_model()
    train(model, sequences, TrainingConfig(seed=3, **SETTINGS), out=tmp_path, card=card, progress=False)
    begun, ended = seen[0], read_record(tmp_path)
    assert begun["status"] == "running" and begun["finished"] is None and begun["metrics"] == {}
    assert ended["status"] == "finished" and ended["finished"] >= ended["started"]
    changed = {key for key in ended if begun[key] != ended[key]}
    assert changed == {"status", "finished", "metrics"}
    assert begun["recipe"]["name"] == "words" and begun["recipe"]["training"]["seed"] == begun["seed"] == 3
    assert begun["data"]["sha256"] == "0" and len(begun["data"]["tokens_hash"]) == 16
    assert begun["start"] == fingerprint(make_model().state_dict()) and {"torch", "processive"} <= set(
        begun["versions"]
    )
    run = json.loads((tmp_path / "config.json").read_text())["card"]["run"]
    assert run["start"] == begun["start"] and run["finished"] == ended["finished"]
    assert "| start |" in (tmp_path / "README.md").read_text()


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None  # no repository
    assert git_state(tmp_path / "absent") is None

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["changed"] is False
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "changed": True}
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "module").write_text("")
    assert git_state(tmp_path / "installed") is None  # a package inside somebody's repository, but not of it

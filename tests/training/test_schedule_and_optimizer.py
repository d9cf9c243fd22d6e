"""Learning rate, decay groups, and the settings that are refused."""

from __future__ import annotations

import pytest
import torch
from processive.errors import ConfigError, InputError
from processive.training import TrainingConfig, read_metrics, train
from processive.training.optimizer import (
    clip_gradients,
    decays,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from processive.training.schedule import SCHEDULES, warmup_cosine, warmup_linear
from torch import nn


@pytest.mark.parametrize(
    ("done", "factor"), [(0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.6), (1, 0.2), (1.5, 0.2)], ids=str
)
def test_schedule_by_hand(done, factor):
    assert warmup_cosine(done, warmup=0.1, floor=0.2) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("done", "factor"), [(0, 0), (0.05, 0.5), (0.1, 1), (0.325, 0.8), (0.55, 0.6), (1, 0.2), (1.5, 0.2)], ids=str
)
def test_a_straight_schedule_by_hand(done, factor):
    assert warmup_linear(done, warmup=0.1, floor=0.2) == pytest.approx(factor)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_without_warmup_and_with_nothing_else(schedule):
    factor = SCHEDULES[schedule]
    assert factor(0, warmup=0, floor=0.1) == 1
    assert factor(0.5, warmup=1, floor=0.1) == 0.5
    assert factor(1, warmup=1, floor=0.1) == pytest.approx(0.1)


def test_the_loop_follows_the_schedule(make_model, sequences, tmp_path):
    config = TrainingConfig(steps=4, warmup=0.25, floor=0.0, learning_rate=1.0, log_every=1, schedule="linear")
    train(make_model(), sequences, config, out=tmp_path / "run", progress=False)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_only_weight_matrices_decay(make_model):
    chosen = decays(make_model("causal"))
    assert {name for name, yes in chosen.items() if yes} == {
        name
        for name, parameter in make_model("causal").named_parameters()
        if parameter.ndim > 1 and "bias" not in name and "norm" not in name and name != "backbone.embedding.weight"
    }
    assert any(chosen.values()) and chosen["head.weight"] and not chosen["backbone.norm.weight"]
    assert decays(make_model("causal"), embeddings=True)["backbone.embedding.weight"]


def test_frozen_parameters_are_left_alone():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert decays(layer) == {"bias": False}
    assert len(make_optimizer(layer, TrainingConfig(steps=1)).param_groups) == 1


def test_decay_reaches_the_weight_and_not_the_bias():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = make_optimizer(layer, TrainingConfig(steps=1, learning_rate=0.1, weight_decay=0.5))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before[0] * 0.95)
    assert torch.equal(layer.bias.detach(), before[1])


@pytest.mark.parametrize(("limit", "scale"), [(2.5, 0.5), (5.0, 1.0), (100.0, 1.0), (0.0, 1.0)])
def test_clipping_by_hand(limit, scale):
    model = nn.Linear(2, 1)
    optimizer = make_optimizer(model, TrainingConfig(steps=1))
    assert clip_gradients(optimizer, limit) == 0.0  # nothing has a gradient yet
    model.weight.grad, model.bias.grad = torch.tensor([[0.0, 3.0]]), torch.tensor([-4.0])
    assert clip_gradients(optimizer, limit) == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.0, 3.0 * scale]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.bias.grad, torch.tensor([-4.0 * scale]), rtol=1e-6, atol=0)


def test_optimizer_state_of_another_model():
    small, large = nn.Linear(2, 2), nn.Linear(3, 3)
    optimizer = make_optimizer(small, TrainingConfig(steps=1))
    for parameter in small.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(small, optimizer)
    with pytest.raises(InputError, match="shape of weight"):
        load_optimizer_tensors(large, make_optimizer(large, TrainingConfig(steps=1)), tensors)
    with pytest.raises(InputError, match="another model"):
        load_optimizer_tensors(small, optimizer, {"other/step": torch.zeros(())})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Exactly one of steps, epochs and minutes .* none"),
        ({"steps": 1, "minutes": 1.0}, "steps, minutes"),
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"minutes": -1.0}, "minutes must be positive"),
        ({"steps": 1, "objective": "guess"}, "objective is 'guess'"),
        ({"steps": 1, "precision": "fp8"}, "precision is 'fp8'"),
        ({"steps": 1, "batch_tokens": 0}, "batch_tokens must be positive"),
        ({"steps": 1, "max_length": 1}, "max_length must be at least 2"),
        ({"steps": 1, "warmup": 1.5}, "warmup is a share"),
        ({"steps": 1, "mask_share": 0.0}, "mask_share"),
        ({"steps": 1, "clip": -1.0}, "cannot be negative"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**settings)

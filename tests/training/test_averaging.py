"""Averages of weights and TIES merging, each against numbers worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.backbones.layers import Linear
from processive.errors import ConfigError, InputError
from processive.models import AdapterConfig, LanguageModel, add_adapter, load, use_adapter, used_adapter
from processive.models.adapters import low_ranks_of
from processive.sequences import IdTokenizer
from processive.training import (
    TrainingConfig,
    average,
    average_runs,
    greedy_average,
    read_snapshots,
    ties,
    ties_adapters,
    ties_models,
    train,
)
from torch import nn


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def plain(state):
    return {name: tensor.tolist() for name, tensor in state.items()}


def test_average_by_hand():
    states = [tensors(w=[1.0, 2.0], n=7), tensors(w=[3.0, 6.0], n=7), tensors(w=[5.0, 1.0], n=7)]
    assert plain(average(states)) == {"w": [3.0, 3.0], "n": 7}
    assert plain(average(states[:1])) == plain(states[0])
    large = [{"w": torch.tensor([60000.0], dtype=torch.float16)}] * 3  # whose sum is not a float16
    assert plain(average(large)) == {"w": [60000.0]} and average(large)["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "nothing to average"),
        ([{"w": [1.0]}, {"v": [1.0]}], "do not both have v"),
        ([{"w": [1.0]}, {"w": [1.0, 2.0]}], r"shapes \[1\] and \[2\]"),
        ([{"w": [1]}, {"w": [2]}], "integers that differ"),
    ],
    ids=str,
)
def test_what_has_no_average(states, message):
    with pytest.raises(ConfigError, match=message):
        average([tensors(**state) for state in states])


def test_greedy_average_by_hand():
    """The loss is the distance from 2: 1 first; with 4 the mean is 2.5, better; with 10 it would be 5, worse."""
    states = [tensors(w=[10.0]), tensors(w=[1.0]), tensors(w=[4.0])]
    tried = []

    def loss_of(state):
        tried.append(float(state["w"]))
        return abs(tried[-1] - 2)

    state, members = greedy_average(states, [8.0, 1.0, 2.0], loss_of)
    assert plain(state) == {"w": [2.5]} and members == [1, 2] and tried == [2.5, 5.0]
    with pytest.raises(ConfigError, match="3 states and 1 losses"):
        greedy_average(states, [1.0], loss_of)
    with pytest.raises(ConfigError, match="nothing to average"):
        greedy_average([], [], loss_of)


TASKS = [
    {"a": [4.0, -1.0], "b": [3.0, 0.5]},  # the two largest: 4 and 3
    {"a": [-2.0, 5.0], "b": [1.0, -1.0]},  # 5 and -2, none of b
    {"a": [2.0, -3.0], "b": [0.0, 1.0]},  # -3 and 2
]
# sums of what is kept: 4 - 2 + 2 = 4, 5 - 3 = 2, 3, 0; means of those with that sign: (4 + 2) / 2, 5, 3, none
MERGED = {"a": [3.0, 5.0], "b": [3.0, 0.0]}


def test_ties_by_hand():
    tasks = [tensors(**task) for task in TASKS]
    assert plain(ties(tasks, density=0.5)) == MERGED
    # nothing trimmed: sums 4, 1, 4, 0.5; means (4 + 2) / 2, 5, (3 + 1) / 2, (0.5 + 1) / 2
    assert plain(ties(tasks, density=1.0)) == {"a": [3.0, 5.0], "b": [2.0, 0.75]}
    assert plain(ties(tasks[:1], density=0.25)) == {"a": [4.0, 0.0], "b": [0.0, 0.0]}
    # opposite and equal: no sign wins
    assert plain(ties([tensors(a=[1.0]), tensors(a=[-1.0])], density=1.0)) == {"a": [0.0]}
    # a tensor that one task does not have
    assert plain(ties([tensors(a=[2.0]), tensors(b=[4.0])], density=1.0)) == {"a": [2.0], "b": [4.0]}


def test_ties_of_whole_models_by_hand():
    base = tensors(a=[1.0, 1.0], b=[1.0, 1.0], steps=3)
    tuned = [{**{k: base[k] + torch.tensor(v) for k, v in task.items()}, "steps": torch.tensor(9)} for task in TASKS]
    merged = ties_models(base, tuned, density=0.5, scale=0.5)
    assert plain(merged) == {"a": [2.5, 3.5], "b": [2.5, 1.0], "steps": 3}
    with pytest.raises(ConfigError, match="do not both have steps"):
        ties_models(base, [tensors(a=[1.0, 1.0], b=[1.0, 1.0])])


@pytest.mark.parametrize("density", [0, 1.5])
def test_ties_that_cannot_be(density):
    with pytest.raises(ConfigError, match="density is a share"):
        ties([tensors(a=[1.0])], density=density)
    with pytest.raises(ConfigError, match="nothing to merge"):
        ties([])
    with pytest.raises(ConfigError, match="a has not the same shape"):
        ties([tensors(a=[1.0]), tensors(a=[1.0, 2.0])])


def test_ties_of_adapters_by_hand():
    model = nn.Sequential(Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    for number, task in enumerate(TASKS):  # up is the identity times 2, and the scale 1 / 2
        add_adapter(model, AdapterConfig(rank=2, alpha=1.0, targets=("0",)), f"task{number}")
        (low_rank,) = low_ranks_of(model, f"task{number}").values()
        low_rank.down.data = torch.tensor([task["a"], task["b"]])
        low_rank.up.data = 2 * torch.eye(2)
    names = ["task0", "task1", "task2"]
    assert ties_adapters(model, names, density=0.5) == pytest.approx(1)
    assert used_adapter(model) == "merged"
    torch.testing.assert_close(model(torch.eye(2)).T, torch.tensor([MERGED["a"], MERGED["b"]]), atol=1e-5, rtol=1e-5)
    # of [[3, 5], [3, 0]]: the squared singular values sum to 43 and their product is 15^2
    first = (43 + (43**2 - 4 * 15**2) ** 0.5) / 2
    assert ties_adapters(model, names, "small", density=0.5, scale=2.0, rank=1) == pytest.approx(first / 43)
    (low_rank,) = low_ranks_of(model, "small").values()
    assert low_rank.up.shape == (2, 1) and low_rank.delta().square().sum().item() == pytest.approx(4 * first, rel=1e-5)
    with pytest.raises(ConfigError, match="no adapter 'task7'"):
        ties_adapters(model, ["task0", "task7"], "x")
    with pytest.raises(ConfigError, match="an adapter 'merged' already"):
        ties_adapters(model, names)


@pytest.mark.parametrize(
    "config", [XLSTMConfig(12, 16, 2, heads=2, blocks=("mlstm", "slstm")), TransformerConfig(12, 16, 2, heads=2)]
)
def test_ties_of_one_adapter_is_that_adapter(config):
    model = LanguageModel(IdTokenizer(12), config).eval()
    add_adapter(model, AdapterConfig(rank=3, targets=("*",)), "one")
    for low_rank in low_ranks_of(model, "one").values():
        nn.init.normal_(low_rank.up.data)
    whole = low_ranks_of(model, "one")
    ties_adapters(model, ["one"], density=1.0)
    for name, low_rank in low_ranks_of(model, "merged").items():
        torch.testing.assert_close(low_rank.delta(), whole[name].delta(), rtol=1e-4, atol=1e-4)
    use_adapter(model, None)
    assert used_adapter(model) is None


@pytest.fixture
def base():
    return LanguageModel(IdTokenizer(12), XLSTMConfig(12, 16, 2, heads=2, blocks=("mlstm", "slstm")), name="ids")


def test_average_of_runs_with_one_start(base, sequences, tmp_path):
    runs = []
    for seed in (1, 2):
        model = copy.deepcopy(base)
        config = TrainingConfig(steps=4, batch_tokens=80, seed=seed)
        train(model, sequences, config, out=tmp_path / str(seed), progress=False)
        runs.append(model)
    mean = average_runs([tmp_path / "1", tmp_path / "2"])
    assert not torch.equal(runs[0].head.weight, runs[1].head.weight)
    for (name, tensor), one, other in zip(
        mean.state_dict().items(), *(m.state_dict().values() for m in runs), strict=True
    ):
        torch.testing.assert_close(tensor, (one + other) / 2, msg=name)
    mean.save(tmp_path / "mean")
    assert "average of" in load(tmp_path / "mean").card.source
    with torch.no_grad():
        base.head.weight[0, 0] += 1.0
    train(base, sequences, TrainingConfig(steps=1, batch_tokens=80), out=tmp_path / "3", progress=False)
    with pytest.raises(ConfigError, match=r"1 and .*3 began with different weights.*head included"):
        average_runs([tmp_path / "1", tmp_path / "3"])
    with pytest.raises(ConfigError, match=r"mean has no record.json"):
        average_runs([tmp_path / "1", tmp_path / "mean"])


def test_snapshots_are_kept_and_averaged(base, sequences, tmp_path):
    config = TrainingConfig(steps=12, batch_tokens=80, snapshot_every=3)
    train(base, sequences, config, out=tmp_path, progress=False)
    snapshots = read_snapshots(tmp_path)
    assert list(snapshots) == [3, 6, 9, 12]
    last = base.state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in snapshots[12].items())
    assert set(snapshots[12]) == set(last) and not torch.equal(snapshots[9]["head.weight"], last["head.weight"])
    base.load_state_dict(average([snapshots[9], snapshots[12]]))
    torch.testing.assert_close(
        base.head.weight.detach(), (snapshots[9]["head.weight"] + snapshots[12]["head.weight"]) / 2
    )
    with pytest.raises(InputError, match="kept no snapshots"):
        read_snapshots(tmp_path / "absent")

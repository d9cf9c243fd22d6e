"""Training under DeepSpeed equals training in one process: curves, exports, resuming, whatever is shared out.

The runs are made by cases.py in two gloo processes, then in one, then in two again; the tests look at what they left.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, InputError, MissingExtra
from processive.training import EngineConfig, loop, read_metrics, read_record
from processive.training.batches import even_share
from processive.training.data import Pieces
from processive.training.engines import check_share
from processive.training.engines.deepspeed import _reached
from processive.training.engines.processes import environments
from processive.training.lanes import Lanes
from processive.training.step import loss_sum
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import cases

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'processive[scale]'"
)
# An sLSTM's input gate has a bias that cancels in c / n: its gradient is rounding, of which AdamW makes whole steps.
NOISE = "backbone.blocks.1.bias"
SCRIPT = Path(__file__).with_name("cases.py")
LONG_RUNS = [("whole", "xlstm"), ("whole", "transformer"), ("carry", "xlstm"), ("carry", "transformer")]


def run(phase: str, folder: Path, *, processes: int) -> None:
    """Make the runs of a phase, without compiler and ninja on the PATH."""
    alone = [{name: value for name, value in os.environ.items() if name != "RANK"}]
    children = [
        subprocess.Popen(
            [sys.executable, SCRIPT, phase, folder],
            env={**environment, "PATH": "/nonexistent", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in (environments(processes) if processes > 1 else alone)
    ]
    try:
        said = [child.communicate(timeout=900)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert not any(child.returncode for child in children), "\n".join(text[-3000:] for text in said)
    assert said == [""] * len(children), said  # neither DeepSpeed nor torch is heard


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs, made once by whichever of pytest's workers comes first."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "engines"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(0.1)
        return folder
    try:
        make_runs(folder)
    finally:
        (folder / "done").touch()
    return folder


def make_runs(folder: Path) -> None:
    run("two", folder, processes=2)
    run("one", folder, processes=1)
    run("two_again", folder, processes=2)
    plain = EngineConfig()
    for kind in cases.KINDS:
        cases.fit(cases.model(kind), cases.settings(kind), folder / f"{kind}-plain", plain)
    for kind in cases.KINDS:
        config = cases.settings(kind, steps=8, accumulation=1)
        cases.fit(cases.model(kind, dropout=0.0), config, folder / f"{kind}-shared-plain", plain)
    cases.frozen_runs(folder, "plain", plain)
    cases.electra_run(folder, "plain", plain)
    cases.detector_run(folder, "plain", plain)
    cases.pairs_run(folder, "plain", plain)
    for how, kind in LONG_RUNS:
        cases.long_run(how, kind, folder / f"{how}-{kind}-plain", plain)
    few = cases.settings("transformer", steps=4)
    cases.fit(cases.model("transformer", contacts=True), few, folder / "contacts-plain", plain)
    few = cases.settings("xlstm", steps=4, precision="bf16")
    cases.fit(cases.model("xlstm"), few, folder / "bf16-plain", plain)
    few = cases.settings("xlstm", steps=4, clip=0.0, learning_rate=1e-2)
    cases.fit(cases.model("xlstm"), few, folder / "unclipped-plain", plain)


def assert_same_curve(one: Path, other: Path, *, atol: float = 1e-5) -> None:
    """Losses, gradient norms, learning rates, tokens and validation losses of every step."""
    first, second = read_metrics(one), read_metrics(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert [a[k] for k in ("step", "epoch", "tokens")] == [b[k] for k in ("step", "epoch", "tokens")]
        assert ("validation_loss" in a) == ("validation_loss" in b)
        for name in ("loss", "learning_rate", "gradient_norm", "validation_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=atol, rel=1e-5), (a["step"], name)


def assert_same_tensors(one: Path, other: Path, *, atol: float) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name in first:
        a, b = (tensors[name][1:] if name == NOISE else tensors[name] for tensors in (first, second))
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@needs_deepspeed
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_processes_that_share_each_batch_equal_one(runs, kind, stage):
    own, plain = runs / f"{kind}-shared-{stage}", runs / f"{kind}-shared-plain"
    assert len(read_metrics(own)) == 8
    assert_same_curve(own, plain)
    assert_same_tensors(own / "model.safetensors", plain / "model.safetensors", atol=2e-5)


@needs_deepspeed
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("stage", range(4))
def test_curve_and_export_of_each_stage_equal_those_of_one_process(runs, kind, stage):
    own, plain = runs / f"{kind}-{stage}", runs / f"{kind}-plain"
    assert len(read_metrics(own)) == 20
    assert_same_curve(own, plain)
    assert_same_tensors(own / "model.safetensors", plain / "model.safetensors", atol=2e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(own / "checkpoint" / file, plain / "checkpoint" / file, atol=2e-5)
    engine = read_record(own)["machine"]["engine"]
    assert engine == {**asdict(EngineConfig("deepspeed", zero_stage=stage)), "processes": 2}


@needs_deepspeed
def test_offload_changes_no_curve(runs):
    assert_same_curve(runs / "xlstm-offloaded", runs / "xlstm-plain")


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_frozen_weights(runs, stage):
    for what, file in (("lora", "adapter.safetensors"), ("head", "model.safetensors")):
        own, plain = runs / f"{what}-{stage}", runs / f"{what}-plain"
        assert_same_curve(own, plain)
        assert_same_tensors(own / file, plain / file, atol=2e-5)
        assert_same_tensors(own / "checkpoint/model.safetensors", plain / "checkpoint/model.safetensors", atol=2e-5)
    before, after = cases.model("transformer").state_dict(), load_file(runs / f"head-{stage}" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) == name.startswith("backbone.") for name in before)


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_a_model_of_two_networks(runs, stage):
    own, plain = runs / f"electra-{stage}", runs / "electra-plain"
    assert len(read_metrics(own)) == 4
    assert_same_curve(own, plain, atol=1e-4)  # the detector's loss counts fifty times
    for part in ("model.safetensors", "checkpoint/model.safetensors"):
        assert_same_tensors(own / part, plain / part, atol=2e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", (0, 3))
@pytest.mark.parametrize("what", ["detector", "pairs"])
def test_what_is_taught_beside_tokens(runs, what, stage):
    own, plain = runs / f"{what}-{stage}", runs / f"{what}-plain"
    assert len(read_metrics(own)) == 2
    assert_same_curve(own, plain)
    for part in ("model.safetensors", "checkpoint/model.safetensors"):
        assert_same_tensors(own / part, plain / part, atol=2e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("run", "steps"),
    [*((f"whole-xlstm-{stage}", 2) for stage in range(4)), ("whole-transformer-3", 2), ("carry-transformer-3", 10)],
)
def test_long_sequences(runs, run, steps):
    """Of stage 3 with gradient checkpointing, too."""
    own, plain = runs / run, runs / f"{run[:-2]}-plain"
    assert len(read_metrics(own)) == steps
    assert_same_curve(own, plain)
    assert_same_tensors(own / "model.safetensors", plain / "model.safetensors", atol=2e-5)


@needs_deepspeed
def test_two_one_two_processes_carry_the_states_on(runs):
    own, plain = runs / f"carry-{cases.CHANGES}", runs / "carry-xlstm-plain"
    assert len(read_record(own)["resumed"]) == 2
    assert_same_curve(own, plain)
    assert_same_tensors(own / "model.safetensors", plain / "model.safetensors", atol=2e-5)


def test_a_batch_stays_with_its_process_while_others_end():
    """Of the lanes of the runs: its states are there."""
    pieces = Pieces(cases.long_texts())
    steps = Lanes(pieces.lengths, pieces.order(seed=0, epoch=0), tokens=4, lanes=2, batches=4)
    shares = [[even_share(step, rank=rank, world_size=2) for rank in range(2)] for step in steps]
    numbers = [[[(n, counted) for n, _, counted in share] for share in both] for both in shares]
    assert numbers[:7] == [[[(0, True), (2, True)], [(1, True), (3, True)]]] * 7
    assert numbers[7:] == [[[(0, True)], [(3, True)]], *[[[(3, False)], [(3, True)]]] * 3]


@needs_deepspeed
def test_weights_without_gradient_are_left_alone(runs):
    before = cases.model("transformer", contacts=True).contacts.weight
    assert_same_curve(runs / "contacts-2", runs / "contacts-plain")
    for name in ("contacts-2", "contacts-plain"):
        for file in (runs / name / "model.safetensors", runs / name / "checkpoint/model.safetensors"):
            assert torch.equal(load_file(file)["contacts.weight"], before)


@needs_deepspeed
def test_clip_0_does_not_clip(runs):
    assert max(line["gradient_norm"] for line in read_metrics(runs / "unclipped-plain")) > 1
    assert_same_curve(runs / "unclipped-2", runs / "unclipped-plain")
    assert_same_tensors(runs / "unclipped-2/model.safetensors", runs / "unclipped-plain/model.safetensors", atol=2e-5)


@needs_deepspeed
def test_bf16_is_autocast(runs):
    assert_same_curve(runs / "bf16-3", runs / "bf16-plain", atol=2e-3)
    assert {t.dtype for t in load_file(runs / "bf16-3" / "model.safetensors").values()} == {torch.float32}


@needs_deepspeed
def test_two_one_two_processes_continue_the_curve(runs):
    assert_same_curve(runs / cases.CHANGES, runs / "xlstm-plain")
    assert_same_tensors(
        runs / cases.CHANGES / "model.safetensors", runs / "xlstm-plain" / "model.safetensors", atol=2e-5
    )
    record = read_record(runs / cases.CHANGES)
    assert len(record["resumed"]) == 2 and record["machine"]["engine"]["zero_stage"] == 1


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_equals_uninterrupted(runs, stage):
    own, whole = runs / f"resumed-{stage}", runs / f"xlstm-{stage}"
    assert_same_curve(own, whole, atol=1e-6)
    assert_same_tensors(own / "model.safetensors", whole / "model.safetensors", atol=1e-6)


@needs_deepspeed
def test_accumulation_is_a_multiple_of_the_processes(runs):
    said = (runs / "odd.txt").read_text()
    assert "accumulation is 3" in said and "2 processes" in said
    assert not (runs / "odd").exists()


def test_without_deepspeed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtra, match=r"processive\[scale\]"):
        cases.fit(cases.model("xlstm"), cases.settings("xlstm"), tmp_path / "run", EngineConfig("deepspeed"))
    assert not (tmp_path / "run").exists()


def test_the_plain_engine_is_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes"):
        cases.fit(cases.model("xlstm"), cases.settings("xlstm"), tmp_path / "run", EngineConfig())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", cases.LONG)
def test_processes_that_share_a_batch_have_no_state(how):
    config = cases.settings("xlstm", **cases.LONG[how])
    check_share(EngineConfig("deepspeed"), config, 2)
    with pytest.raises(ConfigError, match=rf'long="{how}".*sequence_processes = 2'):
        check_share(EngineConfig("deepspeed", sequence_processes=2), config, 2)


def test_settings_are_checked():
    for wrong in ({"name": "horovod"}, {"zero_stage": 4}, {"offload_optimizer": True}):
        with pytest.raises(ConfigError):
            EngineConfig(**wrong)
    with pytest.raises(ConfigError):
        EngineConfig("deepspeed", zero_stage=0, offload_optimizer=True)


def test_processive_does_not_import_deepspeed():
    code = "import sys, processive.training, processive.cli; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_deepspeed
def test_what_deepspeed_would_fill_in_is_written():
    from processive.training.engines.deepspeed import deepspeed_settings

    config = cases.settings("xlstm", clip=0.0, accumulation=6)
    made = deepspeed_settings(config, EngineConfig("deepspeed", zero_stage=1), world_size=2, parameters=100)
    assert made["gradient_clipping"] == 0.0 and made["zero_optimization"]["stage"] == 1
    triple = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [made[name] for name in triple] == [6, 1, 3]
    assert json.dumps(made)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_one_token_does_not_stand_for_the_data(kind):
    """With no next token to predict, weights would seem out of reach, and DeepSpeed would leave them as they are."""
    model = cases.model(kind)
    example = loop._example(model, Pieces([np.array([3]), *cases.words(5)]), cases.settings(kind))
    assert example.weight > 0
    reached = _reached(loss_sum(model, example))
    assert all(id(parameter) in reached for parameter in model.parameters())
    if kind == "xlstm":
        with pytest.raises(InputError, match="nothing to learn"):
            loop._example(model, Pieces([np.array([3])]), cases.settings(kind))

"""C-RTS through the loop: what is confused is counted, stands in the checkpoints, and steers the replacements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processive.errors import ConfigError
from processive.models import load
from processive.sequences import PackedBatch
from processive.sequences import tokenizer as tokenizers
from processive.training import (
    ClusterDetector,
    ClusterReplaced,
    EngineConfig,
    TrainingConfig,
    add_detector,
    objectives,
    read_metrics,
    train,
)
from processive.training.cluster_detector import clusters_of
from safetensors.torch import load_file

GROUPS = ["abc", "de"]  # and f, g and h, which are in none


@pytest.fixture
def make(make_model):
    def build(groups=GROUPS, *, dropout: float = 0.0) -> ClusterDetector:
        detector = make_model("masked", dropout=dropout)
        add_detector(detector)
        return ClusterDetector(detector, groups)

    return build


def test_clusters_by_hand(tokenizer):
    assert clusters_of(GROUPS, tokenizer.vocabulary).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert clusters_of(["abcd", "efgh"], tokenizer.vocabulary).max() == 1
    for groups in (["ab", "bc"], ["az"], [["a", "<eos>"]]):
        with pytest.raises(ConfigError, match="Group"):
            clusters_of(groups, tokenizer.vocabulary)


def test_the_loss_and_the_counts_by_hand(make, tokenizer):
    model = make()
    words = [tokenizer.encode(word) for word in ("abcdefgh", "ddaa")]
    batch, data = PackedBatch.from_sequences(words), ClusterReplaced(words, share=0.5)
    found = data.objective(batch, np.arange(2), model)
    assert found.weight == 12
    model.counts[0, 1] = 9  # so that the counts matter
    before = model.counts.clone()
    model.eval()
    loss = found.loss_sum(model)
    assert loss.item() == found.loss_sum(model).item()  # in evaluation the draws are the same
    assert torch.equal(model.counts, before)  # and nothing is counted

    def by_hand(draws):
        vocabulary, counts = model.detector.vocabulary, before.float()
        seen = objectives.cluster_replaced(batch, vocabulary, draws, clusters=model.clusters, counts=counts, share=0.5)
        answers = model.detector.task(model.detector.backbone(seen.batch)[0], seen.batch, vocabulary)[:, 0]
        return seen.batch.tokens, answers

    after, answers = by_hand(torch.Generator().manual_seed(0))
    changed = after != batch.tokens
    wanted = F.binary_cross_entropy_with_logits(answers, changed.float(), reduction="none")[batch.tokens >= 4].sum()
    assert 0 < changed.sum() < 12 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    model.train()
    torch.manual_seed(7)
    found.loss_sum(model)
    after, answers = by_hand(torch.manual_seed(7))  # dropout follows from the same generator
    for i in (after != batch.tokens).nonzero()[:, 0].tolist():
        row, column = (int(model.clusters[tokens[i]]) for tokens in (batch.tokens, after))
        before[row, column] += 1 if answers[i] <= 0 else -1
    assert torch.equal(model.counts, before)


def test_it_learns_and_the_detector_is_kept(make, sequences, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "tokenizer_class", {"letters": type(tokenizer)}.__getitem__)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = ClusterReplaced(sequences, share=0.3)
    config = TrainingConfig(steps=60, batch_tokens=400, learning_rate=2e-2, log_every=1, validate_every=60)
    metrics = train(model, data, config, out=tmp_path, validation=data, progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    guessing = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)  # 0.61 nats: who knows the share and nothing else
    assert np.mean(losses[-5:]) < guessing - 0.06 and metrics["validation_loss"] < guessing - 0.06
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    idle = {name for name in before if name.startswith("detector.head.")}
    assert changed == before.keys() - idle and idle and "counts" in changed
    assert changed == load_file(tmp_path / "checkpoint" / "model.safetensors").keys()
    back = load(tmp_path)
    assert back.task_config == model.detector.task_config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.detector.state_dict().items())


def test_a_killed_run_goes_on_bit_for_bit(make, sequences, tmp_path, interrupted):
    config = TrainingConfig(steps=6, batch_tokens=100, accumulation=2, checkpoint_every=2, log_every=1)
    data = ClusterReplaced(sequences, share=0.4)
    train(make(dropout=0.1), data, config, out=tmp_path / "whole", progress=False)
    with interrupted(3):
        train(make(dropout=0.1), data, config, out=tmp_path / "run", progress=False)
    stopped = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")["counts"]
    train(make(dropout=0.1), data, config, out=tmp_path / "run", resume=True, progress=False)
    for part in ("model.safetensors", "checkpoint/model.safetensors"):
        one, other = (load_file(tmp_path / name / part) for name in ("whole", "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(torch.stack([torch.ones_like(stopped), stopped, other["counts"]]).unique(dim=0)) == 3
    lines = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    with pytest.raises(ConfigError, match=r"another model\.clusters"):
        train(make(["ab"], dropout=0.1), data, config, out=tmp_path / "run", resume=True, progress=False)


def test_what_is_refused(make, make_model, sequences, tmp_path):
    config, data = TrainingConfig(steps=1), ClusterReplaced(sequences)
    with pytest.raises(ConfigError, match=r"learned by training\.ClusterDetector"):
        train(make_model("masked"), data, config, out=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="must read both ways"):
        ClusterDetector(make_model(), GROUPS)
    with pytest.raises(ConfigError, match="the model has none"):
        ClusterDetector(make_model("masked"), GROUPS)
    with pytest.raises(ConfigError, match="share lies between"):
        ClusterReplaced(sequences, share=1.0)
    with pytest.raises(ConfigError, match="needs the engine plain"):
        train(make(), data, config, out=tmp_path, engine=EngineConfig("deepspeed"), progress=False)
    assert not list(tmp_path.iterdir())


def test_processes_that_met_before_do_not_matter(make, sequences, tmp_path):
    """As in a notebook in which DeepSpeed has trained another model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = train(make(), ClusterReplaced(sequences), TrainingConfig(steps=1), out=tmp_path, progress=False)
    finally:
        dist.destroy_process_group()
    assert found["step"] == 1

"""A batch that processes share gives what it gives to one process, outputs and gradients, to the last digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processive.backbones import TransformerConfig
from processive.backbones.sequence_parallel import gather_tokens, with_all_tokens, with_neighbours
from processive.errors import ConfigError, ShapeError
from processive.kernels import attention, causal_conv1d, mlstm
from processive.sequences import PackedBatch, SequenceShare, share_batch
from processive.training import share_objective, sum_gradients
from processive.training.objectives import Objective

ODD = (1, 3)  # heads that two processes cannot share


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shared(batch: PackedBatch, bounds: tuple[int, ...], rank: int) -> PackedBatch:
    share = SequenceShare(batch, bounds, rank)
    tokens, positions = share.cut(batch.tokens), share.cut(batch.positions)
    return PackedBatch(tokens, batch.cu_seqlens, positions, batch.conditions, share)


def shared_by_two(batch: PackedBatch, rank: int = 0, cut: int | None = None) -> PackedBatch:
    """The share of one of two processes that cannot talk to each other: whatever they would say is an error."""
    tokens = len(batch.tokens)
    return shared(batch, (0, tokens // 2 if cut is None else cut, tokens), rank)


def exchanging(batch: PackedBatch) -> PackedBatch:
    """The share of a process that is alone, which exchanges with itself."""
    return shared(batch, (0, len(batch.tokens)), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes",
    [
        2,
        pytest.param(
            4,
            marks=pytest.mark.skipif(
                "PROCESSIVE_ALL_TESTS" not in os.environ, reason="takes minutes: set PROCESSIVE_ALL_TESTS=1"
            ),
        ),
    ],
)
def test_several_processes_equal_one(processes, cases, tmp_path):
    script = Path(__file__).with_name("shared_by_processes.py")
    commands = [[sys.executable, str(script), str(rank), str(processes), str(tmp_path)] for rank in range(processes)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        said = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), said
    for rank in range(processes):
        worst = json.loads((tmp_path / f"{rank}.json").read_text())
        names = {name.split(", ")[0] for name in worst}
        assert names >= {name for name, case in cases.items() if case.config.heads % processes == 0}
        kinds = {name.split(",")[0].split(" ")[0] for name in worst}
        assert kinds >= {"mlstm", "slstm", "attention", "convolution", "gathered", "training"}
        assert len(worst) > 200
        allowed = {name: 1e-6 if name.startswith("training") else 1e-12 for name in worst}  # the loss is in float32
        wrong = {name: error for name, error in worst.items() if not error <= allowed[name]}
        assert not wrong


def test_a_single_process_has_the_batch_itself(alone):
    batch = PackedBatch.from_sequences([[1, 2, 3], [4]])
    assert share_batch(batch) is batch and share_batch(batch, bounds=(0, 4)) is batch
    objective = Objective(batch, batch.tokens, torch.ones(4))
    assert share_objective(objective) is objective


def test_exchanging_with_itself(case, alone):
    """The same bits, with types and shapes checked, which the processes above do not do."""
    inputs = case.inputs([5, 1, 9])
    found = []
    for batch in (inputs.batch(), exchanging(inputs.batch())):
        network = case.fresh().double()
        hidden, _ = network(batch, memory=inputs.memory(torch.float64))
        hidden.square().sum().backward()
        sum_gradients(network.parameters())
        found.append([hidden.detach(), *(p.grad for p in network.parameters())])
    if case.config.complement is None:  # else tokens stand, and products are summed, in another order
        assert torch.equal(found[0][0], found[1][0])
    for want, got in zip(*found, strict=True):
        assert (got is None and want is None) or (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_heads_that_cannot_be_shared(case):
    batch = shared_by_two(case.inputs([5, 1, 9]).batch())
    if case.config.heads in ODD:
        message = f"{case.config.heads} heads cannot be shared by 2 processes"
        with pytest.raises(ConfigError, match=message):
            case.network(batch)
    else:
        with pytest.raises(ValueError, match="process group"):  # so the error above comes before anything is said
            case.network(batch)
    with pytest.raises(ConfigError, match="without a state"):
        case.network(batch, return_state=True)


def test_attention_maps_are_of_whole_sequences(cases):
    with pytest.raises(ConfigError, match="a share"):
        next(cases["encoder"].network.attention_maps(shared_by_two(cases["encoder"].inputs([5]).batch())))


def test_a_kernel_with_heads_that_cannot_be_shared():
    share = shared_by_two(PackedBatch.from_sequences([[1, 2, 3, 4]])).share
    q = torch.zeros(2, 3, 4)
    with pytest.raises(ConfigError, match=r"3 heads .* 2 processes.*3 is not divisible by 2"):
        with_all_tokens(share, attention, q, q, q)


def test_too_long_a_sequence_is_an_error_everywhere(cases):
    case = cases["encoder-absolute"]  # positions 0 to 87
    batch = case.inputs([89]).batch()
    for rank in range(2):
        with pytest.raises(Exception, match="A sequence reaches position 88"):
            case.network(shared_by_two(batch, rank))


def test_a_share_by_hand():
    batch = replace(
        PackedBatch.from_sequences([[7, 8, 9], [5], [4, 3]]), conditions={"species": torch.tensor([1, 2, 0])}
    )
    first, second = (shared_by_two(batch, rank, cut=2) for rank in range(2))
    assert first.tokens.tolist() == [7, 8] and second.tokens.tolist() == [9, 5, 4, 3]
    assert first.positions.tolist() == [0, 1] and second.positions.tolist() == [2, 0, 0, 1]
    assert first.sequence_ids.tolist() == [0, 0] and second.sequence_ids.tolist() == [0, 1, 2, 2]
    assert second.cu_seqlens.tolist() == [0, 3, 4, 6] and len(second) == 3 and second.lengths.tolist() == [3, 1, 2]
    assert second.conditions["species"].tolist() == [1, 2, 0]
    assert second.whole is batch and batch.whole is batch
    moved = second.to("meta")
    assert moved.share.whole.tokens.is_meta and moved.tokens.is_meta and moved.share.bounds == (0, 2, 6)


def test_positions_in_blanks_are_shared(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    whole = PackedBatch.from_sequences([[1, 2, 3, 4, 5]])
    share = share_batch(replace(whole, block_positions=torch.tensor([0, 0, 1, 2, 3])))
    assert share.tokens.tolist() == [3, 4, 5] and share.block_positions.tolist() == [1, 2, 3]
    assert share.to("meta").block_positions.is_meta and share_batch(whole).block_positions is None


def test_what_does_not_know_of_shares_does_not_run():
    batch = shared_by_two(PackedBatch.from_sequences([[1, 2, 3, 4]]))
    x = torch.zeros(2, 1, 4)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        attention(x, x, x, cu_seqlens=batch.cu_seqlens)


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 2, 5), (1, 2, 4), (0, 5, 4), (0,)])
def test_bounds_that_cannot_be(bounds, alone):
    batch = PackedBatch.from_sequences([[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="bounds"):
        share_batch(batch, bounds=bounds)
    if bounds != (0, 2, 4):
        with pytest.raises(ConfigError, match="no rise from 0 to 4"):
            SequenceShare(batch, bounds, 0)


def test_shares_that_cannot_be(alone):
    batch = PackedBatch.from_sequences([[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="share already"):
        share_batch(exchanging(batch))
    with pytest.raises(ConfigError, match="none with the number 1"):
        SequenceShare(batch, (0, 4), 1)
    with pytest.raises(ShapeError, match="tokens"):
        replace(batch, share=SequenceShare(batch, (0, 1, 4), 0))


def test_without_a_share_nothing_is_done():
    q, k, v, i, f = (torch.randn(6, 2, *size) for size in ((4,), (4,), (4,), (), ()))
    assert torch.equal(with_all_tokens(None, mlstm, q, k, v, i, f), mlstm(q, k, v, i, f))
    assert gather_tokens(q, None) is q


def test_a_share_of_one_in_kernels(alone):
    batch = exchanging(PackedBatch.from_sequences([[1, 2, 3, 4], [5, 6]]))
    x, weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    run = partial(causal_conv1d, weight=weight)
    got = with_neighbours(batch.share, run, x, reach=3, reverse=True)
    assert torch.equal(got, run(x, cu_seqlens=batch.cu_seqlens, reverse=True))
    assert torch.equal(gather_tokens(x, batch.share), x)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, batch.share), x)
    heads = torch.randn(6, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q: with_all_tokens(batch.share, lambda x, y: x.cumsum(0) * y, q, q + 1), heads
    )


def test_the_table_has_heads_of_either_kind(cases):
    """Guards the tests above."""
    heads = {case.config.heads for case in cases.values()}
    assert heads & set(ODD) and heads - set(ODD)
    grouped = {c.config.heads // c.config.kv_heads for c in cases.values() if isinstance(c.config, TransformerConfig)}
    assert grouped >= {1, 2, 4}

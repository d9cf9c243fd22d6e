"""Mixtures of sources by weight, shares of ranks, how full batches are, and training from stores."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.errors import ConfigError
from processive.sequences import TokenStore, unused_share
from processive.training import Mixture, TrainingConfig, checkpoint, loop, train
from processive.training.batches import endless, epoch_batches, rank_share, shuffled
from processive.training.data import Pieces
from processive.training.plan import plan

PROTEINS = Path(__file__).parents[3] / "shared" / "data" / "bio" / "protein" / "QUERY.fasta"


def flat(batches):
    return np.concatenate(list(batches)).tolist()


def test_an_endless_row_is_passes_one_after_the_other():
    passes = [shuffled(5, 7, n).tolist() for n in range(4)]
    row = [i for one in passes for i in one]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes) and passes[0] != passes[1]
    for begin in range(10):
        for taken in range(1, 10):
            assert endless(5, 7, begin=begin, taken=taken).tolist() == row[begin : begin + taken]


def test_a_mixture_reads_its_first_source_once_and_the_others_by_weight():
    new, old = [[1, 2]] * 30, [[3, 4, 5, 6]] * 7  # 60 tokens; a third of that is 20 tokens, 5 sequences
    pieces = Pieces(Mixture((new, old), (3.0, 1.0)))
    assert len(pieces) == 37 and [pieces[i].tolist() for i in (29, 30)] == [[1, 2], [3, 4, 5, 6]]
    read = Counter()
    for epoch in range(7):
        order = flat(pieces.batches(batch_tokens=16, seed=1, epoch=epoch))
        assert sorted(i for i in order if i < 30) == list(range(30))
        chosen = [i for i in order if i >= 30]
        assert len(chosen) == len(set(chosen) | set()) == 5 or epoch  # within a pass, none twice
        assert len(chosen) == 5
        assert order == flat(pieces.batches(batch_tokens=16, seed=1, epoch=epoch))
        read.update(chosen)
        first_old = [position for position, i in enumerate(order) if i >= 30]
        assert first_old != list(range(30, 35))  # shuffled among the others
    assert all(read[i] == 5 for i in range(30, 37))  # 7 epochs of 5 are 5 passes over 7


def test_a_mixture_has_a_fingerprint_of_its_own():
    a, b = [[1, 2]] * 30, [[3, 4, 5, 6]] * 7
    found = [Pieces(data).fingerprint() for data in (a, Mixture((a, b), (3, 1)), Mixture((a, b), (1, 1)), a + b)]
    assert len(set(found)) == 4


@pytest.mark.parametrize(("sources", "weights"), [(([[1]],), (1, 2)), ((), ()), (([[1]],), (0,))])
def test_weights_that_cannot_be(sources, weights):
    with pytest.raises(ConfigError, match="weights"):
        Mixture(sources, weights)


def test_a_mixture_resumes_in_the_middle(make_model, sequences, tmp_path):
    stores = tuple(
        TokenStore.write(tmp_path / name, part, vocabulary_size=12)
        for name, part in (("new", sequences[:25]), ("old", sequences[25:]))
    )
    data = Mixture(stores, (0.7, 0.3))
    whole, halves = make_model(seed=3), make_model(seed=3)
    config = TrainingConfig(steps=9, batch_tokens=60, log_every=1, checkpoint_every=4)
    train(whole, data, config, out=tmp_path / "whole", progress=False)

    class Stop(Exception):
        pass

    written = checkpoint.write_checkpoint

    def stopping(*arguments, **named):
        written(*arguments, **named)
        raise Stop

    loop.write_checkpoint = stopping
    try:
        with pytest.raises(Stop):
            train(halves, data, config, out=tmp_path / "halves", progress=False)
    finally:
        loop.write_checkpoint = written
    with pytest.raises(ConfigError, match="another data"):
        train(make_model(), Mixture(stores, (0.5, 0.5)), config, out=tmp_path / "halves", resume=True, progress=False)
    again = make_model(seed=8)
    train(again, data, config, out=tmp_path / "halves", resume=True, progress=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 9))
def test_ranks_share_every_batch_once(batches, world_size):
    wanted = [np.array([n]) for n in range(batches)]
    shares = [rank_share(wanted, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = sorted((number, batch.tolist()) for share in shares for number, batch in share)
    assert together == [(n, [n]) for n in range(batches)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_there_is_no_rank_beyond_the_last():
    with pytest.raises(ConfigError, match="no rank 2 among 2"):
        rank_share([], rank=2, world_size=2)


def test_an_epoch_over_ranks_is_the_epoch(sequences):
    pieces = Pieces(sequences)
    config = TrainingConfig(epochs=1, batch_tokens=60, accumulation=4)
    steps = list(islice(plan(pieces, config, loop.Standing()), 3))
    read = [
        i
        for step in steps
        for rank in range(3)
        for _, batch in rank_share(step.batches, rank=rank, world_size=3)
        for i in batch.tolist()
    ]
    assert sorted(read) == sorted(i for step in steps for batch in step.batches for i in batch.tolist())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=200), st.integers(0, 3))
def test_few_long_sequences_in_a_batch_lose_none(lengths, epoch):
    lengths = np.array(lengths)
    batches = epoch_batches(lengths, batch_tokens=50, seed=2, epoch=epoch)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= 50 or len(batch) == 1 for batch in batches)


def check_filling(lengths, batch_tokens):
    batches = epoch_batches(lengths, batch_tokens=batch_tokens, seed=0, epoch=0)
    full = [batch.tolist() for batch in batches][:-1]  # the last holds what is left
    assert unused_share(lengths, full, batch_tokens) < 0.05
    means = np.array([lengths[batch].mean() for batch in full])
    correlation = np.corrcoef(np.arange(len(full)), means)[0, 1]
    assert abs(correlation) < 0.5 or len(full) < 10  # lengths are not in an order
    return means


def test_batches_of_proteins_are_full_and_mixed():
    lengths = np.random.default_rng(0).lognormal(5.9, 0.75, 3000).astype(np.int64).clip(20, 4000)
    means = check_filling(lengths, 8192)
    assert means.std() < 2 * lengths.std() / np.sqrt(8192 / lengths.mean())


@pytest.mark.shared_data
@pytest.mark.skipif(not PROTEINS.exists(), reason="shared data is absent")
@pytest.mark.parametrize("batch_tokens", [2048, 4096, 8192])
def test_batches_of_the_proteins_are_full(batch_tokens):
    from processive import bio

    check_filling(np.array([len(record.text) + 2 for record in bio.read(PROTEINS)]), batch_tokens)


def test_training_from_a_store_equals_training_from_memory(make_model, sequences, tmp_path):
    store = TokenStore.write(tmp_path / "store", sequences, vocabulary_size=12)
    config = TrainingConfig(steps=4, batch_tokens=60, max_length=7)
    models = make_model(), make_model()
    for number, (model, data) in enumerate(zip(models, (sequences, store), strict=True)):
        train(model, data, config, out=tmp_path / str(number), progress=False)
    weights = [hashlib.sha256((tmp_path / f"{n}" / "model.safetensors").read_bytes()).hexdigest() for n in range(2)]
    assert weights[0] == weights[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of memory to read")
def test_batches_of_a_large_store_take_little_memory(tmp_path):
    """300 MB in sequences of 5,000 tokens: an epoch, read batch by batch in its shuffled order."""
    script = """
import sys
from processive.sequences import TokenStore
from processive.training.data import Pieces
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
pieces = Pieces(TokenStore(sys.argv[1]), max_length=512)
before = peak()
tokens = 0
for batch in pieces.batches(batch_tokens=8192, seed=0, epoch=0)[::20]:
    tokens += len(pieces.batch(batch, vocabulary_size=9).tokens)
print(peak() - before, tokens)
"""
    path = tmp_path / "store"
    rows = (np.full(5000, n % 9, np.uint8) for n in range(60_000))
    TokenStore.write(path, rows, vocabulary_size=9)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    grown, tokens = done.stdout.split()
    assert int(tokens) > 14_000_000 and float(grown) < 60

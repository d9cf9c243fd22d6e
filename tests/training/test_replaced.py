"""Replaced tokens: drawn uniformly, by clusters, and by a generator; no unchanged token is called replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.sequences import PackedBatch, Vocabulary
from processive.training import objectives
from processive.training.objectives.replaced import cluster_chances

ROLES = {"bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}
VOCABULARY = Vocabulary((*ROLES.values(), *"ACGT"), ROLES)  # of four letters a naive draw repeats each fourth
BOS, EOS, MASK, A, C, G, T = range(7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch(rng) -> PackedBatch:
    return PackedBatch.from_sequences([np.array([BOS, *rng.integers(3, 7, 1000), EOS]) for _ in range(50)])


def test_a_replaced_token_is_another_one(batch):
    found = objectives.replaced(batch, VOCABULARY, generator())
    changed = found.batch.tokens != batch.tokens
    assert torch.equal(changed.long(), found.targets)  # label noise 0
    assert torch.equal(found.weights, (batch.tokens >= 3).float())  # every ordinary token is asked about
    assert abs(changed.sum() / (batch.tokens >= 3).sum() - 0.15) < 0.006
    now = torch.bincount(found.batch.tokens[changed & (batch.tokens == C)], minlength=7).float()
    assert not now[:3].any() and now[C] == 0 and (now[[A, G, T]] / now.sum() - 1 / 3).abs().max() < 0.04


def test_cluster_chances_by_hand():
    counts = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -4.0, 4.0]])
    found = cluster_chances(counts, torch.tensor([2, 1, 1]), 2.0)
    # Row 0 scaled by itself: 0, 1, 1/2. Row 1 is all equal, and its own cluster has no other token. In row 2 likewise.
    e = np.exp
    one = np.array([e(0), e(2), e(1)]) / (e(0) + e(2) + e(1))
    three = np.array([e(1), e(0), 0]) / (e(1) + e(0))
    assert np.allclose(found.numpy(), [one, [0.5, 0, 0.5], three])


def test_replacements_come_from_the_clusters_that_are_confused(batch):
    clusters = torch.tensor([0, 0, 0, 0, 1, 0, 1])  # A and G, C and T
    counts = torch.tensor([[9.0, 1.0], [1.0, 1.0]])
    found = objectives.cluster_replaced(batch, VOCABULARY, generator(), clusters=clusters, counts=counts, share=0.5)
    changed = found.batch.tokens != batch.tokens
    assert torch.equal(changed.long(), found.targets) and torch.equal(found.weights, (batch.tokens >= 3).float())
    of_a = torch.bincount(found.batch.tokens[changed & (batch.tokens == A)], minlength=7).float()
    of_c = torch.bincount(found.batch.tokens[changed & (batch.tokens == C)], minlength=7).float()
    near = np.exp(2) / (np.exp(2) + 1)
    wanted = {G: near, C: (1 - near) / 2, T: (1 - near) / 2}
    assert all(abs(of_a[token] / of_a.sum() - share) < 0.02 for token, share in wanted.items())
    assert all(abs(of_c[token] / of_c.sum() - share) < 0.025 for token, share in {T: 0.5, A: 0.25, G: 0.25}.items())
    again = objectives.cluster_replaced(batch, VOCABULARY, generator(), clusters=clusters, counts=counts, share=0.5)
    assert torch.equal(again.batch.tokens, found.batch.tokens)
    none = PackedBatch.from_sequences([[BOS, EOS]])
    kept = objectives.cluster_replaced(none, VOCABULARY, generator(), clusters=clusters, counts=counts)
    assert torch.equal(kept.batch.tokens, none.tokens) and kept.weight == 0


def test_confusions_by_hand():
    clusters = torch.tensor([0, 0, 0, 0, 1, 0, 1])
    before, after = torch.tensor([BOS, A, A, C, T, G]), torch.tensor([BOS, C, C, T, A, G])
    wrong = torch.tensor([True, True, False, True, False, True])
    found = objectives.count_confusions(torch.ones(2, 2), clusters, before, after, wrong)
    assert found.tolist() == [[1.0, 1.0 + 1 - 1], [1.0 - 1, 1.0 + 1]]  # unchanged tokens do not count


def test_clusters_that_are_refused(batch):
    for clusters in (torch.zeros(3, dtype=torch.int64), torch.full((7,), 2)):
        with pytest.raises(ConfigError, match="cluster from 0 to 1"):
            objectives.cluster_replaced(batch, VOCABULARY, generator(), clusters=clusters, counts=torch.ones(2, 2))


def test_right_guesses_are_not_called_replaced(batch):
    guess = objectives.masked(batch, VOCABULARY, generator())
    at = guess.weights.nonzero()[:, 0]
    logits = torch.full((len(at), 7), -30.0)
    logits[:, MASK] = 90.0  # never guessed: it is special
    logits[:, A] = 0.0
    found = objectives.sampled(guess, logits, VOCABULARY, generator())
    assert (found.batch.tokens[at] == A).all()
    assert torch.equal(found.targets, (found.batch.tokens != batch.tokens).long())
    assert found.targets[at].sum() == (batch.tokens[at] != A).sum() > 0
    rest = guess.weights == 0
    assert torch.equal(found.batch.tokens[rest], batch.tokens[rest])
    assert torch.equal(found.weights, (batch.tokens >= 3).float())


def test_guesses_follow_the_generator(batch):
    guess = objectives.masked(batch, VOCABULARY, generator(), share=0.9)
    at = guess.weights.nonzero()[:, 0]
    logits = torch.log(torch.tensor([1, 1, 1, 0.1, 0.2, 0.3, 0.4])).expand(len(at), 7).clone().requires_grad_()
    found = objectives.sampled(guess, logits, VOCABULARY, generator())
    shares = torch.bincount(found.batch.tokens[at], minlength=7) / len(at)
    assert (shares - torch.tensor([0, 0, 0, 0.1, 0.2, 0.3, 0.4])).abs().max() < 0.01
    again = objectives.sampled(guess, logits, VOCABULARY, generator())
    assert torch.equal(again.batch.tokens, found.batch.tokens)
    with pytest.raises(ShapeError, match="logits"):
        objectives.sampled(guess, logits[1:], VOCABULARY, generator())
    nothing = objectives.masked(PackedBatch.from_sequences([[BOS]]), VOCABULARY, generator())
    assert objectives.sampled(nothing, logits[:0], VOCABULARY, generator()).weight == 0

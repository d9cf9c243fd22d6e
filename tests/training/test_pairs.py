"""Losses of pairs: two views, two towers, a preferred and a rejected sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.sequences import PackedBatch, Vocabulary
from processive.training.objectives import (
    causal,
    contrastive_loss,
    hard_negatives,
    matching_loss,
    preference_loss,
    preference_pairs,
    sequence_log_likelihoods,
    symmetric_divergence,
)

VOCABULARY = Vocabulary(("<bos>", "<eos>", "a", "b"), {"bos": "<bos>", "eos": "<eos>"})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = symmetric_divergence(p.log() + 3.0, q.log())  # logits are free up to a constant
    assert found[0].item() == pytest.approx(0.2 * math.log(9)) and found[1].item() == pytest.approx(0, abs=1e-7)


def test_divergence_is_symmetric_and_pulls_both_views():
    one, other = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    assert torch.allclose(symmetric_divergence(one, other), symmetric_divergence(other, one))
    symmetric_divergence(one, other).sum().backward()
    assert one.grad.abs().min() > 0 and other.grad.abs().min() > 0
    sure = torch.tensor([[300.0, 0.0]])
    assert symmetric_divergence(sure, -sure).isfinite().all()


def test_contrastive_by_hand():
    one = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    other = torch.tensor([[2.0, 0.0], [5.0, 5.0]])
    s = 0.5 * np.array([[1, math.sqrt(0.5)], [0, math.sqrt(0.5)]])  # temperature 2
    rows = [np.log(np.exp(s[i]).sum()) - s[i, i] for i in range(2)]
    columns = [np.log(np.exp(s[:, i]).sum()) - s[i, i] for i in range(2)]
    found = contrastive_loss(one, other, temperature=2.0)
    assert found.item() == pytest.approx((np.mean(rows) + np.mean(columns)) / 2, rel=1e-6)
    assert contrastive_loss(other, one, temperature=2.0).item() == pytest.approx(found.item(), rel=1e-6)


def test_pairs_of_one_group_are_partners():
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    other[1] = other[0]  # cells 0 and 1 have the same text
    groups = torch.tensor([7, 7, 1, 2])
    s = (torch.nn.functional.normalize(one, dim=1) @ torch.nn.functional.normalize(other, dim=1).T).double() / 0.5
    shares = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    wanted = -(shares * s.log_softmax(1)).sum() / 8 - (shares * s.T.log_softmax(1)).sum() / 8
    found = contrastive_loss(one, other, temperature=0.5, groups=groups)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    alone = contrastive_loss(one, other, temperature=0.5, groups=torch.arange(4))
    assert alone.item() == pytest.approx(contrastive_loss(one, other, temperature=0.5).item(), rel=1e-6)


def test_hard_negatives_are_similar_and_never_partners():
    one = torch.eye(4)
    other = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0.0, 0, 1, 0], [0.0, 0, 0.8, 1]])
    for seed in range(5):
        for_one, for_other = hard_negatives(one, other, generator(seed), temperature=0.02)
        assert for_one[0] == 1 and for_one[2] == 3 and for_other[1] == 0 and for_other[3] == 2
        assert (for_one != torch.arange(4)).all() and (for_other != torch.arange(4)).all()
    drawn = torch.stack(
        [hard_negatives(one[:3], other[:3], generator(seed), temperature=1.0)[0] for seed in range(2000)]
    )
    s = math.sqrt(0.9**2 / (0.9**2 + 1))  # of 0 and 1; 0 and 2 have none
    assert (drawn[:, 0] == 1).float().mean().item() == pytest.approx(math.exp(s) / (math.exp(s) + 1), abs=0.03)
    same = torch.tensor([0, 0, 0, 1])
    for_one, _ = hard_negatives(one, other, generator(), groups=same)
    assert for_one[:3].tolist() == [3, 3, 3]
    assert [part.tolist() for part in hard_negatives(one[:1], other[:1], generator())] == [[-1], [-1]]


def test_matching_by_hand():
    found = matching_loss(torch.tensor([0.0, math.log(3)]), torch.tensor([math.log(3)]))
    assert found.item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)


def test_pairs_that_are_refused():
    with pytest.raises(ShapeError, match="other"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="groups"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3), groups=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="temperature is 0"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
    with pytest.raises(ConfigError, match="beta"):
        preference_loss(*torch.zeros(4, 1), beta=0.0)
    with pytest.raises(ShapeError, match="log-likelihoods"):
        preference_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3))


def test_preference_by_hand():
    parts = torch.tensor([[-10.0, -3.0], [-12.0, -3.0], [-11.0, -3.0], [-11.5, -3.0]])
    found = preference_loss(*parts, beta=0.5)
    # The first pair: (-10 + 11) - (-12 + 11.5) = 1.5; the second: 0, which costs ln 2.
    assert found.item() == pytest.approx((math.log1p(math.exp(-0.75)) + math.log(2)) / 2)
    preferred, rejected = (parts[n].clone().requires_grad_() for n in range(2))
    preference_loss(preferred, rejected, parts[2], parts[3], beta=0.5).backward()
    assert (preferred.grad < 0).all() and torch.allclose(preferred.grad, -rejected.grad)
    assert preferred.grad[1].item() == pytest.approx(-0.5 * 0.5 / 2)  # beta times 1 - sigmoid(0), of two pairs


def test_likelihoods_by_hand():
    batch = PackedBatch.from_sequences([[0, 2, 1], [0, 3, 3, 1]])
    objective = causal(batch, VOCABULARY, generator())
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).expand(5, 4)
    found = sequence_log_likelihoods(logits, objective)
    assert found.tolist() == pytest.approx([math.log(0.3 * 0.2), math.log(0.4 * 0.4 * 0.2)])


def test_preference_pairs_by_hand():
    values = np.array([1.0, np.nan, 3.0, 2.0, 3.1])
    found = preference_pairs(values, gap=0.5, rng=np.random.default_rng(0))
    assert found.tolist() == [[2, 0], [2, 3], [3, 0], [4, 0], [4, 3]]  # 3.1 and 3.0 are too close
    few = preference_pairs(values, gap=0.5, most=1, rng=np.random.default_rng(0))
    assert [pair[0] for pair in few.tolist()] == [2, 3, 4] and set(map(tuple, few.tolist())) <= set(
        map(tuple, found.tolist())
    )
    assert preference_pairs(values[:1], gap=0.5, rng=np.random.default_rng(0)).shape == (0, 2)

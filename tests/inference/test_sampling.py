"""Filters by hand-made examples, draws by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.errors import ConfigError
from processive.inference.sampling import check_sampling, draw, filtered, uniforms

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # 4/9 is below half of what top_k left
        ({"top_k": 3, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ],
    ids=str,
)
def test_filters_by_hand(options, wanted):
    torch.testing.assert_close(
        filtered(LOGITS, **options), torch.tensor([wanted], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_of_equal_tokens_the_lower_ids_stay():
    flat = torch.zeros(1, 5)
    assert filtered(flat, top_k=2).tolist() == [[0.5, 0.5, 0, 0, 0]]
    assert filtered(flat, temperature=0).tolist() == [[1, 0, 0, 0, 0]]


def test_forbidden_tokens_stay_forbidden():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    for options in ({}, {"top_k": 3}, {"top_p": 1.0}, {"min_p": 0.01}, {"temperature": 5.0}):
        assert filtered(logits, **options)[0, 1] == 0


def test_draw_by_hand():
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).repeat(5, 1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(chances, numbers).tolist() == [1, 1, 3, 3, 3]


def test_draws_follow_the_probabilities():
    numbers = torch.from_numpy(uniforms(5, np.arange(40000), 0))
    found = torch.bincount(draw(filtered(LOGITS).repeat(40000, 1), numbers), minlength=4) / 40000
    torch.testing.assert_close(found.double(), filtered(LOGITS)[0], atol=0.01, rtol=0)  # four standard deviations


def test_uniforms_are_uniform_and_independent():
    table = np.stack([uniforms(0, np.arange(500), step) for step in range(200)])
    assert table.min() >= 0 and table.max() < 1
    assert abs(table.mean() - 0.5) < 0.004 and abs(table.var() - 1 / 12) < 0.001
    counts = np.histogram(table, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi square, 49 degrees of freedom, p = 3e-4
    for axis in (0, 1):  # neighbours in step and in sequence
        one, other = np.take(table, range(199), axis), np.take(table, range(1, 200), axis)
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.015
    assert len(np.unique(table)) == table.size


def test_a_draw_belongs_to_its_sequence():
    together = uniforms(7, np.arange(10), 3)
    assert uniforms(7, np.array([4]), 3)[0] == together[4]
    assert uniforms(7, np.array([8, 2]), 3).tolist() == together[[8, 2]].tolist()
    assert uniforms(8, np.arange(10), 3).tolist() != together.tolist() != uniforms(7, np.arange(10), 4).tolist()
    assert uniforms(-1, np.arange(2), 0).tolist() != uniforms(1, np.arange(2), 0).tolist()


@pytest.mark.parametrize(
    "options", [(-1.0, None, None, None), (1.0, 0, None, None), (1.0, None, 0.0, None), (1.0, None, None, 1.5)], ids=str
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigError):
        check_sampling(*options)

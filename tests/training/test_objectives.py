"""Objectives: what is read, what is asked, what counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.errors import ConfigError, ShapeError
from processive.sequences import PackedBatch, Vocabulary
from processive.training import objectives

ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>", "unk": "<unk>"}
VOCABULARY = Vocabulary((*ROLES.values(), *"abcdefgh"), ROLES)
PAD, BOS, EOS, MASK, UNK, A, B, C = range(8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_causal_by_hand():
    batch = PackedBatch.from_sequences([[BOS, A, B, EOS], [BOS], [], [BOS, C, UNK]])
    found = objectives.causal(batch, VOCABULARY, generator())
    assert found.batch.tokens.tolist() == [BOS, A, B, BOS, C]
    assert found.batch.cu_seqlens.tolist() == [0, 3, 5]
    assert found.batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert found.targets.tolist() == [A, B, EOS, C, UNK]
    assert found.weights.tolist() == [1, 1, 1, 1, 0]


def test_causal_keeps_the_conditions_of_the_sequences_it_keeps():
    batch = PackedBatch.from_sequences([[BOS, A], [BOS], [BOS, B]])
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, batch.positions, {"ph": torch.tensor([1.0, 2.0, 3.0])})
    assert objectives.causal(batch, VOCABULARY, generator()).batch.conditions["ph"].tolist() == [1.0, 3.0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=6))
def test_causal_targets_are_the_next_tokens(sequences):
    found = objectives.causal(PackedBatch.from_sequences(sequences), VOCABULARY, generator())
    kept = [sequence for sequence in sequences if len(sequence) > 1]
    assert found.batch.tokens.tolist() == [token for sequence in kept for token in sequence[:-1]]
    assert found.targets.tolist() == [token for sequence in kept for token in sequence[1:]]
    assert found.batch.lengths.tolist() == [len(sequence) - 1 for sequence in kept]
    assert found.weights.bool().tolist() == [t not in (PAD, MASK, UNK) for t in found.targets.tolist()]


def test_masked_statistics():
    rng = np.random.default_rng(0)
    batch = PackedBatch.from_sequences([np.array([BOS, *rng.integers(5, 13, 1000), UNK, EOS]) for _ in range(100)])
    found = objectives.masked(batch, VOCABULARY, generator())
    special = batch.tokens < 5
    chosen = found.weights == 1
    assert not (chosen & special).any()
    assert torch.equal(found.batch.tokens[special], batch.tokens[special])
    assert torch.equal(found.batch.tokens[~chosen], batch.tokens[~chosen])
    assert torch.equal(found.targets, batch.tokens)
    share = chosen.sum() / (~special).sum()
    assert abs(share - 0.15) < 0.005  # standard deviation 0.0011
    now, before = found.batch.tokens[chosen], batch.tokens[chosen]
    masks = (now == MASK).float().mean()
    changed = ((now != MASK) & (now != before)).float().mean()
    assert abs(masks - 0.8) < 0.02
    assert abs(changed - 0.1 * 7 / 8) < 0.012  # a random ordinary token is the same one in an eighth of the cases
    put_in = now[(now != MASK) & (now != before)]
    assert set(put_in.tolist()) == set(range(5, 13))  # never a special token


def test_masked_is_a_function_of_the_generator():
    batch = PackedBatch.from_sequences([[BOS, *[A, B, C] * 50, EOS]])
    one, same, other = (objectives.masked(batch, VOCABULARY, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.batch.tokens, same.batch.tokens) and torch.equal(one.weights, same.weights)
    assert not torch.equal(one.weights, other.weights)


def test_masked_needs_a_mask_and_something_to_mask():
    batch = PackedBatch.from_sequences([[0, 1]])
    with pytest.raises(ConfigError, match="'mask'"):
        objectives.masked(batch, Vocabulary(("a", "b"), {}), generator())
    with pytest.raises(ConfigError, match="not special"):
        objectives.masked(batch, Vocabulary(("<mask>", "<eos>"), {"mask": "<mask>", "eos": "<eos>"}), generator())


def test_objective_refuses_other_shapes():
    batch = PackedBatch.from_sequences([[0, 1]])
    with pytest.raises(ShapeError, match="targets and weights"):
        objectives.Objective(batch, torch.zeros(3, dtype=torch.int64), torch.zeros(3))

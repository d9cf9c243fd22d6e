"""What is chosen by spans and entities, and what is put in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, InputError
from processive.sequences import PackedBatch, Vocabulary
from processive.training import objectives
from processive.training.objectives.span_masked import spans_by_rank

ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>", "unk": "<unk>"}
VOCABULARY = Vocabulary((*ROLES.values(), *"abcdefgh"), ROLES)
PAD, BOS, EOS, MASK, UNK, A, B, C = range(8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def long_batch(sequences: int = 100, letters: int = 1000) -> PackedBatch:
    rng = np.random.default_rng(0)
    return PackedBatch.from_sequences([np.array([BOS, *rng.integers(5, 13, letters), EOS]) for _ in range(sequences)])


def runs(chosen: torch.Tensor) -> np.ndarray:
    """Lengths of the runs of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.int().numpy(), [0]])))
    return edges[1::2] - edges[::2]


def test_spans_by_hand():
    batch = PackedBatch.from_sequences([[BOS, A, A, A, EOS, A, A], [A, A]])
    allowed = batch.tokens == A
    rank = torch.tensor([0, 5, 8, 1, 2, 4, 6, 3, 7])
    lengths = torch.tensor([9, 9, 1, 9, 9, 2, 9, 1, 9])
    # From 1 the span of rank 5 covers 1 to 3, but 3 begins one of rank 1; from 3 it ends before the end token; from
    # 5 it covers 5 and 6 and does not go on into the second sequence.
    assert spans_by_rank(batch, allowed, rank, lengths).tolist() == [9, 5, 5, 1, 9, 4, 4, 3, 7]


def test_spans_hold_the_share_and_have_their_lengths():
    batch = long_batch()
    found = objectives.span_masked(batch, VOCABULARY, generator())
    chosen, ordinary = found.weights == 1, batch.tokens >= 5
    budget = round(0.15 * int(ordinary.sum()))
    assert budget <= int(chosen.sum()) <= budget + 9
    assert not (chosen & ~ordinary).any() and torch.equal(found.targets, batch.tokens)
    assert torch.equal(found.batch.tokens[~chosen], batch.tokens[~chosen])
    # Of so few tokens: one span alone, and its length is geometric, 3.80 on average with a standard deviation of 2.5.
    first = [
        int(objectives.span_masked(long_batch(1, 60), VOCABULARY, generator(seed), share=0.01).weight)
        for seed in range(600)
    ]
    assert max(first) == 10 and min(first) == 1
    assert abs(np.mean(first) - 3.72) < 0.35  # a little less than 3.80, since some spans meet the end
    assert abs(np.mean(np.array(first) == 1) - 0.2 / (1 - 0.8**10)) < 0.05


def test_a_span_is_treated_as_a_whole():
    batch = long_batch()
    found = objectives.span_masked(batch, VOCABULARY, generator(), share=0.01)  # spans that hardly ever touch
    chosen = found.weights == 1
    lengths = runs(chosen)
    fates = torch.where(found.batch.tokens == MASK, 0, torch.where(found.batch.tokens == batch.tokens, 2, 1))[chosen]
    spans = np.split(fates.numpy(), np.cumsum(lengths)[:-1])
    masked = [(span == 0).mean() for span in spans]
    assert np.mean([share in (0, 1) for share in masked]) > 0.97
    assert abs(np.mean([share == 1 for share in masked]) - 0.8) < 0.06
    left = np.mean([(span == 2).all() for span in spans if len(span) > 2])
    assert abs(left - 0.1) < 0.06  # else every token is drawn anew, and 1/8 of them stay as they were


def test_spans_of_next_to_nothing():
    for sequences in ([], [[]], [[BOS, EOS]], [[A]]):
        batch = PackedBatch.from_sequences(sequences)
        found = objectives.span_masked(batch, VOCABULARY, generator())
        assert found.weight == 0 and torch.equal(found.batch.tokens, batch.tokens)
    batch = PackedBatch.from_sequences([[BOS, A, B, C]])
    assert objectives.span_masked(batch, VOCABULARY, generator(), share=0.99).weights.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("name", ["span_masked", "swapped", "replaced"])
def test_a_function_of_the_generator(name):
    make = getattr(objectives, name)
    batch = long_batch(3)
    one, same, other = (make(batch, VOCABULARY, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.batch.tokens, same.batch.tokens) and torch.equal(one.weights, same.weights)
    assert not torch.equal(one.batch.tokens, other.batch.tokens)


def test_swapped_tokens_are_always_others():
    batch = long_batch()
    found = objectives.swapped(batch, VOCABULARY, generator())
    chosen = found.weights == 1
    assert torch.equal(found.batch.tokens != batch.tokens, chosen)  # chosen is changed, and nothing else is
    assert torch.equal(found.targets, batch.tokens)
    assert abs(chosen.sum() / (batch.tokens >= 5).sum() - 0.15) < 0.005
    put_in = torch.bincount(found.batch.tokens[chosen] - 5, minlength=8) / chosen.sum()
    assert (put_in - 1 / 8).abs().max() < 0.012 and not (chosen & (batch.tokens < 5)).any()
    of_a = torch.bincount(found.batch.tokens[chosen & (batch.tokens == A)] - 5, minlength=8).float()
    assert of_a[0] == 0 and (of_a[1:] / of_a.sum() - 1 / 7).abs().max() < 0.03
    with pytest.raises(ConfigError, match="2 or more tokens"):
        objectives.swapped(batch, Vocabulary((*ROLES.values(), "a"), ROLES), generator())


def test_one_token_of_each_entity():
    batch = PackedBatch.from_sequences([[BOS, *[A] * 20, EOS], [BOS, *[B] * 18, EOS]])
    entities = [[(1, 5), (10, 14)], [(3, 6)]]
    # 38 ordinary tokens: a budget of 11, of which 3 are asked for in the three entities and 8 lie outside of them.
    for seed in range(20):
        found = objectives.entity_masked(
            batch, VOCABULARY, generator(seed), entities, share=0.3, entity_share=0.3, mode="one"
        )
        inside = [int(found.weights[a:b].sum()) for a, b in [(1, 5), (10, 14), (25, 28)]]
        assert inside == [1, 1, 1] and found.weight == 11
        assert not found.weights[[0, 21, 22, 41]].any()
        assert torch.equal(found.targets, batch.tokens)


def test_whole_entities_within_their_half_of_the_budget():
    batch = PackedBatch.from_sequences([[BOS, *[A] * 40, EOS]])
    spans = [(1, 4), (11, 14), (21, 24), (31, 38)]
    taken = set()
    for seed in range(40):
        found = objectives.entity_masked(batch, VOCABULARY, generator(seed), [spans], share=0.3, mode="span")
        chosen = found.weights == 1
        assert found.weight == 12  # 6 for entities: two of three tokens each, since that of seven has no room
        whole = tuple(bool(chosen[a:b].all()) for a, b in spans)
        assert sum(whole[:3]) >= 2
        read = found.batch.tokens
        for (a, b), all_of_it in zip(spans[:3], whole, strict=False):
            if all_of_it and chosen[a:b].all():
                taken.add(tuple((read[a:b] == MASK).tolist()))
    assert (True, True, True) in taken and (False, False, False) in taken  # masked or not as a whole


def test_entities_that_overlap_hold_special_tokens_or_are_too_few():
    batch = PackedBatch.from_sequences([[BOS, A, A, UNK, A, A, A, A, A, A, A, EOS]])
    overlapping = [(1, 5), (2, 6), (3, 4)]  # the last holds nothing but an unknown token
    found = objectives.entity_masked(batch, VOCABULARY, generator(), [overlapping], share=0.5, mode="span")
    assert found.weight == round(0.5 * 9) and not found.weights[[0, 3, 11]].any()
    none = objectives.entity_masked(batch, VOCABULARY, generator(), [[]], share=0.5)
    assert none.weight == round(0.5 * 9)  # all of the budget goes to other tokens
    empty = objectives.entity_masked(PackedBatch.from_sequences([]), VOCABULARY, generator(), [])
    assert empty.weight == 0


def test_entities_that_are_refused():
    batch = PackedBatch.from_sequences([[BOS, A, EOS]])
    for entities, message in [
        ([], "of 0 sequences"),
        ([[(1, 4)]], "3 tokens and no span"),
        ([[(1, 1)]], "from 1 to 1"),
    ]:
        with pytest.raises(InputError, match=message):
            objectives.entity_masked(batch, VOCABULARY, generator(), entities)
    with pytest.raises(ConfigError, match="'one' or 'span'"):
        objectives.entity_masked(batch, VOCABULARY, generator(), [[]], mode="all")

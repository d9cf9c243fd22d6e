"""Spans moved behind their sequence: as Prot-xLSTM and as GLM."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig, build
from processive.errors import ConfigError
from processive.sequences import PackedBatch, Vocabulary, blanked, move_spans_behind, own_part
from processive.training.objectives import fill_in, glm

FILL_IN, GLM = (sys.modules[f"processive.training.objectives.{name}"] for name in ("fill_in", "glm"))
LETTERS = "abcdefghijklmnopqrst"
MASKS = tuple(f"<mask-{i}>" for i in range(1, 6))
HOMOLOGS = Vocabulary(
    ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *MASKS, *LETTERS),
    {"bos": "<cls>", "eos": "<cls>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    ("<eos>", *MASKS),
)
BLANKS = Vocabulary(
    ("<pad>", "<mask>", "<gmask>", "<smask>", "<sop>", "<eop>", "<eos>", *LETTERS),
    {"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"},
    ("<gmask>", "<smask>", "<sop>", "<eop>"),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return [vocabulary.ids[token] for token in text.split()]


def test_moved_spans_by_hand():
    tokens = np.array(ids(HOMOLOGS, "<cls> a b c d e f"))
    moved, at = move_spans_behind(tokens, [(1, 3), (4, 5)], HOMOLOGS)
    wanted = "<cls> <mask-1> c <mask-2> e f <eos> <mask-1> a b <mask-2> d"
    assert moved.tolist() == ids(HOMOLOGS, wanted)
    assert at.tolist() == [0, 1, 3, 4, 5, 6, 0, 1, 1, 2, 4, 4]
    same, places = move_spans_behind(tokens, [], HOMOLOGS)
    assert same.tolist() == tokens.tolist() and places.tolist() == list(range(7))


def test_fill_in_by_hand(monkeypatch):
    """Two homologs in the first sequence, spans in its second; the second sequence has none."""
    drawn = iter([[], [(2, 4)], []])
    monkeypatch.setattr(FILL_IN, "drawn_spans", lambda ordinary, rng: next(drawn))
    batch = PackedBatch.from_sequences([ids(HOMOLOGS, "<cls> a b <cls> c d e f"), ids(HOMOLOGS, "<cls> g")])
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, batch.positions, {"ph": torch.tensor([1.0, 2.0])})
    found = fill_in(batch, HOMOLOGS, generator(), positions=4)
    read = "<cls> a b <cls> c <mask-1> f <eos> <mask-1> d"
    assert found.batch.tokens.tolist() == ids(HOMOLOGS, read + " <cls>")
    assert found.targets.tolist() == ids(HOMOLOGS, "a b <cls> c <mask-1> f <eos> <mask-1> d e g")
    assert found.batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 2, 2, 0]  # f would have 4
    assert found.batch.cu_seqlens.tolist() == [0, 10, 11] and found.weights.all()
    assert found.batch.conditions["ph"].tolist() == [1.0, 2.0]


def test_drawn_spans_are_those_of_the_paper():
    draw, rng = FILL_IN.drawn_spans, np.random.default_rng(0)
    ordinary = np.ones(200, bool)
    ordinary[[0, 150]] = False
    drawn = [draw(ordinary, rng) for _ in range(4000)]
    counts = np.bincount([len(spans) for spans in drawn], minlength=6) / len(drawn)
    poisson = np.array([np.exp(-1) / f for f in (1, 1, 2, 6, 24, 120)])
    assert np.abs(counts - poisson / poisson.sum()).max() < 0.03 and len(counts) == 6
    for spans in drawn:
        for (first, stop), following in zip(spans, [*(first for first, _ in spans), 200][1:], strict=True):
            assert 1 <= first < stop <= following and ordinary[first:stop].all()
            assert stop - first <= max(int(0.2 * (following - first)) - 1, 1)
    alone = [spans[0] for spans in drawn if len(spans) == 1 and spans[0][0] < 50]
    shares = [(stop - first) / (int(0.2 * (200 - first)) - 1) for first, stop in alone]
    assert abs(np.mean(shares) - 0.5) < 0.03 and max(shares) == 1  # uniform from 1 to all of a fifth but one
    assert draw(np.zeros(3, bool), rng) == [] and draw(np.zeros(0, bool), rng) == []


def test_fill_in_loses_nothing():
    rng = np.random.default_rng(0)
    homologs = [[0, *rng.integers(10, 30, n).tolist()] for n in (1, 50, 0, 300, 7)]
    batch = PackedBatch.from_sequences([np.concatenate(homologs[:3]), np.concatenate(homologs[3:])])
    seen = set()
    for seed in range(10):
        found, again = (fill_in(batch, HOMOLOGS, generator(seed)) for _ in range(2))
        assert torch.equal(found.batch.tokens, again.batch.tokens)
        seen.add(tuple(found.batch.tokens.tolist()))
        letters = found.batch.tokens >= 10
        last = (found.targets[-1:] >= 10).long().cumsum(0)  # a sequence's last token is a target and is not read
        assert letters.sum() + last.sum() + (found.targets[found.batch.cu_seqlens[1] - 1] >= 10) == 358
        parts = (found.batch.tokens == 0).cumsum(0)
        for number, homolog in enumerate(homologs[:2], 1):  # sorted by position, a part is its homolog
            here = letters & (parts == number)
            order = found.batch.positions[here].argsort()
            assert found.batch.tokens[here][order].tolist() == homolog[1:]
    assert len(seen) > 5


def test_fill_in_of_nothing_and_without_its_tokens():
    assert len(fill_in(PackedBatch.from_sequences([]), HOMOLOGS, generator()).targets) == 0
    batch = PackedBatch.from_sequences([[0, 10]])
    with pytest.raises(ConfigError, match="<mask-1> to <mask-5>"):
        fill_in(batch, Vocabulary(("<cls>", "a"), {"bos": "<cls>"}), generator())


def test_blanks_by_hand():

    tokens = np.array(ids(BLANKS, "m k t a r i <eos>"))
    found = blanked(tokens, [(1, 3), (5, 6)], "<smask>", BLANKS, order=[1, 0])
    assert found.tokens.tolist() == ids(BLANKS, "m <smask> a r <smask> <eos> <sop> i <sop> k t")
    assert found.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 2, 3, 4]
    assert found.block_positions.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 3]
    assert found.targets.tolist() == [-1] * 6 + ids(BLANKS, "i <eop> k t <eop>")
    assert found.prefix == 6
    end = blanked(tokens, [(0, 6)], "<gmask>", BLANKS)
    assert end.tokens.tolist() == ids(BLANKS, "<gmask> <eos> <sop> m k t a r i")
    assert end.positions.tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 7] and end.prefix == 2
    assert (end.positions - end.block_positions).tolist() == [0, 1] + [0] * 7  # where the mask is
    begun = blanked(tokens, [(3, 3)], "<smask>", BLANKS)
    assert begun.tokens.tolist() == ids(BLANKS, "m k t <smask> a r i <eos> <sop>")
    assert begun.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4]
    assert begun.targets.tolist() == [-1] * 8 + ids(BLANKS, "<eop>")


def test_own_part_by_hand():
    for text, own in [("m k <eos>", (0, 2)), ("<sop> m k <eos>", (1, 3)), ("<eos>", (0, 0)), ("<sop> <eos>", (1, 1))]:
        assert own_part(np.array(ids(BLANKS, text)), BLANKS) == own
    assert own_part(np.zeros(0, np.int64), BLANKS) == (0, 0)
    assert own_part(np.array(ids(BLANKS, "<sop>")), BLANKS) == (1, 1)


def proteins(count: int, length: int = 60) -> PackedBatch:
    rng = np.random.default_rng(0)
    return PackedBatch.from_sequences([np.append(rng.integers(7, 27, length), 6) for _ in range(count)])


def test_glm_mixes_its_three_tasks():
    batch = proteins(2000)
    found = glm(batch, BLANKS, generator())
    prefix, owner = found.batch.conditions["prefix"], found.batch.sequence_ids
    sequences = found.batch.split(found.batch.tokens)
    kinds = np.array([("<smask>" if 3 in s else "<gmask>" if 2 in s else "<mask>") for s in sequences])
    shares = {kind: (kinds == kind).mean() for kind in set(kinds.tolist())}
    assert abs(shares["<mask>"] - 0.2) < 0.03 and abs(shares["<gmask>"] - 0.4) < 0.03
    masked = torch.from_numpy(kinds == "<mask>")
    assert torch.equal(prefix[masked], found.batch.lengths[masked])
    inside = torch.arange(len(owner)) - found.batch.cu_seqlens[owner] < prefix[owner]
    behind = ~masked[owner]
    assert torch.equal(found.weights[behind] > 0, ~inside[behind])  # behind the prefix every token is asked for
    weights = torch.stack([w.sum() for w in found.batch.split(found.weights)])
    blanks = torch.from_numpy(kinds == "<smask>")
    counts = torch.tensor([(s == 3).sum() for s in sequences])
    assert torch.equal(weights[blanks], 9.0 + counts[blanks])  # 15% of 60 tokens and an end for each blank
    suffixes = weights[torch.from_numpy(kinds == "<gmask>")] - 1
    assert suffixes.min() == 30 and suffixes.max() == 60 and abs(suffixes.mean() - 45) < 1
    again = glm(batch, BLANKS, generator())
    assert torch.equal(again.batch.tokens, found.batch.tokens) and torch.equal(again.targets, found.targets)


def test_every_blanked_sequence_can_be_put_together_again():
    batch = proteins(60, 25)
    found = glm(batch, BLANKS, generator(), masked_share=0.0)
    parts = zip(
        batch.split(batch.tokens),
        found.batch.split(found.batch.tokens),
        found.batch.split(found.batch.positions),
        found.batch.split(found.targets),
        found.batch.conditions["prefix"].tolist(),
        strict=True,
    )
    for whole, tokens, positions, targets, prefix in parts:
        blanks, current = {}, []
        for position, token, target in zip(*(x[prefix:].tolist() for x in (positions, tokens, targets)), strict=True):
            if token == BLANKS.ids["<sop>"]:
                current = blanks.setdefault(position - 1, [])
            if target != BLANKS.ids["<eop>"]:
                current.append(target)
        rebuilt = []
        for position, token in enumerate(tokens[:prefix].tolist()):
            rebuilt += blanks[position] if token in (2, 3) else [token]
        assert rebuilt == whole.tolist()


def test_glm_of_nothing_and_without_its_tokens():
    found = glm(PackedBatch.from_sequences([]), BLANKS, generator())
    assert len(found.targets) == 0 and found.batch.conditions["prefix"].shape == (0,)
    short = PackedBatch.from_sequences([[6], [], [7], [7, 6]])
    for seed in range(10):
        found = glm(short, BLANKS, generator(seed))
        assert len(found.batch) == 4 and found.batch.lengths[:2].tolist() == [1, 0]
    with pytest.raises(ConfigError, match="lacks <smask>"):
        glm(short, Vocabulary(("<mask>", "a"), {"mask": "<mask>"}), generator())


def test_what_a_blank_hides_is_not_seen():
    """No logit of the prefix or of a token depends on what is asked for later."""
    torch.manual_seed(0)
    backbone = build(TransformerConfig(len(BLANKS), 16, 2, heads=2, direction="prefix")).eval()

    hidden = []
    for text in ("m k t a r i <eos>", "m k s a r i <eos>"):
        one = blanked(np.array(ids(BLANKS, text)), [(1, 3), (5, 6)], "<smask>", BLANKS, order=[0, 1])
        batch = GLM._packed([one], PackedBatch.from_sequences([[0]])).batch
        hidden.append(backbone(batch)[0])
    same = (hidden[0] == hidden[1]).all(1).tolist()
    # <sop> k t <sop> i: what t and s are is seen from there on and by nothing before
    assert same == [True] * 8 + [False] * 3

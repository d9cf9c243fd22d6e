"""Conditions that a head knows: what they change and what they leave alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig, from_plain, to_plain
from processive.errors import ConfigError, InputError
from processive.inference import generate, position_log_probabilities, score
from processive.models import HeadConfig, LanguageModel
from processive.sequences import PackedBatch
from processive.training.objectives import causal
from processive.training.step import loss_sum

CONDITIONS = (("species", 3), ("assay", 2))
WORDS = ["abc", "hgfedcba", "a", "cc"]


def make(tokenizer, kind="esm", *, bidirectional=False, conditions=CONDITIONS):
    torch.manual_seed(0)
    config = XLSTMConfig(12, 32, 2, heads=2)
    if bidirectional:
        config = TransformerConfig(12, 32, 1, heads=2, direction="bidirectional")
    model = LanguageModel(tokenizer, config, HeadConfig(kind, conditions=conditions)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


def batch_of(model, **conditions):
    batch = PackedBatch.from_sequences([model.tokenizer.encode(word) for word in WORDS])
    return replace(batch, conditions={name: torch.tensor(ids) for name, ids in conditions.items()})


@pytest.mark.parametrize("kind", ["esm", "linear"])
@torch.no_grad()
def test_each_sequence_has_its_own(tokenizer, kind):
    model = make(tokenizer, kind)
    plain = model(batch_of(model))[0]
    none = model(batch_of(model, species=[0] * 4, assay=[0] * 4, other=[9] * 4))[0]
    assert torch.equal(plain, none)
    batch = batch_of(model, species=[0, 1, 3, 3], assay=[0, 0, 0, 2])
    logits = batch.split(model(batch)[0])
    apart = [(found - base).abs().amax() for found, base in zip(logits, batch.split(plain), strict=True)]
    assert apart[0] == 0 and min(apart[1:]) > 1e-2
    for sequence, conditions in enumerate([{}, {"species": 1}, {"species": 3}, {"species": 3, "assay": 2}]):
        alone = PackedBatch.from_sequences([model.tokenizer.encode(WORDS[sequence])])
        alone = replace(alone, conditions={name: torch.tensor([value]) for name, value in conditions.items()})
        assert (model(alone)[0] - logits[sequence]).abs().max() <= 1e-4
    for a, b in ((1, 2), (1, 3), (2, 3)):
        one, two = (model(batch_of(model, species=[value] * 4))[0] for value in (a, b))
        assert (one - two).abs().max() > 1e-2


@torch.no_grad()
def test_what_is_added_is_the_embedding(tokenizer):
    """Behind the blocks and before the head: the logits of hidden states with the rows added by hand."""
    model = make(tokenizer)
    batch = batch_of(model, species=[0, 1, 3, 3], assay=[0, 0, 0, 2])
    hidden = model.backbone(batch)[0]
    species, assay = model.head.conditions["species"].weight, model.head.conditions["assay"].weight
    added = [torch.zeros(32), species[0], species[2], species[2] + assay[1]]
    by_hand = torch.cat([part + row for part, row in zip(batch.split(hidden), added, strict=True)])
    torch.testing.assert_close(model(batch)[0], model.logits(by_hand))
    at = torch.tensor([3, 0, 12])
    torch.testing.assert_close(model.logits(hidden, batch, at), model(batch)[0][at])


def test_fresh_ones_change_nothing_and_learn(tokenizer):
    model = LanguageModel(tokenizer, XLSTMConfig(12, 32, 2, heads=2), HeadConfig("esm", conditions=CONDITIONS))
    batch = batch_of(model, species=[0, 1, 3, 3], assay=[0, 0, 0, 2])
    assert torch.equal(model(batch)[0], model(batch_of(model))[0])
    loss_sum(model, causal(batch, model.vocabulary, torch.Generator())).backward()
    learnt = {name: table.weight.grad.abs().amax(1) > 0 for name, table in model.head.conditions.items()}
    assert learnt["species"].tolist() == [True, False, True]
    assert learnt["assay"].tolist() == [False, True]


def test_scores_and_generation_take_them(tokenizer):
    model = make(tokenizer)
    plain, null = (score(model, WORDS, conditions=conditions) for conditions in (None, {"species": 0}))
    assert (plain == null).all() and abs(score(model, WORDS, conditions={"species": 3}) - plain).min() > 1e-3
    with torch.no_grad():
        logits = model(batch_of(model, species=[3] * 4))[0].log_softmax(-1)
        batch = batch_of(model)
        rows = zip(batch.split(logits), batch.split(batch.tokens), strict=True)
        wanted = [float(row[:-1].gather(1, ids[1:, None]).sum()) for row, ids in rows]
    assert score(model, WORDS, conditions={"species": 3}) == pytest.approx(wanted, abs=1e-4)

    def lines(conditions):
        return generate(model, 20, max_length=9, conditions=conditions)

    assert lines(None) == lines({"species": 0}) != lines({"species": 3}) != lines({"species": 1})
    greedy = generate(model, prompts="abc", temperature=0, max_length=1, conditions={"species": 3})
    with torch.no_grad():
        prompt = PackedBatch.from_sequences([model.tokenizer.encode("abc")[:-1]])
        logits = model(replace(prompt, conditions={"species": torch.tensor([3])}))[0][-1]
    logits[sorted(model.vocabulary.special_ids - {2})] = -torch.inf
    assert greedy == [model.tokenizer.decode([*model.tokenizer.encode("abc")[:-1], int(logits.argmax())])]


def test_masked_models_score_with_them(tokenizer):
    tokenizer.vocabulary = replace(tokenizer.vocabulary, roles={**tokenizer.vocabulary.roles, "mask": "<mask>"})
    model = make(tokenizer, bidirectional=True)
    plain = score(model, WORDS)
    assert abs(score(model, WORDS, conditions={"species": 3}) - plain).min() > 1e-3
    for masked in (True, False):
        tables = [
            position_log_probabilities(model, "abc", [1, 2], masked=masked, conditions=conditions)
            for conditions in (None, {"assay": 0}, {"assay": 1})
        ]
        assert (tables[0] == tables[1]).all() and abs(tables[0] - tables[2]).max() > 1e-3


def test_they_are_a_mapping_in_json():
    config = HeadConfig(conditions=CONDITIONS)
    plain = json.loads(json.dumps(to_plain(config)))
    assert plain["conditions"] == {"species": 3, "assay": 2}
    assert from_plain(HeadConfig, plain, what="head") == config
    assert from_plain(HeadConfig, to_plain(HeadConfig()), what="head") == HeadConfig()
    for wrong in ({"species": "3"}, {"species": 2.5}, ["species"], "species", {"species": True}):
        with pytest.raises(ConfigError, match="conditions"):
            from_plain(HeadConfig, {"conditions": wrong}, what="head")


def test_what_is_refused(tokenizer):
    model = make(tokenizer)
    with pytest.raises(ConfigError, match="'specie'; it has species, assay"):
        score(model, WORDS, conditions={"specie": 1})
    with pytest.raises(ConfigError, match="it has none"):
        generate(make(tokenizer, conditions=()), conditions={"species": 1})
    for ids in ([0, 0, 0, 4], [-1, 0, 0, 0]):
        with pytest.raises(InputError, match=r"species are 0 \(none\) to 3"):
            model(batch_of(model, species=ids))
    for conditions in ((("species", 0),), (("a b", 1),), (("a", 1), ("a", 2))):
        with pytest.raises(ConfigError):
            HeadConfig(conditions=conditions)
    with pytest.raises(ConfigError, match="'silu'"):
        HeadConfig(activation="silu")

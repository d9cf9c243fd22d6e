"""Objectives that need spans: what counts, by hand, and through the loop."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from processive.errors import ConfigError, InputError
from processive.sequences import PackedBatch, Spanned
from processive.training import TrainingConfig, loop, train
from processive.training.data import Pieces
from processive.training.objectives import answer, causal
from processive.training.step import loss_sum, make_objective


def objective_of(tokenizer, words, spans, generator=None):
    batch = PackedBatch.from_sequences([tokenizer.encode(word) for word in words])
    return answer(batch, tokenizer.vocabulary, generator or torch.Generator(), spans)


def test_answers_alone_are_counted(tokenizer):
    # <bos> a b c <eos> and <bos> d <eos>: read are all but the last, asked for are all but the first.
    found = objective_of(tokenizer, ["abc", "d"], [[(2, 4)], [(1, 3)]])
    ids = tokenizer.vocabulary.ids
    assert found.batch.tokens.tolist() == [ids["<bos>"], ids["a"], ids["b"], ids["c"], ids["<bos>"], ids["d"]]
    assert found.targets.tolist() == [ids["a"], ids["b"], ids["c"], ids["<eos>"], ids["d"], ids["<eos>"]]
    assert found.weights.tolist() == [0, 1, 1, 0, 1, 1]


def test_several_answers_none_and_all(tokenizer):
    assert objective_of(tokenizer, ["abcd"], [[(2, 3), (4, 6)]]).weights.tolist() == [0, 1, 0, 1, 1]
    assert objective_of(tokenizer, ["abcd", "ab"], [[], []]).weight == 0
    batch = PackedBatch.from_sequences([tokenizer.encode("abcd"), [1], tokenizer.encode("a")])  # one has a single token
    whole, given = causal(batch, tokenizer.vocabulary, torch.Generator()), [[(0, 6)], [(0, 1)], [(0, 3)]]
    found = answer(batch, tokenizer.vocabulary, torch.Generator(), given)
    assert found.weights.tolist() == whole.weights.tolist() == [1] * 7
    assert found.batch.cu_seqlens.tolist() == whole.batch.cu_seqlens.tolist() == [0, 5, 7]


def test_answers_of_other_sequences_are_refused(tokenizer):
    with pytest.raises(InputError, match="spans of 1 sequences"):
        objective_of(tokenizer, ["abc", "d"], [[(1, 2)]])
    with pytest.raises(InputError, match="no span from 3 to 6"):
        objective_of(tokenizer, ["abc"], [[(3, 6)]])


def test_a_prompt_gets_no_gradient_from_its_own_tokens(make_model, tokenizer):
    """The loss of an answer is that of its tokens behind the prompt, whatever the prompt's own are worth."""
    model = make_model(dropout=0.0)
    pieces = Pieces(Spanned([tokenizer.encode("abcdef")], [[(4, 8)]]))
    objective = make_objective(
        pieces.batch([0], vocabulary_size=12), model, TrainingConfig(objective="answer", steps=1), 0
    )
    logits, _ = model(PackedBatch.from_sequences([tokenizer.encode("abcdef")]))
    ids = tokenizer.encode("abcdef")
    want = -sum(logits[at - 1].log_softmax(-1)[ids[at]] for at in (4, 5, 6, 7))
    assert torch.allclose(loss_sum(model, objective), want, atol=1e-5)


def test_the_loop_learns_answers_and_not_prompts(make_model, tokenizer, tmp_path, rng):
    """Prompts are noise here, and the answer repeats the letter that a prompt begins with."""
    words = [f"{a}{''.join(rng.choice(list('abcdefgh'), 3))}{a * 2}" for a in "abcdefgh" for _ in range(8)]
    data = Spanned([tokenizer.encode(word) for word in words], [[(5, 8)]] * len(words))
    model = make_model(dropout=0.0)
    config = TrainingConfig(objective="answer", steps=60, batch_tokens=256, learning_rate=1e-2, log_every=20)
    before = train(make_model(dropout=0.0), data, TrainingConfig(**{**vars(config), "steps": 1}), out=tmp_path / "one")
    after = train(model, data, config, out=tmp_path / "run", validation=data)
    assert after["loss"] < 0.5 * before["loss"] and after["validation_loss"] < 0.5 * before["loss"]


@pytest.mark.parametrize("mode", ["one", "span"])
def test_the_loop_masks_entities_first(make_model, tokenizer, mode):
    """Two entities of three tokens take the whole budget: one token of each, or one entity as a whole."""
    words, spans = ["abcdefgh", "hgfedcba"], [[(1, 4)], [(4, 7)]]
    pieces = Pieces(Spanned([tokenizer.encode(word) for word in words], spans))
    share = (2 if mode == "one" else 3) / 16
    config = TrainingConfig(objective="entity-masked", steps=1, mask_share=share, entity_share=1, entity_mode=mode)
    chosen = []
    for step in range(20):
        batch = pieces.batch([0, 1], vocabulary_size=12)
        found = make_objective(batch, make_model("masked"), config, step).weights.nonzero()[:, 0].tolist()
        chosen.append(found)
        first, second = [at for at in found if 1 <= at < 4], [at for at in found if 14 <= at < 17]
        assert len(first) + len(second) == len(found) == round(share * 16)
        assert (len(first), len(second)) in ([(1, 1)] if mode == "one" else [(3, 0), (0, 3)])
    assert len({tuple(found) for found in chosen}) > 1


@pytest.mark.parametrize(("objective", "kind"), [("answer", "causal"), ("entity-masked", "masked")])
def test_data_without_spans_is_refused_before_training(objective, kind, make_model, sequences, tmp_path):
    config = TrainingConfig(objective=objective, steps=1)
    spanned = Spanned(sequences, [[(0, 1)]] * len(sequences))
    for data, held_out in ((sequences, None), (spanned, sequences)):
        with pytest.raises(ConfigError, match="needs data with spans"):
            train(make_model(kind), data, config, out=tmp_path / "run", validation=held_out)
    assert not (tmp_path / "run").exists()


def test_a_run_with_entities_goes_on_as_if_it_had_not_stopped(make_model, sequences, tmp_path, monkeypatch):
    """Stopped after three of six steps and resumed, bitwise."""
    data = Spanned(sequences, [[(0, len(ids))] for ids in sequences])
    config = TrainingConfig(objective="entity-masked", steps=6, batch_tokens=64)
    models = [make_model("masked", seed=1) for _ in range(3)]
    train(models[0], data, config, out=tmp_path / "whole")
    asked = iter([False] * 3 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_asked", lambda: nullcontext(lambda: next(asked)))
        assert train(models[1], data, config, out=tmp_path / "parts")["step"] == 3
    train(models[2], data, config, out=tmp_path / "parts", resume=True)
    whole, parts = (dict(model.named_parameters()) for model in (models[0], models[2]))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

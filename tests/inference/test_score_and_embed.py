"""Scores and embeddings against the obvious loop, in the order of the input, whatever the packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.errors import ConfigError, InputError
from processive.inference import embed, log_likelihood, position_log_probabilities, pseudo_log_likelihood, score
from processive.sequences import PackedBatch


@torch.inference_mode()
def table(model, ids):
    """Log-probabilities [tokens, vocabulary] of one sequence alone, from a model that is not training."""
    was = model.training
    logits = model.eval()(PackedBatch.from_sequences([ids]))[0]
    model.train(was)
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_log_likelihood_is_the_sum(kind, batch_tokens, make_model, words):
    model = make_model(kind)
    wanted = []
    for word in words:
        ids = model.tokenizer.encode(word).tolist()
        logs = table(model, ids)
        wanted.append(sum(float(logs[t - 1, ids[t]]) for t in range(1, len(ids))))
    found = log_likelihood(model, words, batch_tokens=batch_tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-6)


def test_log_likelihood_is_normalised(make_model):
    """Probabilities of all words of up to two letters, and of all that begin with three, sum to one."""
    model = make_model()
    letters, ids = "abcdefgh", model.vocabulary.ids
    ended = [a + b for a in ["", *letters] for b in ["", *letters] if not (a == "" and b)]
    total = np.exp(log_likelihood(model, ended)).sum()
    begun = 0.0
    for a in letters:
        for b in letters:
            logs = table(model, model.tokenizer.encode(a + b).tolist()[:-1])
            others = torch.ones(len(ids), dtype=torch.bool)
            others[ids["<eos>"]] = False
            begun += float((logs[0, ids[a]] + logs[1, ids[b]] + logs[2, others].logsumexp(0)).exp())
    first = table(model, [ids["<bos>"]])[0]
    special = [i for i in model.vocabulary.special_ids if i != ids["<eos>"]]
    aside = float(first[special].exp().sum())
    for a in letters:
        logs = table(model, [ids["<bos>"], ids[a]])
        aside += float((logs[0, ids[a]] + logs[1, special].logsumexp(0)).exp())
    assert total + begun + aside == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
def test_pseudo_log_likelihood_is_the_naive_loop(batch_tokens, make_model, words):
    model, words = make_model("encoder"), words[:6]
    mask, wanted = model.vocabulary.require("mask"), []
    for word in words:
        ids = model.tokenizer.encode(word).tolist()
        total = 0.0
        for t in range(1, len(ids) - 1):
            total += float(table(model, [*ids[:t], mask, *ids[t + 1 :]])[t, ids[t]])
        wanted.append(total)
    found = pseudo_log_likelihood(model, words, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-6)


def test_position_log_probabilities(make_model):
    model = make_model("encoder")
    ids, mask = model.tokenizer.encode("abcde").tolist(), model.vocabulary.require("mask")
    found = position_log_probabilities(model, "abcde", [3, 1], batch_tokens=7)
    for row, t in zip(found, [3, 1], strict=True):
        np.testing.assert_allclose(row, table(model, [*ids[:t], mask, *ids[t + 1 :]])[t], atol=1e-5)
    plain = position_log_probabilities(model, "abcde", [3, 1], masked=False)
    np.testing.assert_allclose(plain, table(model, ids)[[3, 1]], atol=1e-5)
    assert position_log_probabilities(model, "abc", []).shape == (0, len(model.vocabulary))
    for wrong in ([7], [-1]):
        with pytest.raises(InputError, match="token positions 0 to 6"):
            position_log_probabilities(model, "abcde", wrong)


def test_score_takes_the_one_that_fits(make_model, words):
    causal, masked = make_model(), make_model("encoder")
    assert np.array_equal(score(causal, words), log_likelihood(causal, words))
    assert np.array_equal(score(masked, words), pseudo_log_likelihood(masked, words))
    with pytest.raises(ConfigError, match="pseudo_log_likelihood"):
        log_likelihood(masked, words)
    with pytest.raises(ConfigError, match="log_likelihood"):
        pseudo_log_likelihood(causal, words)
    with pytest.raises(ConfigError, match="bidirectional"):
        position_log_probabilities(causal, "abc", [1])


@pytest.mark.parametrize("kind", ["xlstm", "encoder"])
def test_records_that_cannot_be_used_keep_their_place(kind, make_model):
    model = make_model(kind)
    found = score(model, ["abc", None, "ab"])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], score(model, ["abc", "ab"]), atol=1e-5)
    rows = embed(model, ["abc", None, "ab"])
    assert np.isnan(rows[1]).all() and np.isfinite(rows[[0, 2]]).all()
    assert np.isnan(score(model, [None])).all() and score(model, []).shape == (0,)
    assert embed(model, []).shape == (0, model.width)


@pytest.mark.parametrize("kind", ["xlstm", "encoder"])
@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2])
def test_embed_is_the_obvious_loop(kind, layer, make_model, words):
    model, words = make_model(kind).eval(), words[:6]
    wanted = []
    with torch.inference_mode():
        for word in words:
            batch = PackedBatch.from_sequences([model.tokenizer.encode(word)])
            wanted.append(model.backbone.hidden_layers(batch)[layer][1:-1].numpy())  # without begin and end
    model.train()
    for batch_tokens in (1, 40, 8192):
        mean = embed(model, words, layer=layer, batch_tokens=batch_tokens)
        assert mean.dtype == np.float32 and mean.shape == (len(words), model.width)
        np.testing.assert_allclose(mean, [w.mean(0) for w in wanted], atol=1e-5)
        last = embed(model, words, layer=layer, pooling="last", batch_tokens=batch_tokens)
        np.testing.assert_allclose(last, [w[-1] for w in wanted], atol=1e-5)
        tokens = embed(model, words, layer=layer, pooling="tokens", batch_tokens=batch_tokens)
        for row, expected in zip(tokens, wanted, strict=True):
            assert row.dtype == np.float32
            np.testing.assert_allclose(row, expected, atol=1e-5)
    assert model.training


def test_embed_several_layers(make_model, words):
    model = make_model()
    found = embed(model, words, layer=[0, -1])
    assert len(found) == 2
    assert np.array_equal(found[0], embed(model, words, layer=0))
    np.testing.assert_allclose(found[1], embed(model, words), atol=1e-6)
    tokens = embed(model, ["ab", None], layer=(1,), pooling="tokens")
    assert [row.shape for row in tokens[0]] == [(2, model.width), (0, model.width)]


def test_a_record_without_ordinary_tokens_has_no_embedding(make_model):
    model = make_model()
    assert np.isnan(embed(model, ["", "a"])[0]).all() and np.isnan(embed(model, [""], pooling="last")).all()
    assert embed(model, ["", "a"], pooling="tokens")[0].shape == (0, model.width)
    assert np.isfinite(log_likelihood(model, [""])[0])  # the empty word has a probability


@pytest.mark.parametrize("empty", [["abc"], ["abc", "", "ab"]], ids=str)
def test_an_encoding_without_tokens_is_passed_over(empty, make_model, monkeypatch):
    model = make_model()
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: encode(text) if text else np.zeros(0, np.int32))
    found = log_likelihood(model, [*empty, ""])
    assert np.isnan(found[[i for i, text in enumerate([*empty, ""]) if not text]]).all()
    assert found[0] == pytest.approx(log_likelihood(model, ["abc"])[0], abs=1e-5)


def test_what_is_refused(make_model):
    model = make_model()
    with pytest.raises(ConfigError, match="no layer 3: the model has layers 0 to 2"):
        embed(model, ["a"], layer=3)
    with pytest.raises(ConfigError, match="pooling"):
        embed(model, ["a"], pooling="max")
    with pytest.raises(InputError, match="record 2, position 1: 'z'"):
        embed(model, ["a", "z"])
    with pytest.raises(InputError, match="one string"):
        score(model, "abc")

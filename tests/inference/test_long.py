"""Sequences of any length: a causal model reads them in pieces, with the numbers of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive.backbones import XLSTMConfig
from processive.inference import embed, logits, score
from processive.models import LanguageModel
from processive.sequences import PackedBatch

BLOCKS = {
    "xlstm": {"blocks": ("mlstm", "slstm", "mlstm"), "rotary": "head"},
    "7b": {"blocks": "mlstm-7b", "positions": "sinusoidal"},
}


@pytest.fixture
def make_long(make_model, tokenizer):
    """A model with every parameter away from its initial value, so that the state matters."""

    def make(kind):
        if kind in BLOCKS:
            torch.manual_seed(0)
            model = LanguageModel(tokenizer, XLSTMConfig(len(tokenizer.vocabulary), 16, 3, heads=2, **BLOCKS[kind]))
        else:
            model = make_model(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def long_words(rng):
    """Two long ones among short ones."""
    return ["".join("abcdefgh"[i] for i in rng.integers(0, 8, length)) for length in (3, 301, 0, 190, 20)]


@pytest.fixture
def read_lengths(monkeypatch):
    """Tokens of every batch that a backbone reads."""
    lengths = []
    original = PackedBatch.to

    def spy(batch, device):
        lengths.append(len(batch.tokens))
        return original(batch, device)

    monkeypatch.setattr(PackedBatch, "to", spy)
    return lengths


def close(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(initial=1e-3))


@pytest.mark.parametrize("kind", ["xlstm", "7b", "decoder"])
@pytest.mark.parametrize("pooling", ["mean", "last", "tokens"])
@pytest.mark.parametrize("size", [37, 64])
def test_embedding_in_pieces_is_that_of_the_whole(kind, pooling, size, make_long, long_words, read_lengths):
    model = make_long(kind)
    layers = [0, 1, -1, 2, 0]
    whole = embed(model, long_words, layer=layers, pooling=pooling)
    assert max(read_lengths) > 500  # all of them in one batch
    read_lengths.clear()
    pieces = embed(model, long_words, layer=layers, pooling=pooling, batch_tokens=size)
    assert max(read_lengths) <= size
    for found, wanted in zip(pieces, whole, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == np.float32
            close(one, other)
    last = embed(model, long_words, pooling=pooling, batch_tokens=size)
    for one, other in zip(last, whole[2], strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", ["xlstm", "7b", "decoder"])
@pytest.mark.parametrize("size", [37, 64])
def test_score_in_pieces_is_that_of_the_whole(kind, size, make_long, long_words, read_lengths):
    model = make_long(kind)
    whole = score(model, long_words)
    read_lengths.clear()
    np.testing.assert_allclose(score(model, long_words, batch_tokens=size), whole, rtol=1e-6, atol=1e-5)
    assert max(read_lengths) <= size


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
def test_logits_in_pieces_are_those_of_the_whole(kind, make_long, long_words, read_lengths):
    model = make_long(kind)
    whole = logits(model, long_words)
    read_lengths.clear()
    for found, wanted in zip(logits(model, long_words, batch_tokens=37), whole, strict=True):
        close(found, wanted)
    assert max(read_lengths) <= 37


def test_a_bidirectional_model_reads_the_whole(make_long, long_words, read_lengths):
    model = make_long("encoder")
    whole = embed(model, long_words, pooling="tokens")
    read_lengths.clear()
    for found, wanted in zip(embed(model, long_words, pooling="tokens", batch_tokens=10), whole, strict=True):
        close(found, wanted)
    assert max(read_lengths) == 303


def test_state_makes_the_difference(make_long, long_words):
    """The pieces alone, without state, are something else: the tests above can fail."""
    model = make_long("xlstm")
    word = long_words[1]
    apart = embed(model, [word[64:]], pooling="last")
    together = embed(model, [word], pooling="last", batch_tokens=64)
    assert np.abs(apart - together).max() > 1e-3

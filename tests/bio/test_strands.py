"""Averages over both strands are the same for either strand, whatever the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive import bio
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.errors import ConfigError, InputError
from processive.models import HeadConfig, LanguageModel
from processive.sequences import Record

TOLERANCE = 1e-5
SEQUENCES = ["ACGTNNACGTTGACCCAT", "A", "AC", "GATTACA" * 5, "acgtacgtaccc", "TTNGRA"]
BACKBONES = {
    **{
        f"{blocks}, {direction}": (XLSTMConfig, {"blocks": blocks, "direction": direction})
        for blocks in ("mlstm", "slstm", "mlstm-7b")
        for direction in ("causal", "alternating", "bidirectional", "tied")
    },
    "decoder": (TransformerConfig, {}),
    "encoder": (TransformerConfig, {"direction": "bidirectional"}),
}
MASKED = [name for name in BACKBONES if "causal" not in name and name != "decoder"]


def make(name, tokenizer=None, conditions=()):
    torch.manual_seed(0)
    tokenizer = tokenizer or bio.DNATokenizer()
    family, options = BACKBONES[name]
    config = family(len(tokenizer.vocabulary), 32, 2, heads=2, **options)
    model = LanguageModel(tokenizer, config, HeadConfig("esm", conditions=conditions)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def other(sequences):
    return [bio.reverse_complement(sequence) for sequence in sequences]


def apart(own, reverse):
    return max(float(abs(a - b).max()) for a, b in zip(own, reverse, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_embeddings(name):
    model = make(name)
    for pooling in ("mean", "last"):
        own, reverse = (bio.embed(s, model, pooling=pooling, both_strands=True) for s in (SEQUENCES, other(SEQUENCES)))
        assert own.shape == (6, 32) and own.dtype == np.float32 and apart(own, reverse) <= TOLERANCE
        plain = [bio.embed(s, model, pooling=pooling) for s in (SEQUENCES, other(SEQUENCES))]
        assert apart(*plain) > 1e-2
        np.testing.assert_allclose(own, (plain[0] + plain[1]) / 2, atol=1e-6)
    own, reverse = (bio.embed(s, model, pooling="tokens", both_strands=True) for s in (SEQUENCES, other(SEQUENCES)))
    assert [len(rows) for rows in own] == [len(sequence) for sequence in SEQUENCES]
    assert apart(own, [rows[::-1] for rows in reverse]) <= TOLERANCE and own[0].dtype == np.float32
    assert apart(own, reverse) > 1e-2


@pytest.mark.parametrize("name", MASKED)
def test_logits(name):
    model = make(name)
    complement = list(model.tokenizer.complement)
    own, reverse = (bio.logits(s, model, both_strands=True) for s in (SEQUENCES, other(SEQUENCES)))
    assert [rows.shape for rows in own] == [(len(sequence), 12) for sequence in SEQUENCES]
    assert apart(own, [rows[::-1, complement] for rows in reverse]) <= TOLERANCE
    plain, back = (bio.logits(s, model) for s in (SEQUENCES, other(SEQUENCES)))
    assert apart(plain, [rows[::-1, complement] for rows in back]) > 1e-2
    np.testing.assert_allclose(own[3], (plain[3] + back[3][::-1, complement]) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["mlstm, causal", "slstm, tied", "encoder"])
def test_scores(name):
    model = make(name)
    own, reverse = (bio.score(s, model, both_strands=True) for s in (SEQUENCES, other(SEQUENCES)))
    np.testing.assert_allclose(own, reverse, atol=1e-4)
    plain, back = (bio.score(s, model) for s in (SEQUENCES, other(SEQUENCES)))
    assert abs(plain - back).max() > 1e-2
    np.testing.assert_allclose(own, (plain + back) / 2, atol=1e-6)


@pytest.mark.parametrize("k", [3, 4])
def test_kmers(k):
    model = make("encoder", bio.KmerTokenizer(k=k))
    whole = ["ACGTTGACCCAT", "AACCGTGTNAGACATTACAGGTAC"]
    complement = list(model.tokenizer.complement)
    own, reverse = (bio.logits(s, model, both_strands=True) for s in (whole, other(whole)))
    assert own[0].shape == (12 // k, len(complement))
    assert apart(own, [rows[::-1, complement] for rows in reverse]) <= TOLERANCE
    own, reverse = (bio.embed(s, model, both_strands=True) for s in (SEQUENCES, other(SEQUENCES)))
    assert apart(own, reverse) <= TOLERANCE
    for verb, options in ((bio.logits, {}), (bio.embed, {"pooling": "tokens"})):
        with pytest.raises(InputError, match="record 2: Its tokens are not those of the other strand"):
            verb(["ACGTTGACCCAT", "ACGTT"], model, both_strands=True, **options)


def test_the_complement_is_that_of_the_text():
    for tokenizer in (bio.DNATokenizer(), bio.KmerTokenizer(k=3), bio.KmerTokenizer(k=2, n="refuse", tail="refuse")):
        complement = tokenizer.complement
        assert [complement[i] for i in complement] == list(range(len(tokenizer.vocabulary)))
        ends = {tokenizer.vocabulary.require("bos"), tokenizer.vocabulary.require("eos")}
        assert all((complement[i] == i) != (i in ends) for i in tokenizer.vocabulary.special_ids)
        text = "ACGTTGACCCAA"
        ids = tokenizer.encode(text).tolist()
        assert [complement[i] for i in ids[::-1]] == tokenizer.encode(bio.reverse_complement(text)).tolist()
    assert bio.DNATokenizer().complement == (0, 2, 1, 3, 4, 5, 6, 10, 9, 8, 7, 11)


@pytest.mark.parametrize("blocks", ["mlstm", "slstm", "mlstm-7b"])
def test_a_model_that_shares_its_parameters_needs_no_average(blocks):
    tokenizer = bio.DNATokenizer()
    config = XLSTMConfig(12, 32, 2, heads=2, blocks=blocks, direction="tied", complement=tokenizer.complement)
    model = LanguageModel(tokenizer, config).eval()
    own, reverse = (bio.logits(s, model) for s in (SEQUENCES, other(SEQUENCES)))
    assert apart(own, [rows[::-1, list(tokenizer.complement)] for rows in reverse]) <= TOLERANCE
    own, reverse = (bio.embed(s, model, pooling="tokens") for s in (SEQUENCES, other(SEQUENCES)))
    assert own[0].shape == (18, 64) and apart(own, [rows[::-1, ::-1] for rows in reverse]) <= TOLERANCE
    own, reverse = (bio.embed(s, model) for s in (SEQUENCES, other(SEQUENCES)))
    assert apart(own, reverse[:, ::-1]) <= TOLERANCE


def test_layers_and_records_with_problems():
    model = make("encoder")
    records = [Record("ACGT", "a", 1), Record("AJ", "b", 2, InputError("bad")), Record("GGC", "c", 3)]
    layers = bio.embed(records, model, layer=[0, 1, -1], pooling="tokens", both_strands=True)
    assert [[len(rows) for rows in layer] for layer in layers] == [[4, 0, 3]] * 3
    pooled = bio.embed(records, model, layer=[0, -1], both_strands=True)
    assert np.isnan(pooled[1][1]).all() and np.isfinite(pooled[1][[0, 2]]).all()
    assert [rows.shape for rows in bio.logits(records, model, both_strands=True)] == [(4, 12), (0, 12), (3, 12)]
    assert np.isnan(bio.score(records, model, both_strands=True)).tolist() == [False, True, False]


def test_conditions_are_passed_on():
    model = make("encoder", conditions=(("species", 2),))
    for verb in (bio.logits, bio.score):
        plain, null, some = (
            verb(SEQUENCES, model, both_strands=True, conditions=conditions)
            for conditions in (None, {"species": 0}, {"species": 2})
        )
        assert apart(plain, null) == 0 and apart(plain, some) > 1e-3


def test_what_is_refused():
    protein = make("encoder", bio.ProteinTokenizer())
    for verb in (bio.embed, bio.score, bio.logits):
        with pytest.raises(ConfigError, match="'protein' does not read DNA"):
            verb(["MKL"], protein, both_strands=True)
    with pytest.raises(ConfigError, match="causal"):
        bio.logits(["ACGT"], make("decoder"))

"""Contacts are fair-esm's (random weights, real proteins)."""

from argparse import Namespace

import processive as pv
import pytest
import torch
from processive import bio
from processive.backbones import TransformerConfig
from processive.errors import ConfigError, InputError
from processive.models import HeadConfig, LanguageModel
from processive.sequences import Record

PROTEINS = [
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",  # ubiquitin
    "FVNQHLCGSHLVEALYLVCGERGFFYTPKT",  # insulin, chain B
    "CYIQNCPLG",  # oxytocin
    "M",
]
ESM2 = TransformerConfig(
    33, 40, 3, heads=5, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=32
)


def random_model(contacts=True):
    model = LanguageModel(bio.ProteinTokenizer(), ESM2, HeadConfig("esm", contacts=contacts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if contacts:
            model.contacts.weight.mul_(10)  # so that the maps count beside the bias
    return model


def test_contacts_equal_fair_esm(tmp_path):
    esm = pytest.importorskip("esm")
    model = random_model()
    model.save(tmp_path, format="fair-esm")
    theirs = esm.model.esm2.ESM2(num_layers=3, embed_dim=40, attention_heads=5).eval()
    for file in tmp_path.glob("*.pt"):
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(file, weights_only=True)["model"]
        names = (name.removeprefix("encoder.").removeprefix("sentence_encoder.") for name in state)
        theirs.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    tokens = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()([("", p) for p in PROTEINS])[2]
    with torch.no_grad():
        want = theirs.predict_contacts(tokens)
    got = bio.contacts(PROTEINS, model)
    for protein, ours, one in zip(PROTEINS, got, want, strict=True):
        size = len(protein)
        assert ours.shape == (size, size)
        assert ours.dtype == "float32"
        assert (torch.from_numpy(ours) - one[:size, :size]).abs().max() <= 1e-4
    assert got[0].std() > 0.02
    back = pv.load(tmp_path)
    for one, other in zip(got, bio.contacts(PROTEINS, back, batch_tokens=1), strict=True):  # alone as in company
        assert abs(one - other).max() <= 1e-5


def test_records_with_a_problem_have_no_contacts():
    records = [Record("CYIQNCPLG", number=1), Record("", number=2, problem=InputError("It is empty."))]
    assert [found.shape for found in bio.contacts(records, random_model())] == [(9, 9), (0, 0)]


def test_a_model_without_the_regression_is_refused():
    with pytest.raises(ConfigError, match="no regression"):
        bio.contacts(PROTEINS, random_model(contacts=False))

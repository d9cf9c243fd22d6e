import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processive import bio
from processive.backbones import TransformerConfig
from processive.bio.letters import LetterTokenizer
from processive.bio.variants import Substitution, check_variant, default_method
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel
from processive.sequences import PackedBatch

SEQUENCE = "MAKLVAGK"


def test_parse():
    assert bio.parse_variant("A42G") == (Substitution("A", 42, "G"),)
    assert bio.parse_variant("a24g:K30R") == (Substitution("A", 24, "G"), Substitution("K", 30, "R"))


@pytest.mark.parametrize("variant", ["", "A", "42G", "A0G", "A4", "A4*", "A4G:", "A4-", "p.Ala4Gly", "A4G,K5R"])
def test_parse_refuses(variant):
    with pytest.raises(InputError, match="is not a substitution"):
        bio.parse_variant(variant)


def test_parse_refuses_one_position_twice():
    with pytest.raises(InputError, match="A4G:A4C, position 4: The variant names a position twice"):
        bio.parse_variant("A4G:A4C")


def test_wild_type_is_checked():
    assert bio.apply_variant(SEQUENCE, "A2G:K8R") == "MGKLVAGR"
    assert bio.apply_variant(SEQUENCE.lower(), "a2g") == "MGKLVAGK"
    with pytest.raises(InputError, match="K2G, position 2: The sequence has 'A' here, not 'K'") as caught:
        check_variant(SEQUENCE, "K2G")
    assert caught.value.position == 2
    with pytest.raises(InputError, match="K9G, position 9: The sequence has the positions 1 to 8 only"):
        check_variant(SEQUENCE, "K9G")


def test_positions_may_count_from_elsewhere():
    assert bio.apply_variant(SEQUENCE, "A25G", first=24) == bio.apply_variant(SEQUENCE, "A2G")
    assert check_variant(SEQUENCE, "A25G", first=24) == (Substitution("A", 2, "G"),)
    with pytest.raises(InputError, match="A2G, position 2: The sequence has the positions 24 to 31 only"):
        bio.apply_variant(SEQUENCE, "A2G", first=24)


@pytest.mark.shared_data
def test_real_variants_fit_their_sequence(shared):
    """Names count from 24, where the mature beta-lactamase begins."""
    wild_type = bio.read(shared / "bio/msa/BLAT_ECOLX.a2m", "protein")[0].text
    with (shared / "bio/dms/BLAT_ECOLX_Ranganathan2015_labeled.csv").open() as file:
        variants = [row["mutant"] for row in csv.DictReader(file)]
    assert len(variants) > 4900
    for variant in variants:
        mutant = bio.apply_variant(wild_type, variant, first=24)
        assert mutant[int(variant[1:-1]) - 24] == variant[-1]


@settings(deadline=None)
@given(st.text(bio.AMINO_ACIDS, max_size=12))
def test_all_single_variants_are_each_one_letter_away(sequence):
    variants = bio.all_single_variants(sequence)
    assert len(variants) == 19 * len(sequence) == len(set(variants))
    for variant in variants:
        mutant = bio.apply_variant(sequence, variant)
        assert sum(a != b for a, b in zip(sequence, mutant, strict=True)) == 1


def test_all_single_variants_of_dna():
    assert bio.all_single_variants("AC", bio.BASES) == ["A1C", "A1G", "A1T", "C2A", "C2G", "C2T"]
    with pytest.raises(InputError, match="position 2"):
        bio.all_single_variants("A-C")


@pytest.mark.parametrize("before", [[], ["<cls>", "<eos>"]], ids=str)
def test_marginals_are_read_where_the_letters_stand(before):
    """A tokenizer that puts nothing before a sequence, or two tokens, and a model that reads a prefix."""
    letters = LetterTokenizer(
        ["<pad>", "<mask>", "<cls>", "<eos>", *bio.AMINO_ACIDS],
        roles={"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"},
        before=before,
        after=["<eos>"],
    )
    model, encoder = tiny(letters, "prefix"), tiny(letters, "bidirectional")
    table = log_p(encoder, SEQUENCE, len(before) + 1, mask=True)
    assert encoder.tokenizer.encode(SEQUENCE)[len(before) + 1] == letters.vocabulary.ids["A"]
    for one in (model, encoder):
        np.testing.assert_allclose(bio.score_variants(SEQUENCE, ["A2G"], one), [table["G"] - table["A"]], atol=1e-5)


def tiny(tokenizer, direction):
    torch.manual_seed(0)
    size = len(tokenizer.vocabulary)
    return LanguageModel(tokenizer, TransformerConfig(size, width=16, depth=1, heads=2, direction=direction))


@pytest.fixture
def masked():
    return tiny(bio.ProteinTokenizer(), "bidirectional")


def log_p(model, text, position, *, mask):
    """The table at one letter, by a pass over that sequence alone."""
    tokens = torch.from_numpy(model.tokenizer.encode(text).astype(np.int64))
    if mask:
        tokens[position] = model.vocabulary.role("mask")
    with torch.no_grad():
        logits, _ = model.eval()(PackedBatch.from_sequences([tokens]))
    return dict(zip(model.vocabulary.tokens, logits[position].double().log_softmax(0).tolist(), strict=True))


@pytest.mark.parametrize(("method", "mask"), [("masked-marginal", True), ("wild-type-marginal", False)])
@pytest.mark.parametrize("batch_tokens", [8192, 1])
def test_marginals_add_up_over_the_sites(masked, method, mask, batch_tokens):
    second, eighth = (log_p(masked, SEQUENCE, position, mask=mask) for position in (2, 8))
    a2g, k8r = second["G"] - second["A"], eighth["R"] - eighth["K"]
    variants = ["K8R", "A2G:K8R", "A2G", "A2A"]
    scores = bio.score_variants(SEQUENCE.lower(), variants, masked, method=method, batch_tokens=batch_tokens)
    assert abs(a2g) > 1e-3
    np.testing.assert_allclose(scores, [k8r, a2g + k8r, a2g, 0], atol=1e-5)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("tokenizer", [bio.DNATokenizer(), bio.KmerTokenizer(k=2)], ids=lambda t: t.name)
def test_likelihood_is_mutant_minus_wild_type(tokenizer, direction):
    model = tiny(tokenizer, direction)
    scores = bio.score_variants("acgta", ["A1C", "G3A:T4C", "C2C"], model, method="likelihood")
    wild_type, first, second = bio.score(["ACGTA", "CCGTA", "ACACA"], model)
    np.testing.assert_allclose(scores, [first - wild_type, second - wild_type, 0], atol=1e-6)
    assert abs(scores[0]) > 1e-3


def test_the_default_method_fits_the_model(masked):
    variants = ["A2G"]
    np.testing.assert_allclose(
        bio.score_variants(SEQUENCE, variants, masked),
        bio.score_variants(SEQUENCE, variants, masked, method="masked-marginal"),
    )
    assert default_method(masked) == "masked-marginal"
    causal = tiny(bio.ProteinTokenizer(), "causal")
    assert default_method(causal) == "likelihood"
    np.testing.assert_allclose(
        bio.score_variants(SEQUENCE, variants, causal),
        bio.score_variants(SEQUENCE, variants, causal, method="likelihood"),
    )
    for method in ("masked-marginal", "wild-type-marginal"):
        with pytest.raises(ConfigError, match="needs a masked model"):
            bio.score_variants(SEQUENCE, variants, causal, method=method)


@pytest.mark.parametrize("method", ["masked-marginal", "likelihood"])
def test_scores_do_not_depend_on_where_positions_count_from(masked, method):
    np.testing.assert_allclose(
        bio.score_variants(SEQUENCE, ["A25G", "K26R"], masked, method=method, first=24),
        bio.score_variants(SEQUENCE, ["A2G", "K3R"], masked, method=method),
    )


def test_marginals_need_one_token_per_letter():
    with pytest.raises(ConfigError, match="one token per letter"):
        bio.score_variants("ACGT", ["A1C"], tiny(bio.KmerTokenizer(k=2), "bidirectional"))


def test_every_variant_is_checked_before_anything_is_computed(masked, monkeypatch):
    monkeypatch.setattr(masked.backbone, "forward", None)
    with pytest.raises(InputError, match=r"record 2 \(K2G\), position 2"):
        bio.score_variants(SEQUENCE, ["A2G", "K2G"], masked)
    with pytest.raises(InputError, match=r"record 1 \(A2J\), position 2: 'J'"):
        bio.score_variants(SEQUENCE, ["A2J"], masked)
    with pytest.raises(InputError, match=r"record 3 \(A2G:K8J\), position 8: 'J'"):
        bio.score_variants(SEQUENCE, ["A2G", "K8G", "A2G:K8J"], masked)
    with pytest.raises(InputError, match="position 3: 'J'"):
        bio.score_variants("MAJ", ["A2G"], masked)
    assert bio.score_variants(SEQUENCE, [], masked).shape == (0,)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processive import bio
from processive.bio.sequence import IUPAC
from processive.errors import ConfigError, InputError


def test_reverse_complement():
    assert bio.reverse_complement("ATGCRn") == "nYGCAT"
    assert bio.reverse_complement("") == ""
    assert bio.reverse_complement("UA") == "TA"


def test_complement_of_every_code_is_the_code_of_its_complements():
    pairs = dict(zip("ACGT", "TGCA", strict=True))
    by_bases = {"".join(sorted(bases)): code for code, bases in IUPAC.items()}
    for code, bases in IUPAC.items():
        assert bio.reverse_complement(code) == by_bases["".join(sorted(pairs[base] for base in bases))]


@settings(deadline=None)
@given(st.text("ACGTRYSWKMBDHVNacgtryswkmbdhvn", max_size=50))
def test_reverse_complement_twice_is_the_sequence(text):
    once = bio.reverse_complement(text)
    assert len(once) == len(text)
    assert bio.reverse_complement(once) == text


def test_agrees_with_biopython():
    seq = pytest.importorskip("Bio.Seq")
    text = "ATGCRYSWKMBDHVNacgt"
    assert bio.reverse_complement(text) == str(seq.Seq(text).reverse_complement())


def test_reverse_complement_refuses_by_position():
    with pytest.raises(InputError, match="position 3") as caught:
        bio.reverse_complement("AC-T")
    assert caught.value.position == 3


def test_translate():
    assert bio.translate("ATGAARTAA") == "MK*"
    assert bio.translate("ATGAAATAA", to_stop=True) == "MK"
    assert bio.translate("ATGNNN") == "MX"
    assert bio.translate("") == ""
    assert bio.translate("AUAUGA", table=2) == "MW"  # vertebrate mitochondria
    with pytest.raises(InputError, match="multiple of 3; this one has 4"):
        bio.translate("ATGA")
    with pytest.raises(ConfigError, match="genetic code 99"):
        bio.translate("ATG", table=99)
    with pytest.raises(InputError, match="position 4"):
        bio.translate("ATG-AA")


@pytest.mark.parametrize(
    ("texts", "alphabet"),
    [
        (["ACGT", "acgtn"], "dna"),
        (["AUGC"], "dna"),
        (["ACGTACGTACGTACGTACGTE"], "dna"),  # one wrong letter is reported as wrong, not read as a protein
        (["ACG--T*"], "dna"),
        (["MKLV"], "protein"),
        (["GAT", "MKLVFFAEDVGSNK"], "protein"),
        ([], "protein"),
    ],
)
def test_guess_alphabet(texts, alphabet):
    assert bio.guess_alphabet(texts) == alphabet

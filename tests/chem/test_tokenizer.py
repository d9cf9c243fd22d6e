import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.chem.tokenizer import BARE_ATOMS, BONDS_AND_RINGS, ELEMENTS, UNITS, SmilesTokenizer
from processive.errors import ConfigError, InputError
from processive.sequences import Tokenizer, tokenizer_from_dict, tokenizer_to_dict

TOKENIZER = SmilesTokenizer()


def tokens(smiles):
    return TOKENIZER.vocabulary.decode(TOKENIZER.encode(smiles).tolist())


EDGES = {
    "": [],
    "CC(=O)Cl": ["C", "C", "(", "=", "O", ")", "Cl"],
    "BrCCB": ["Br", "C", "C", "B"],
    "c1cc[nH]c1": ["c", "1", "c", "c", "[nH]", "c", "1"],
    "[Sc]": ["[", "Sc", "]"],  # one element, not sulfur and an aromatic carbon
    "[Cn]": ["[", "Cn", "]"],
    "[Sn+2]": ["[", "Sn", "+", "2", "]"],
    "Sc1ccccc1": ["S", "c", "1", "c", "c", "c", "c", "c", "1"],  # outside brackets it is sulfur on a ring
    "[13CH4]": ["[", "1", "3", "C", "H", "4", "]"],
    "[CH3:12]": ["[", "C", "H", "3", ":", "1", "2", "]"],
    "F/C=C\\F": ["F", "/", "C", "=", "C", "\\", "F"],
    "C%12CC%(123)": ["C", "%", "1", "2", "C", "C", "%", "(", "1", "2", "3", ")"],
    "[NH4+].[Cl-]": ["[", "N", "H", "4", "+", "]", ".", "[Cl-]"],
    "N[C@@H](C)C": ["N", "[C@@H]", "(", "C", ")", "C"],
    "[C@TH1H](F)Cl": ["[", "C", "@TH", "1", "H", "]", "(", "F", ")", "Cl"],
    "[Co@OH12]": ["[", "Co", "@OH", "1", "2", "]"],
    "[se]1[te]cc1": ["[se]", "1", "[", "te", "]", "c", "c", "1"],
    "[Zn++]": ["[", "Zn", "+", "+", "]"],
    "N->[Pt]<-N": ["N", "->", "[", "Pt", "]", "<-", "N"],
    "CC>>C=C": ["C", "C", ">", ">", "C", "=", "C"],
    "C$C~*": ["C", "$", "C", "~", "*"],
    "[#6]": ["[", "#", "6", "]"],
}


@pytest.mark.parametrize("smiles", EDGES)
def test_edge_cases_become_the_tokens_expected(smiles):
    ids = TOKENIZER.encode(smiles)
    assert ids.dtype == np.int32
    assert tokens(smiles) == ["<bos>", *EDGES[smiles], "<eos>"]
    assert TOKENIZER.decode(ids) == smiles


def test_vocabulary_is_fixed_and_fits_a_byte():
    assert isinstance(TOKENIZER, Tokenizer)
    assert len(TOKENIZER.vocabulary) <= 256
    assert TOKENIZER.vocabulary.tokens[:5] == ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")
    assert len(ELEMENTS) == len(set(ELEMENTS)) == 118
    assert all(len(TOKENIZER.encode(unit)) == 3 for unit in UNITS)


@pytest.mark.parametrize("element", [*ELEMENTS, "b", "c", "n", "o", "p", "s", "se", "as", "te", "si", "*"])
def test_no_bracket_atom_is_out_of_vocabulary(element):
    for smiles in (f"[{element}]", f"[99{element}@@H3+2:7]"):
        ids = TOKENIZER.encode(smiles)
        assert TOKENIZER.decode(ids) == smiles
        assert TOKENIZER.vocabulary.require("unk") not in ids
    assert tokens(f"[99{element}@@H3+2:7]")[4] == element


@pytest.mark.parametrize(
    ("smiles", "position", "word"),
    [
        ("CCX", 3, "'X'"),
        ("C C", 2, "White space"),
        ("CC\n", 3, "White space"),
        ("C[CH3", 2, "not closed"),
        ("C[C[C]", 2, "not closed"),
        ("CC]C", 3, "not opened"),
        ("C[Xx]", 3, "'X'"),
        ("C[13C!]", 6, "'!'"),
        ("CHe", 2, "'H'"),  # outside brackets helium is no atom
        ("Cé", 2, "'é'"),
        ("C" * 200 + "Q" + "C" * 200, 201, "'Q'"),
        ("<pad>", 1, "'<'"),
    ],
)
def test_what_cannot_be_tokenized_is_named_with_its_position(smiles, position, word):
    with pytest.raises(InputError, match=word) as caught:
        TOKENIZER.encode(smiles)
    assert caught.value.position == position
    assert len(str(caught.value)) < 220


def test_decode_leaves_specials_out_wherever_they_stand():
    ids = TOKENIZER.vocabulary.ids
    assert TOKENIZER.decode([ids["<bos>"], ids["C"], ids["<mask>"], ids["O"], ids["<eos>"], ids["<pad>"]]) == "CO"


def test_other_units_survive_json_and_lose_nothing():
    few = SmilesTokenizer(["[nH]"])
    again = tokenizer_from_dict(tokenizer_to_dict(few))
    assert again.vocabulary == few.vocabulary
    assert again.decode(again.encode("c1[nH]cc1[C@@H](C)O")) == "c1[nH]cc1[C@@H](C)O"
    assert len(few.encode("[C@@H]")) == 7
    # parts come first, so their ids do not depend on the units
    assert few.vocabulary.ids["[nH]"] == TOKENIZER.vocabulary.ids["[nH]"] == len(few.vocabulary) - 1
    assert SmilesTokenizer.from_dict({}).vocabulary == TOKENIZER.vocabulary


@pytest.mark.parametrize("units", [["nH"], ["[nH]", "[nH]"], ["C"], ["[nH]C"], ["[Xx]"]])
def test_a_unit_that_is_no_bracket_atom_is_refused(units):
    with pytest.raises(ConfigError):
        SmilesTokenizer(units)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="regex"):
        SmilesTokenizer.from_dict({"regex": "."})
    with pytest.raises(ConfigError, match="format 2"):
        SmilesTokenizer.from_dict({"format": 2})


digits = st.text("0123456789", max_size=3)
bracket_atom = st.builds(
    lambda isotope, symbol, chiral, hydrogens, charge, label: f"[{isotope}{symbol}{chiral}{hydrogens}{charge}{label}]",
    digits,
    st.sampled_from([*ELEMENTS, "c", "n", "o", "s", "p", "b", "se", "as", "te", "si", "*"]),
    st.sampled_from(["", "@", "@@", "@TH1", "@AL2", "@SP3", "@TB20", "@OH30"]),
    st.sampled_from(["", "H", "H2", "H3", "H4"]),
    st.sampled_from(["", "+", "-", "++", "--", "+2", "-3"]),
    st.one_of(st.just(""), digits.map(lambda d: f":{d}")),
)
ring = st.one_of(
    st.sampled_from("0123456789"),
    st.integers(10, 99).map(lambda n: f"%{n}"),
    st.integers(100, 99999).map(lambda n: f"%({n})"),
)
smiles_like = st.lists(
    st.one_of(bracket_atom, ring, st.sampled_from([*BARE_ATOMS, *BONDS_AND_RINGS, *UNITS])), max_size=60
).map("".join)


@settings(deadline=None, max_examples=400)
@given(smiles_like)
def test_every_string_of_the_grammar_round_trips(smiles):
    ids = TOKENIZER.encode(smiles)
    assert TOKENIZER.decode(ids) == smiles
    assert "".join(tokens(smiles)[1:-1]) == smiles


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.text(max_size=40), st.text("[]()%@CNclsnHe+-123:/\\ \n<>", max_size=40)))
def test_any_text_round_trips_or_is_refused_at_a_position(text):
    try:
        ids = TOKENIZER.encode(text)
    except InputError as error:
        assert error.position is not None and 1 <= error.position <= len(text)
        # whatever stands before the position is not to blame: cut there, the rest of the prefix can be tokenized,
        # unless the cut itself leaves a bracket open
        prefix = text[: error.position - 1]
        if prefix.rfind("[") <= prefix.rfind("]"):
            assert TOKENIZER.decode(TOKENIZER.encode(prefix)) == prefix
    else:
        assert TOKENIZER.decode(ids) == text


def test_all_of_nci_round_trips():
    rdconfig = pytest.importorskip("rdkit.RDConfig")
    lines = (Path(rdconfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
    smiles = [line.split()[0] for line in lines if line.strip()]
    assert len(smiles) == 4999
    assert all(TOKENIZER.decode(TOKENIZER.encode(text)) == text for text in smiles)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["chembl31/mini_train", "chembl31/valid", "chembl31/test", "in_context/valid"])
def test_all_of_the_published_sets_round_trip(shared, name):
    with zipfile.ZipFile(shared / "chem" / f"{name}.zip") as archive:
        smiles = archive.read(archive.namelist()[0]).decode().split()
    assert len(smiles) == (50 if "context" in name else 50_000)
    assert all(TOKENIZER.decode(TOKENIZER.encode(text)) == text for text in smiles)

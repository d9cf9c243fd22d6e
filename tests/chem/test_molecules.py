import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processive.chem.molecules import canonical_smiles, parse_all, parse_smiles
from processive.errors import InputError, MissingExtra

pytest.importorskip("rdkit")


def test_a_molecule_comes_back_sanitised():
    assert [atom.GetIsAromatic() for atom in parse_smiles("C1=CC=CC=C1").GetAtoms()] == [True] * 6


@pytest.mark.parametrize("smiles", ["", ".", "C1CC", "C(C)(C)(C)(C)C", "not a molecule"])
def test_one_and_many_agree_on_what_is_none(smiles):
    with pytest.raises(InputError, match="is not a molecule: "):
        parse_smiles(smiles)
    assert [found is None for found in parse_all(["C", smiles])] == [False, True]
    assert canonical_smiles([smiles, "OC"]) == [None, "CO"]


def test_a_long_string_is_shortened_in_the_message():
    with pytest.raises(InputError) as caught:
        parse_smiles("C" * 5000 + "(")
    assert len(str(caught.value)) < 200
    assert caught.value.position == 5001


@settings(deadline=None, max_examples=200)
@given(st.text("CNcn()[]12%=#.@H+-/\\", max_size=20))
def test_every_string_is_a_molecule_or_has_a_reason(smiles):
    try:
        assert parse_smiles(smiles).GetNumAtoms()
    except InputError as error:
        assert error.position is None or 1 <= error.position <= len(smiles)


def test_without_rdkit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingExtra, match=r"pip install 'processive\[chem\]'"):
        parse_smiles("C")
    with pytest.raises(MissingExtra, match=r"pip install 'processive\[chem\]'"):
        parse_all(["C"])

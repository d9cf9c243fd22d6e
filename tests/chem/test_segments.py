"""SMILES by learnt segments: what is encoded comes back letter for letter, or is refused with a position."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processive.chem.segments import PAIRS, SPECIALS, SegmentTokenizer
from processive.errors import ConfigError, InputError

RING = [f"%{number}" for number in range(10, 13)]
SEGMENTS = [*"CNOSPFIBHcnosp[]()=#-+123456789@/.", "Cl", "Br", "Si", "se", "Cs", *RING]
TOKENIZER = SegmentTokenizer([*SPECIALS, *SEGMENTS])


@given(st.lists(st.sampled_from([s for s in SEGMENTS if s != "Cs"]), max_size=40).map("".join))
def test_segments_round_trip(smiles):
    ids = TOKENIZER.encode(smiles)
    assert (TOKENIZER.vocabulary.tokens[ids[0]], TOKENIZER.vocabulary.tokens[ids[-1]]) == ("[BEG]", "[END]")
    assert TOKENIZER.decode(ids) == smiles
    assert SegmentTokenizer.from_dict(TOKENIZER.to_dict()).encode(smiles).tolist() == ids.tolist()


@given(st.one_of(st.text(max_size=30), st.text("[]()%CNclBrSie01\\/ \n", max_size=30)))
def test_any_text_comes_back_or_is_refused_by_position(text):
    try:
        ids = TOKENIZER.encode(text)
    except InputError as error:
        assert error.position is not None and 1 <= error.position <= len(text)
    else:
        assert TOKENIZER.decode(ids) == text


def test_real_molecules_round_trip():
    from rdkit import RDConfig

    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().split("\n")
    molecules = [line.split()[0] for line in lines if line.strip()]
    letters = sorted({letter for smiles in molecules for letter in smiles} - {"\\"})
    rings = [f"%{number}" for number in range(10, 100)]
    tokenizer = SegmentTokenizer([*SPECIALS, *dict.fromkeys([*letters, *PAIRS, *rings, "Cs"])])
    known = [smiles for smiles in molecules if "\\" not in smiles]
    assert len(known) > 4500
    assert all(tokenizer.decode(tokenizer.encode(smiles)) == smiles for smiles in known)


def test_a_vocabulary_without_an_end():
    with pytest.raises(ConfigError, match=r"have no \[END\]"):
        SegmentTokenizer(["[PAD]", "[BEG]", "C"])

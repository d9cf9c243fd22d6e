"""Frames of k-mers, by hand: which bases are read, and what is cut."""

import pytest
from processive import bio
from processive.errors import ConfigError, InputError
from processive.sequences import Record, tokenize_files

STRICT = bio.KmerTokenizer(k=3, n="refuse", tail="refuse", end=False)
LOOSE = bio.KmerTokenizer(k=3)


def test_frames_are_whole_kmers_between_unknown_bases():
    assert bio.in_frames("ACGTTA", STRICT, 3) == ["ACGTTA", "CGT", "GTT"]
    assert bio.in_frames("ACGTNacgRAC", STRICT, 2) == ["ACG", "acg", "CGT"]
    assert bio.in_frames("ACGTN", LOOSE, 3) == ["ACGTN", "CGTN", "GTN"]
    assert bio.in_frames("AC", STRICT, 3) == []


def test_every_base_is_in_some_frame():
    for length in range(3, 12):
        text = ("ACGT" * 3)[:length]
        covered = set()
        for frame, part in enumerate(bio.in_frames(text, STRICT, 3)):
            assert text[frame : frame + len(part)] == part and len(part) % 3 == 0
            covered |= set(range(frame, frame + len(part)))
        assert covered == set(range(length))


def test_tokenize_in_frames():
    records = [Record("ACGTTA", "a", 1), Record("", "b", 2, InputError("empty")), Record("TTTN", "c", 3)]
    found = bio.tokenize(records, STRICT, frames=3)
    assert [STRICT.decode(ids) for ids in found] == ["ACGTTA", "CGT", "GTT", "TTT"]
    assert all(ids[0] == STRICT.vocabulary.ids["<s>"] for ids in found)
    with pytest.raises(InputError, match=r"record 4 \(d\).*too short"):
        bio.tokenize([Record("ANA", "d", 4)], STRICT, frames=3)


def test_a_store_in_frames_is_the_same(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nACGTTA\n>b\nAN\n>c\nTTTN\n")
    store = tokenize_files(
        {"a": lambda: bio.chunks(tmp_path / "a.fa", STRICT, frames=3)}, STRICT, tmp_path / "s", on_error="skip"
    )
    assert [STRICT.decode(ids) for ids in store] == ["ACGTTA", "CGT", "GTT", "TTT"]
    assert list(store.meta["records"].values()) == [{"records": 3, "unusable": 1}]


def test_what_has_no_frames_is_refused():
    for tokenizer, frames in ((bio.DNATokenizer(), 1), (STRICT, 4), (STRICT, 0)):
        with pytest.raises(ConfigError, match="frames are"):
            bio.in_frames("ACGT", tokenizer, frames)
    with pytest.raises(ConfigError, match="one frame"):
        bio.tokenize([Record("ACGTTA")], STRICT, frames=3, spans={"": [(0, 1)]})

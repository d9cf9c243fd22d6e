import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from processive.bio import DNATokenizer, KmerTokenizer, LetterTokenizer, ProteinTokenizer
from processive.errors import ConfigError, InputError
from processive.sequences import Tokenizer, tokenizer_from_dict, tokenizer_to_dict
from processive.sequences.tokenizer import ManyTokenizer

dna = st.text("ACGTNacgtn", max_size=60)
EVERY = [DNATokenizer(), KmerTokenizer(k=3), KmerTokenizer(), ProteinTokenizer()]


@pytest.mark.parametrize("tokenizer", EVERY, ids=lambda t: f"{t.name}-{t.letters_per_token}")
def test_follows_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert type(again) is type(tokenizer)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.to_dict() == tokenizer.to_dict()
    ids = tokenizer.encode("ACGTACG")
    assert ids.dtype == np.int32
    assert ids[0] == tokenizer.vocabulary.role("bos")
    assert ids[-1] == tokenizer.vocabulary.role("eos")
    assert not set(ids[1:-1].tolist()) & tokenizer.vocabulary.special_ids
    assert tokenizer.decode(tokenizer.encode("")) == ""
    with pytest.raises(ConfigError, match="'colour'"):
        type(tokenizer).from_dict({"colour": 1})


@settings(deadline=None)
@given(dna)
def test_dna_round_trip(text):
    assert DNATokenizer().decode(DNATokenizer().encode(text)) == text.upper()


@settings(deadline=None)
@given(dna, st.integers(2, 7))
def test_kmer_round_trip(text, k):
    tokenizer = KmerTokenizer(k=k)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.upper()
    assert tokenizer.vocabulary.role("unk") not in ids


@settings(deadline=None)
@given(st.text("ACDEFGHIKLMNPQRSTVWYXBUZOacdefghiklmnpqrstvwyxbuzo-.", max_size=80))
def test_protein_round_trip(text):
    assert ProteinTokenizer().decode(ProteinTokenizer().encode(text)) == text.upper()


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from(EVERY))
def test_any_text_is_kept_or_refused_by_position(text, tokenizer):
    try:
        ids = tokenizer.encode(text)
    except InputError as error:
        assert 1 <= error.position <= len(text)
        assert repr(text[error.position - 1]) in str(error)
    else:
        assert len(tokenizer.decode(ids)) == len(text)


def test_dna_has_the_ids_of_dna_xlstm():
    tokenizer = DNATokenizer()
    names = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]
    assert list(tokenizer.vocabulary.tokens) == names
    assert tokenizer.encode("ACGTNacgtn").tolist() == [2, 7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 1]
    assert [tokenizer.vocabulary.role(role) for role in ("bos", "eos", "mask", "pad", "unk")] == [2, 1, 3, 4, 6]


@pytest.mark.parametrize("make", [DNATokenizer, KmerTokenizer])
def test_ambiguity_policies(make):
    assert make().decode(make().encode("ARYSWKMBDHVn")) == "A" + "N" * 11
    assert make().decode(make().encode("AUgu")) == "ATGT"
    with pytest.raises(InputError, match=r"position 3: 'r' \(one of A, G\)") as caught:
        make(iupac="refuse").encode("ACrGT")
    assert caught.value.position == 3
    with pytest.raises(InputError, match="position 2: 'U' is RNA"):
        make(u="refuse").encode("AUG")
    assert make(iupac="refuse").decode(make(iupac="refuse").encode("ACN")) == "ACN"


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [("ACG-T", 4, "gap"), ("AC*", 3, "stop"), ("ACGE", 4, "protein"), ("A1", 2, "nucleotide"), ("ACé", 3, "é")],
)
def test_dna_refuses_by_position(text, position, words):
    for tokenizer in (DNATokenizer(), KmerTokenizer()):
        with pytest.raises(InputError, match=words) as caught:
            tokenizer.encode(text)
        assert caught.value.position == position


def test_kmer_has_the_ids_of_generator():
    tokenizer = KmerTokenizer(n="refuse", tail="refuse")
    ids = tokenizer.vocabulary.ids
    assert len(tokenizer.vocabulary) == 4128
    assert (ids["AAAAAA"], ids["AAAAAT"], ids["TTTTTT"], ids["GGGGGG"]) == (32, 33, 1397, 4127)
    assert tokenizer.encode("TTTTTTAAAAATGGGGGG").tolist() == [1, 1397, 33, 4127, 2]
    assert [tokenizer.vocabulary.role(role) for role in ("unk", "bos", "eos", "pad", "mask")] == [0, 1, 2, 3, 4]


def test_every_kmer_has_its_own_id():
    tokenizer = KmerTokenizer(k=3, n="refuse", tail="refuse")
    kmers = ["".join(letters) for letters in product("ATCG", repeat=3)]
    assert tokenizer.encode("".join(kmers))[1:-1].tolist() == list(range(32, 32 + 64))


def test_kmer_falls_back_to_single_bases():
    tokenizer = KmerTokenizer(k=3)
    tokens = tokenizer.vocabulary.decode(tokenizer.encode("ACGANTGGGCC").tolist())
    assert tokens == ["<s>", "ACG", "A", "N", "T", "GGG", "C", "C", "</s>"]
    assert tokenizer.vocabulary.tokens[-5:] == tuple("ATCGN")


def test_kmer_refuses_where_told_to():
    with pytest.raises(InputError, match="position 5: 'N' is an unknown base"):
        KmerTokenizer(k=3, n="refuse").encode("ACGANT")
    with pytest.raises(InputError, match="position 7: 8 bases are no multiple of 3; the last 2"):
        KmerTokenizer(k=3, tail="refuse").encode("ACGANTGG")
    mixed = KmerTokenizer(k=3, n="refuse", tail="single")
    assert mixed.decode(mixed.encode("ACGGG")) == "ACGGG"
    with pytest.raises(InputError, match="position 4"):
        mixed.encode("ACGNG")


@pytest.mark.parametrize(("version", "size", "first"), [(1, 4105, 4), (2, 4107, 6)])
def test_kmer_has_the_ids_of_nucleotide_transformer(version, size, first):
    tokenizer = KmerTokenizer(layout=f"nucleotide-transformer-v{version}")
    ids = tokenizer.vocabulary.ids
    assert len(tokenizer.vocabulary) == size
    assert tokenizer.vocabulary.tokens[:4] == ("<unk>", "<pad>", "<mask>", "<cls>")
    assert (ids["AAAAAA"], ids["AAAAAT"], ids["GGGGGG"]) == (first, first + 1, first + 4095)
    assert [ids[base] for base in "ATCGN"] == list(range(size - 5, size))
    assert tokenizer.encode("AAAAATAAAAAAAC").tolist() == [3, first + 1, first, size - 5, size - 3]  # and no end
    assert [tokenizer.vocabulary.role(role) for role in ("unk", "pad", "mask", "bos", "eos")] == [0, 1, 2, 3, None]
    assert KmerTokenizer.from_dict(tokenizer.to_dict()).vocabulary == tokenizer.vocabulary


def test_windows_of_nucleotide_transformer_begin_anew_behind_an_n():
    tokenizer = KmerTokenizer(k=3, layout="nucleotide-transformer-v2")
    for text, tokens in (
        ("ACGANTGGGCC", ["ACG", "A", "N", "TGG", "GCC"]),
        ("NNACGT", ["N", "N", "ACG", "T"]),
        ("ACGN", ["ACG", "N"]),
        ("", []),
    ):
        found = tokenizer.encode(text)
        assert tokenizer.vocabulary.decode(found.tolist()) == ["<cls>", *tokens]
        assert tokenizer.decode(found) == text
    assert tokenizer.complement[3] == 3  # it begins and has no end to swap with
    strict = KmerTokenizer(k=3, tail="refuse", layout="nucleotide-transformer-v1")
    assert strict.decode(strict.encode("ACGANTGG")) == "ACGANTGG"
    with pytest.raises(InputError, match="position 9: 4 bases are no multiple of 3; the last 1"):
        strict.encode("ACGANTGGC")


def test_protein_with_chains_has_the_ids_of_esmc():
    tokenizer = ProteinTokenizer(chains=True)
    assert tokenizer.vocabulary.tokens[29:] == (".", "-", "|", "<mask>")
    assert tokenizer.encode("ac|w").tolist() == [0, 5, 23, 31, 22, 2]
    assert tokenizer.decode(tokenizer.encode("AC|W")) == "AC|W"
    assert ProteinTokenizer.from_dict(tokenizer.to_dict()).vocabulary == tokenizer.vocabulary
    with pytest.raises(InputError, match="position 2"):
        ProteinTokenizer().encode("A|C")


def test_protein_has_the_ids_of_esm():
    esm = pytest.importorskip("esm")
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    tokenizer = ProteinTokenizer()
    assert list(tokenizer.vocabulary.tokens) == alphabet.all_toks
    text = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
    assert tokenizer.encode(text).tolist() == [alphabet.cls_idx, *alphabet.encode(text), alphabet.eos_idx]
    assert tokenizer.vocabulary.role("mask") == alphabet.mask_idx == 32
    assert tokenizer.vocabulary.role("pad") == alphabet.padding_idx


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("MKJ", 3, "Replace it with X"),
        ("MK*LL", 3, "a stop"),
        ("MK LL", 3, "' ' is not an amino acid"),
        ("MKLΩ", 4, "Ω"),
        ("M\x00", 2, "amino acid"),
    ],
)
def test_protein_refuses_by_position(text, position, words):
    with pytest.raises(InputError, match=words) as caught:
        ProteinTokenizer().encode(text)
    assert caught.value.position == position


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (DNATokenizer, {"iupac": "X"}),
        (DNATokenizer, {"u": "N"}),
        (KmerTokenizer, {"k": 1}),
        (KmerTokenizer, {"k": 9}),
        (KmerTokenizer, {"n": "oov"}),
        (KmerTokenizer, {"tail": "trim"}),
    ],
)
def test_options_are_checked(make, options):
    with pytest.raises(
        (ConfigError, TypeCheckError), match=next(iter(options))
    ):  # the annotation checker may speak first
        make.from_dict(options)


def test_generator_names_its_special_tokens_and_adds_no_end():
    tokenizer = KmerTokenizer(n="refuse", tail="refuse", end=False)
    assert tokenizer.encode("AAAAAT").tolist() == [1, 33]
    assert [tokenizer.vocabulary.ids[token] for token in ("<oov>", "<mask>", "<bog>", "<vir>", "<sp2>")] == [
        0,
        4,
        5,
        28,
        31,
    ]
    assert KmerTokenizer.from_dict(tokenizer.to_dict()).encode("AAAAAT").tolist() == [1, 33]


@given(st.text("ACDEFGHIKLMNPQRSTVWY", max_size=40))
def test_letters_round_trip(text):
    tokens = ["<pad>", *"ACDEFGHIKLMNPQRSTVWY", "<gmask>", "<sop>", "<eos>"]
    tokenizer = LetterTokenizer(tokens, roles={"eos": "<eos>"}, before=["<gmask>", "<sop>"], after=["<eos>"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) + 3
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text.lower())) == text


def test_letters_of_a_file(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("<pad>\nA\nC\n<mask>\n<eos>\n")
    tokenizer = LetterTokenizer.from_file(
        path, roles={"pad": "<pad>", "mask": "<mask>", "eos": "<eos>"}, after=["<eos>"]
    )
    assert tokenizer.encode("aCA").tolist() == [1, 2, 1, 4]
    assert tokenizer.decode(tokenizer.encode("ACCA")) == "ACCA"
    again = LetterTokenizer.from_dict(tokenizer.to_dict())
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode("A").tolist() == [1, 4]
    with pytest.raises(InputError, match="position 2"):
        tokenizer.encode("AG")
    with pytest.raises(InputError, match=r"tokens\.txt"):
        LetterTokenizer.from_file(path, roles={"bos": "<cls>"})
    with pytest.raises(ConfigError, match="<cls>"):
        LetterTokenizer(["A"], roles={}, before=["<cls>"])


ONE_PASS = [
    DNATokenizer(),
    DNATokenizer(iupac="refuse", u="refuse"),
    ProteinTokenizer(),
    ProteinTokenizer(chains=True),
]


@pytest.mark.parametrize("tokenizer", ONE_PASS, ids=["dna", "dna, strict", "protein", "chains"])
@given(texts=st.lists(st.text("ACGTURYNLacgtunrl.-*|J\x01\x02\x00 \xe9", max_size=8), max_size=5))
@settings(max_examples=200)
def test_many_at_once_are_each_alone(texts, tokenizer):
    assert isinstance(tokenizer, ManyTokenizer)
    try:
        wanted = [tokenizer.encode(text) for text in texts]
    except InputError:
        assert tokenizer.encode_many(texts) is None
        return
    tokens, lengths = tokenizer.encode_many(texts)
    assert tokens.tolist() == [i for ids in wanted for i in ids.tolist()]
    assert lengths.tolist() == [len(ids) for ids in wanted]


def test_letters_that_stand_for_begin_and_end_are_refused():
    for tokenizer in ONE_PASS:
        assert tokenizer.encode_many(["A", "\x01C"]) is None and tokenizer.encode_many(["A\x02\x01C"]) is None
        assert tokenizer.encode_many(["A\x02", "\x01C"]) is None

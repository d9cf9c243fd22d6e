import gzip
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from processive import bio
from processive.errors import ConfigError, InputError, OutputError, ShapeError


def write(path, text):
    path.write_text(text)
    return path


def test_reads_fasta(tmp_path):
    text = ">one first record\nMKL\nvff*\n\n; a comment\n>two\nM K L\r\n> \nMK\n>one\nMA-X\n"
    records = bio.read(write(tmp_path / "p.fasta", text), "protein")
    assert [record.text for record in records] == ["MKLvff", "MKL", "MK", "MA-X"]
    assert [record.name for record in records] == ["one", "two", "", "one"]
    assert [record.number for record in records] == [1, 2, 3, 4]
    assert not records.rejected


@pytest.mark.parametrize("packing", ["plain", "gz", "zst"])
def test_reads_every_packing(tmp_path, packing):
    path = tmp_path / "dna.fa"
    data = b">chr1\nACGTNNacgt\nRYK\n"
    if packing == "gz":
        data = gzip.compress(data)
    elif packing == "zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    assert [(record.name, record.text) for record in bio.read(path)] == [("chr1", "ACGTNNacgtRYK")]


def test_one_sequence_per_line(tmp_path):
    records = bio.read(write(tmp_path / "a.txt", "ACGT\n\nGGCC\n"))
    assert [(record.number, record.text) for record in records] == [(1, "ACGT"), (2, "GGCC")]
    assert bio.read(write(tmp_path / "b.txt", ">x\nACGT\n"))[0].name == "x"


def test_problems_name_record_letter_and_position(tmp_path):
    text = ">good\nMKL\n>empty\n>bad\nMK\nLJV\n>stop\nM*KL*\n>digit\nMK7\n"
    path = write(tmp_path / "p.fasta", text)
    records = bio.read(path, "protein")
    assert [record.problem is None for record in records] == [True, False, False, False, False]
    assert str(records[1].problem) == f"{path}, record 2 (empty): The sequence is empty. Remove the record or fill it."
    assert str(records[2].problem).startswith(f"{path}, record 3 (bad), position 4: 'J' (leucine or isoleucine)")
    assert "position 2: '*' (a stop) stands inside" in str(records[3].problem)
    assert "'7' is not an amino acid" in str(records[4].problem)
    with pytest.raises(InputError, match=r"record 2 \(empty\).*3 more of 5 records"):
        records.checked("raise")
    with pytest.warns(UserWarning, match=r"4 of 5 records cannot be used \(records 2, 3, 4, 5\)"):
        assert len(records.checked("skip")) == 5


def test_alphabet_is_guessed_from_the_whole_file(tmp_path):
    path = write(tmp_path / "d.fasta", ">a\n" + "ACGT" * 10 + "\n>b\nAC-GT\n>c\nACGTE\n")
    records = bio.read(path)
    assert "position 3: '-' (a gap) is not a nucleotide" in str(records[1].problem)
    assert "position 5: 'E' is not a nucleotide. Is this a protein?" in str(records[2].problem)
    assert not bio.read(path, "protein").rejected


def test_the_tokenizer_may_judge(tmp_path):
    path = write(tmp_path / "d.fasta", ">a\nACGR\n>b\nACGT\n>c\n")
    assert [record.problem is None for record in bio.read(path)] == [True, True, False]
    records = bio.read(path, bio.DNATokenizer(iupac="refuse"))
    assert [record.problem is None for record in records] == [False, True, False]
    assert "record 1 (a), position 4: 'R'" in str(records[0].problem)
    protein = write(tmp_path / "p.fasta", ">a\nMKL*\n")
    assert bio.read(protein, bio.ProteinTokenizer())[0].text == "MKL"
    with pytest.raises((ConfigError, TypeCheckError), match="'rna'"):  # the annotation checker may speak first
        bio.read(path, "rna")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        bio.read(tmp_path / "absent.fasta")
    with pytest.raises(InputError, match="directory"):
        bio.read(tmp_path)
    with pytest.raises(InputError, match="empty"):
        bio.read(write(tmp_path / "empty.fasta", ""))
    with pytest.raises(InputError, match="no sequence"):
        bio.read(write(tmp_path / "blank.fasta", "\n \n; nothing\n"))
    with pytest.raises(InputError, match="Line 2 does not begin with '>'"):
        bio.read(write(tmp_path / "text.fasta", "\nhello\n>a\nACGT\n"))


def test_binary_and_truncated_files(tmp_path):
    (tmp_path / "image.fasta").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (tmp_path / "nul.fasta").write_bytes(b">a\nAC\0GT\n")
    for name in ("image.fasta", "nul.fasta"):
        with pytest.raises(InputError, match="not a text file"):
            bio.read(tmp_path / name)
    packed = gzip.compress(b">a\n" + os.urandom(4000).hex().encode())
    (tmp_path / "cut.fasta.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="damaged or cut short"):
        bio.read(tmp_path / "cut.fasta.gz")


names = st.text("ABCxyz_|.123", min_size=1, max_size=12)
proteins = st.text("ACDEFGHIKLMNPQRSTVWYXBUZO-", min_size=1, max_size=150)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(names, proteins), min_size=1, max_size=6), st.integers(1, 80))
def test_written_fasta_reads_back(tmp_path_factory, pairs, width):
    path = tmp_path_factory.mktemp("fasta") / "p.fasta"
    bio.write_fasta(path, [name for name, _ in pairs], [text for _, text in pairs], width=width)
    records = bio.read(path, "protein")
    assert [(record.name, record.text) for record in records] == pairs
    assert max(map(len, path.read_text().splitlines())) <= max(width, 13)


def test_writing_refuses_what_fasta_cannot_hold(tmp_path):
    path = write(tmp_path / "p.fasta", "before")
    with pytest.raises(ShapeError, match="names"):
        bio.write_fasta(path, ["a"], ["MK", "ML"])
    for name, text in (("a\nb", "MK"), ("a", "M\nK"), ("a", ">K")):
        with pytest.raises(ConfigError, match="FASTA cannot"):
            bio.write_fasta(path, [name], [text])
    assert path.read_text() == "before"
    with pytest.raises(OutputError, match="cannot be written"):
        bio.write_fasta(path / "below_a_file.fasta", ["a"], ["MK"])


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("path", "alphabet", "count", "letters"),
    [
        ("bio/protein/QUERY.fasta", "protein", 500, 0),
        ("bio/protein/some_proteins.fasta", "protein", 0, 0),
        ("bio/dna/MT-human.fa", "dna", 1, 16569),
        ("bio/dna/NC_005816.fna", "dna", 1, 9609),
    ],
)
def test_real_files_round_trip(shared, path, alphabet, count, letters):
    records = bio.read(shared / path)
    assert not records.rejected
    assert [record.text for record in records] == [record.text for record in bio.read(shared / path, alphabet)]
    assert not count or len(records) == count
    assert not letters or len(records[0].text) == letters
    tokenizers = [bio.ProteinTokenizer()] if alphabet == "protein" else [bio.DNATokenizer(), bio.KmerTokenizer()]
    for tokenizer in tokenizers:
        for record, ids in zip(records, bio.tokenize(records, tokenizer), strict=True):
            assert tokenizer.decode(ids) == record.text.upper()
            assert tokenizer.vocabulary.role("unk") not in ids

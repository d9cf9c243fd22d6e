"""Tables of spans: BED, GFF and GenBank, by hand and from the chloroplast of Arabidopsis."""

import gzip

import pytest
from processive import bio
from processive.errors import InputError
from processive.sequences import Record

RECORDS = [Record("ACGTACGT", "chr1", 1), Record("GG", "chr2", 2), Record("TTTT", "", 3)]


def test_bed(tmp_path):
    path = tmp_path / "a.bed"
    path.write_text("track name=x\n# c\nchr1\t0\t4\tgene\nchr1 2 8\n\nchrX\t5\t9\n")
    table = bio.read_spans(path)
    assert table == {"chr1": [(0, 4), (2, 8)], "chrX": [(5, 9)]}
    assert bio.spans_by_record(RECORDS, table) == [[(0, 4), (2, 8)], [], []]


def test_gff_counts_from_one_and_to_the_last(tmp_path):
    path = tmp_path / "a.gff3.gz"
    lines = [
        "##gff-version 3",
        "chr1\tx\tgene\t1\t4\t.\t+\t.\tID=a",
        "chr1\tx\texon\t3\t3\t.\t-\t.\tID=b",
        ">chr1",
        "ACGT",
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert bio.read_spans(path) == {"chr1": [(0, 4)]}
    assert bio.read_spans(path, kinds=("exon",)) == {"chr1": [(2, 3)]}
    assert bio.read_spans(path, kinds=("site",)) == {"chr1": [(0, 4), (2, 3)]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.bed", "chr1\t0\t4\nchr1\t4\t4\n", r"Line 2 is no span: it has no name, start and end"),
        ("a.bed", "chr1\tx\t4\n", "Line 1 is no span"),
        ("a.bed", "chr1\n", "Line 1 is no span"),
        ("a.gff", "chr1\tx\tgene\t0\t4\t.\n", "columns 4 and 5"),
        ("a.bed", "# nothing\n", "holds no span"),
    ],
)
def test_what_is_no_span_is_told_by_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        bio.read_spans(tmp_path / name)


def test_spans_are_of_records_by_name():
    with pytest.raises(InputError, match=r"No record has a name of the table of spans \(chrX"):
        bio.spans_by_record(RECORDS, {"chrX": [(0, 1)]})
    twice = [Record("AC", "chr1", 1), Record("AC", "chr1", 2)]
    with pytest.raises(InputError, match=r"record 2 \(chr1\).*same name"):
        bio.spans_by_record(twice, {"chr1": [(0, 1)]})
    assert bio.spans_by_record([*twice, Record("A", "b", 3)], {"b": [(0, 1)]}) == [[], [], [(0, 1)]]
    with pytest.raises(InputError, match=r"Record 2 \(chr2\) has a length of 2 and no span from 1 to 3"):
        bio.tokenize(RECORDS, bio.DNATokenizer(), spans={"chr2": [(1, 3)]})


@pytest.mark.shared_data
def test_genes_of_a_genbank_file(shared):
    pytest.importorskip("Bio")
    from Bio import SeqIO

    path = shared / "bio" / "dna" / "NC_000932.gb"
    table = bio.read_spans(path)
    assert list(table) == ["NC_000932.1"] and len(table["NC_000932.1"]) > 100
    sequence = str(SeqIO.read(path, "genbank").seq)
    (ids,) = spanned = bio.tokenize([Record(sequence, "NC_000932.1", 1)], bio.DNATokenizer(), spans=table)
    genes = spanned.spans_of(0)
    assert genes == [(start + 1, end + 1) for start, end in table["NC_000932.1"]]  # behind the begin token
    start, end = table["NC_000932.1"][3]  # psbA, behind two parts of rps12 and trnH; on the other strand
    assert (start, end) == (382, 1444) and bio.reverse_complement(sequence[start:end])[:3] == "ATG"
    assert len(ids) == len(sequence) + 2

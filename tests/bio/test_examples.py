from pathlib import Path

import pytest
from processive import bio

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def proteins():
    return bio.read(EXAMPLES / "proteins.fasta", "protein")


@pytest.fixture
def genes():
    return bio.read(EXAMPLES / "genes.fasta", "dna")


def test_every_coding_sequence_gives_its_protein(proteins, genes):
    pytest.importorskip("Bio")
    assert len(proteins) == len(genes) == 5
    for protein, gene in zip(proteins, genes, strict=True):
        translated = bio.translate(gene.text)
        assert translated.removesuffix("*") == protein.text, gene.name


def test_headers_carry_the_accessions(proteins, genes):
    accessions = [record.name.split("|")[1] for record in proteins]
    assert accessions == ["P0CG47", "P01308", "P42212", "P69905", "P68871"]
    headers = [line for line in (EXAMPLES / "genes.fasta").read_text().splitlines() if line.startswith(">")]
    for record, header, accession in zip(genes, headers, accessions, strict=True):
        assert header.startswith(f">{record.name} ")
        assert header.endswith(f"encodes {accession}")


def test_known_lengths(proteins):
    assert [len(record.text) for record in proteins] == [76, 110, 238, 142, 147]


def test_they_read_and_tokenize_without_being_told_what_they_are(proteins, genes):
    for name, records, tokenizers in (
        ("proteins", proteins, [bio.ProteinTokenizer()]),
        ("genes", genes, [bio.DNATokenizer(), bio.KmerTokenizer()]),
    ):
        guessed = bio.read(EXAMPLES / f"{name}.fasta")
        assert not guessed.rejected
        for tokenizer in tokenizers:
            decoded = [tokenizer.decode(ids) for ids in bio.tokenize(guessed, tokenizer)]
            assert decoded == [record.text for record in records]

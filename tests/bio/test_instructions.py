"""Proteins as ProLLaMA's text, written and read back."""

import json

import pytest
from processive import bio, text
from processive.errors import InputError
from processive.sequences import Record, TextTokenizer

pytest.importorskip("tokenizers")
PROTEINS = [Record("MKT", "a", 1), Record("gsh", "b", 2), Record("MJ", "c", 3, InputError("bad"))]


def test_two_instructions_for_each_protein_with_a_superfamily(tmp_path):
    path = tmp_path / "it.jsonl"
    assert bio.write_instructions(path, PROTEINS, {"b": "Globin-like superfamily", "c": "x"}) == 2
    generate, determine = map(json.loads, path.read_text().splitlines())
    assert generate == {
        "instruction": "[Generate by superfamily]",
        "input": "Superfamily=<Globin-like superfamily>",
        "output": "Seq=<GSH>",
    }
    assert determine["instruction"] == "[Determine superfamily]"
    assert (determine["input"], determine["output"]) == (generate["output"], generate["input"])
    record, _ = text.read(path)
    assert record.text == "[Generate by superfamily] Superfamily=<Globin-like superfamily> Seq=<GSH>"
    assert record.prompt == bio.superfamily_prompt("Globin-like superfamily")
    spanned = text.tokenize([record], TextTokenizer.from_pieces())
    (begin, end), ids = spanned.spans_of(0)[0], spanned[0]
    assert bytes(record.text, "utf-8")[begin - 1 :] == b" Seq=<GSH>"  # a byte is a token, behind the begin token
    assert end == len(ids)


def test_proteins_alone_and_nothing(tmp_path):
    path = tmp_path / "proteins.jsonl"
    assert bio.write_instructions(path, PROTEINS) == 2
    assert [record.text for record in text.read(path)] == ["Seq=<MKT>", "Seq=<GSH>"]
    with pytest.raises(InputError, match="No protein has a superfamily"):
        bio.write_instructions(path, PROTEINS, {"z": "x"})
    assert [record.text for record in text.read(path)] == ["Seq=<MKT>", "Seq=<GSH>"]


def test_a_table_of_superfamilies(tmp_path):
    path = tmp_path / "families.tsv"
    path.write_text("a\tGlobin-like superfamily\n\nb\tOB-fold superfamily\n")
    assert bio.read_superfamilies(path) == {"a": "Globin-like superfamily", "b": "OB-fold superfamily"}
    path.write_text("a Globin-like\n")
    with pytest.raises(InputError, match="Line 1"):
        bio.read_superfamilies(path)

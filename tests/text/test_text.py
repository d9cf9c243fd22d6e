"""Files of texts and instructions, what of them is learned, and the verbs."""

import gzip
import io
import json

import numpy as np
import pytest
from processive import text
from processive.backbones import TransformerConfig
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel
from processive.sequences import Record, TextTokenizer, TokenStore, tokenize_files

pytest.importorskip("tokenizers")
BYTES = TextTokenizer.from_pieces(["Seq=<"])
ITEMS = [
    {"text": "plain"},
    {"instruction": "Ask", "input": "x", "output": "answer", "name": "q"},
    {"instruction": "Ask", "input": "", "output": "b"},
    {"instruction": "Ask", "output": ""},
    {"output": "b"},
    "no object",
    {"text": 3},
]


def jsonl(path, items=ITEMS):
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n")
    return path


def test_json_lines(tmp_path):
    records = text.read(jsonl(tmp_path / "a.jsonl"))
    found = [(record.text, record.prompt, record.number, record.problem is None) for record in records]
    assert found[:3] == [("plain", "", 1, True), ("Ask x answer", "Ask x", 2, True), ("Ask b", "Ask", 3, True)]
    assert found[3:] == [("", "", number, False) for number in (4, 5, 6, 7)]
    assert records[1].name == "q" and 'no "text", or an "instruction"' in str(records[3].problem)


def test_a_list_is_the_same_and_lines_are_texts(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ITEMS))
    listed, lines = text.read(tmp_path / "a.json"), text.read(jsonl(tmp_path / "a.jsonl"))
    assert [(r.text, r.prompt, r.number) for r in listed] == [(r.text, r.prompt, r.number) for r in lines]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b'one two\n\n{"text": 1}\n'))
    assert [(r.text, r.number) for r in text.read(tmp_path / "a.txt.gz")] == [("one two", 1), ('{"text": 1}', 3)]


def test_broken_files_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "no JSON" in str(text.read(tmp_path / "a.jsonl")[1].problem)
    (tmp_path / "a.json").write_text('{"text": "a"}')
    with pytest.raises(InputError, match="no list of texts"):
        text.read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(InputError, match="line 1"):
        text.read(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(InputError, match="holds no text"):
        text.read(tmp_path / "a.txt")


def test_what_is_learned_of_an_instruction(tmp_path):
    spanned = text.tokenize(text.read(jsonl(tmp_path / "a.jsonl", ITEMS[:3])), BYTES)
    tokens = [BYTES.vocabulary.decode(ids) for ids in spanned]
    assert tokens[1] == ["<s>", "A", "s", "k", "Ġ", "x", "Ġ", *"answer", "</s>"]
    learned = [[own[a:b] for a, b in spanned.spans_of(i)] for i, own in enumerate(tokens)]
    assert learned == [[tokens[0]], [["Ġ", *"answer", "</s>"]], [["Ġ", "b", "</s>"]]]


def test_an_end_token_closes_a_text_of_a_tokenizer_that_puts_none(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    lines = [f"Ask for {word} answer {word} Seq=<MKT{i}>" for i, word in enumerate(["one", "two", "three", "four"] * 9)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    tokenizer = text.make_tokenizer({"name": "text", "path": tmp_path / "tokenizer.model"})
    assert not tokenizer.after
    record = text.TextRecord("Ask for two Seq=<MKT1>", prompt="Ask for two")
    spanned = text.tokenize([record], tokenizer)
    ((begin, end),), ids = spanned.spans_of(0), spanned[0]
    assert ids.tolist() == [*tokenizer.encode(record.text), tokenizer.vocabulary.require("eos")]
    assert ids[:begin].tolist() == tokenizer.encode(record.prompt).tolist() and end == len(ids)


def test_a_token_over_the_edge_is_refused():
    tokenizer = TextTokenizer.from_pieces(["k S"])
    with pytest.raises(InputError, match="record 3: The tokenizer joins"):
        text.tokenize([text.TextRecord("Ask Seq", number=3, prompt="Ask")], tokenizer)
    with pytest.raises(InputError, match="record 1, position 2"):
        text.tokenize([Record("a</s>")], BYTES)


def test_a_store_of_texts_is_what_tokenize_gives(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    tokenize_files({"a": lambda: text.chunks(path, BYTES)}, BYTES, tmp_path / "store", on_error="skip")
    store, whole = TokenStore(tmp_path / "store"), text.tokenize(text.read(path), BYTES)
    assert [ids.tolist() for ids in store] == [ids.tolist() for ids in whole]
    assert [store.spans_of(i) for i in range(3)] == [whole.spans_of(i) for i in range(3)]
    assert (tmp_path / "store" / "unusable.tsv").read_text().splitlines()[0].split("\t")[:2] == ["a", "4"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "text"}, "comes with a model"),
        ({"name": "text", "path": "x", "pieces": []}, "comes with a model"),
        ({"name": "dna"}, "not 'dna'"),
        ({"size": 3}, "'size'"),
        ({"pieces": ["a", "a"]}, "none twice"),
        ({"pieces": [""]}, "none empty"),
    ],
)
def test_tokenizers_that_cannot_be_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        text.make_tokenizer(settings)


@pytest.mark.parametrize("record", ["", "MKT Seq=<é> Seq=<", "\t\n  x", "数"])
def test_bytes_lose_nothing(record):
    tokenizer = text.make_tokenizer({"pieces": ["Seq=<", "[a b]"]})
    assert tokenizer.decode(tokenizer.encode(record)) == record
    assert len(tokenizer.vocabulary) == 3 + 256 + 2


def test_the_verbs(tmp_path):
    model = LanguageModel(BYTES, TransformerConfig(len(BYTES.vocabulary), 16, 1, heads=2))
    records = text.read(jsonl(tmp_path / "a.jsonl", [*ITEMS[:2], ITEMS[4]]))
    vectors, scores = text.embed(records, model), text.score(records, model)
    assert vectors.shape == (3, 16) and np.isnan(vectors[2]).all() and not np.isnan(vectors[:2]).any()
    assert (scores[:2] < 0).all() and np.isnan(scores[2])
    assert text.score(["plain"], model)[0] == pytest.approx(scores[0], abs=1e-4)
    (made,) = text.generate(model, prompts="Seq=<", max_length=3, seed=1)
    assert made.startswith("Seq=<")
    with pytest.raises(InputError, match="brackets"):
        text.embed("plain", model)
    with pytest.raises(InputError, match="record 2, position 1"):
        text.score(["a", "<s>"], model)


def test_a_model_of_something_else_is_refused():
    from processive.bio import ProteinTokenizer

    tokenizer = ProteinTokenizer()
    model = LanguageModel(tokenizer, TransformerConfig(len(tokenizer.vocabulary), 16, 1, heads=2))
    with pytest.raises(ConfigError, match="does not read text"):
        text.generate(model, 1)
    with pytest.raises(ConfigError, match="does not read text"):
        text.embed(["MK"], model)

"""Text tokenizers: byte pairs, SentencePiece and word pieces, each made here on the spot."""

import io
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processive.errors import ConfigError, InputError
from processive.sequences import TextTokenizer, Tokenizer, tokenizer_from_dict, tokenizer_to_dict

LINES = [
    f"Seq=<MK{''.join(random.Random(i).choices('ACDEFGHIKLMNPQRSTVWY', k=30))}> Superfamily=<Ankyrin repeat domain {i}>"
    for i in range(200)
]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] cell type : b ##cell ##s t a . lymph ##ocyte".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with Llama's kind of SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=content, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return folder


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    """A folder with GPT-NeoX's kind of tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(LINES, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    fast.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture
def words(tmp_path):
    """A folder with BERT's vocab.txt."""
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=40))
def test_sentencepiece_with_bytes_loses_nothing(pieces, text):
    tokenizer = TextTokenizer.from_folder(pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_byte_pairs_lose_nothing(byte_pairs, text):
    tokenizer = TextTokenizer.from_folder(byte_pairs)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_ids_are_those_of_its_own_package(pieces):
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = TextTokenizer.from_folder(pieces)
    for line in LINES[:5]:
        ids = tokenizer.encode(line)
        assert ids.dtype == np.int32
        assert ids.tolist() == [own.bos_id(), *own.encode(line)]
    assert tokenizer.vocabulary.roles == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    assert len(tokenizer.vocabulary) == 400


def test_byte_pairs_equal_transformers(byte_pairs):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(byte_pairs)
    tokenizer = TextTokenizer.from_folder(byte_pairs)
    for line in (*LINES[:5], "é 日 \n"):
        assert tokenizer.encode(line).tolist() == theirs(line)["input_ids"]
    assert tokenizer.vocabulary.roles == {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|padding|>"}


def test_word_pieces_equal_transformers(words):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(words)
    tokenizer = TextTokenizer.from_folder(words)
    for text in ("Cell type: B cells.", "T lymphocyte", "unheard of", ""):
        assert tokenizer.encode(text).tolist() == theirs(text)["input_ids"]
    assert (
        tokenizer.decode(tokenizer.encode("Cell type : B  cells")) == "cell type : b cells"
    )  # neither case nor blanks
    with_more = TextTokenizer.from_wordpiece(words / "vocab.txt", added=["[DEC]", "[ENC]"])
    assert with_more.vocabulary.ids["[ENC]"] == len(WORDS) + 1
    assert with_more.encode("cell").tolist() == [2, 5, 3]


@pytest.mark.parametrize("kind", ["pieces", "byte_pairs", "words"])
def test_settings_hold_the_model(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    tokenizer = TextTokenizer.from_folder(folder)
    assert isinstance(tokenizer, Tokenizer)
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode("cell type").tolist() == tokenizer.encode("cell type").tolist()
    written = tmp_path / "written"
    written.mkdir()
    for name, content in tokenizer.to_files().items():
        (written / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tokenizer_to_dict(TextTokenizer.from_folder(written)) == tokenizer_to_dict(tokenizer)


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, True), (False, False), (False, True)])
def test_begin_and_end_are_as_the_settings_say(pieces, tmp_path, add_bos, add_eos):
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    settings = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = TextTokenizer.from_folder(tmp_path).encode("Seq=<MK>").tolist()
    assert (ids[0] == 1, ids[-1] == 2) == (add_bos, add_eos)


def test_begin_and_end_beside_the_template_are_written(byte_pairs, tmp_path):
    roles = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    tokenizer = TextTokenizer.from_json(byte_pairs / "tokenizer.json", roles=roles, begin=True, end=True)
    ids = tokenizer.encode("MK").tolist()
    assert (ids[0], ids[-1]) == (0, 0)
    for name, content in tokenizer.to_files().items():
        (tmp_path / name).write_text(content)
    assert TextTokenizer.from_folder(tmp_path).encode("MK").tolist() == ids


def test_what_the_vocabulary_lacks_is_refused_by_position(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.add_special_tokens(["</s>", "<unk>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    roles = {"unk": "<unk>", "eos": "</s>"}
    tokenizer = TextTokenizer.from_json(tmp_path / "tokenizer.json", roles=roles)
    assert tokenizer.encode("abba").tolist() == [1, 2, 2, 1]
    with pytest.raises(InputError, match=r"position 3.*'c'"):
        tokenizer.encode("abc")
    with pytest.raises(InputError, match=r"position 2.*token of its own"):
        tokenizer.encode("a</s>b")
    kept = TextTokenizer(tokenizer.model, roles=roles, unknown="keep")
    assert kept.encode("abc").tolist() == [1, 2, 0]
    with pytest.raises(TypeError):  # annotations are checked in tests, and by the class otherwise
        TextTokenizer(tokenizer.model, roles=roles, unknown="drop")
    with pytest.raises(ConfigError, match="no token"):
        TextTokenizer(tokenizer.model, roles=roles, before=["[CLS]"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt"])
def test_a_damaged_file_is_named(name, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sentencepiece")
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        TextTokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"vocab\.txt"):
        TextTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("package", "kind"), [("tokenizers", "byte_pairs"), ("sentencepiece", "pieces")])
def test_a_missing_package_names_its_extra(package, kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"processive\[text\]"):
        TextTokenizer.from_folder(folder)

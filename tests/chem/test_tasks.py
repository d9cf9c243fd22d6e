import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from processive import chem, inference
from processive.chem import tasks
from processive.errors import ConfigError, InputError
from processive.sequences import Record, Records

TOKENIZER = chem.SmilesTokenizer()
RECORDS = Records(
    (Record("CCO", "a", 1), Record("C1C", "b", 3, InputError("ring")), Record("c1ccccc1", "c", 4)),
)


@pytest.fixture
def model():
    return SimpleNamespace(tokenizer=TOKENIZER, name="toy")


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the inference verbs that note what they are given."""
    seen = {}

    def embed(model, texts, **options):
        seen["embed"] = (texts, options)
        return np.array([[np.nan] * 2 if text is None else [len(text), 1] for text in texts], np.float32)

    def score(model, texts, **options):
        seen["score"] = (texts, options)
        return np.array([np.nan if text is None else -float(len(text)) for text in texts])

    def generate(model, count=None, **options):
        seen["generate"] = (count, options)
        return ["C"] * count

    for verb in (embed, score, generate):
        monkeypatch.setattr(inference, verb.__name__, verb, raising=False)
    return seen


def test_tokenize_takes_records_and_strings():
    from_records = tasks.tokenize(RECORDS, TOKENIZER)
    from_strings = tasks.tokenize(["CCO", "c1ccccc1"], TOKENIZER)
    assert [TOKENIZER.decode(ids) for ids in from_records] == ["CCO", "c1ccccc1"]
    assert all(np.array_equal(a, b) for a, b in zip(from_records, from_strings, strict=True))


def test_tokenize_names_the_string_and_the_position():
    with pytest.raises(InputError, match="record 2, position 3: 'X' is not known") as caught:
        tasks.tokenize(["CCO", "CCX"], TOKENIZER)
    assert (caught.value.record, caught.value.position) == (2, 3)


def test_make_tokenizer_follows_the_recipe():
    assert tasks.make_tokenizer({"name": "smiles"}, RECORDS).vocabulary == TOKENIZER.vocabulary
    assert tasks.make_tokenizer({"units": ["[nH]"]}, RECORDS).units == ("[nH]",)
    with pytest.raises(ConfigError, match="not 'dna'"):
        tasks.make_tokenizer({"name": "dna"}, RECORDS)
    with pytest.raises(ConfigError, match="size"):
        tasks.make_tokenizer({"size": 100}, RECORDS)


def test_embed_keeps_rows_aligned(model, calls):
    rows = tasks.embed(RECORDS, model, layer=2, pooling="last")
    assert calls["embed"] == (["CCO", None, "c1ccccc1"], {"layer": 2, "pooling": "last", "progress": False})
    assert np.isnan(rows[1]).all() and rows[2, 0] == 8


def test_score_keeps_rows_aligned(model, calls):
    scores = tasks.score(RECORDS, model)
    assert calls["score"] == (["CCO", None, "c1ccccc1"], {"progress": False})
    assert np.array_equal(scores, [-3, np.nan, -8], equal_nan=True) and scores.dtype == np.float64


def test_strings_are_checked_before_any_of_them_is_embedded(model, calls):
    for verb in (tasks.embed, tasks.score):
        with pytest.raises(InputError, match="record 2"):
            verb(["CCO", "nonsense"], model)
    assert not calls


def test_generate_hands_every_option_on(model, calls):
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    ends = {"prompts": ["CC"], "suffixes": ["O"], "gaps": 3}
    options = {**ends, "max_length": 50, "stop": ".", "batch_size": 8, **sampling}
    assert tasks.generate(model, 2, **options, progress=True) == ["C", "C"]
    assert calls["generate"] == (2, {**options, "progress": True})


def test_a_model_of_another_domain_is_refused(model, calls):
    model.tokenizer = SimpleNamespace(domain="bio")
    for call in (
        lambda: tasks.embed(["C"], model),
        lambda: tasks.score(["C"], model),
        lambda: tasks.generate(model, 1),
    ):
        with pytest.raises(ConfigError, match=r"toy .* 'bio'"):
            call()


def test_one_string_is_not_a_list_of_one(model, calls):
    with pytest.raises(ConfigError, match="a single string"):
        tasks.tokenize("CCO", TOKENIZER)
    with pytest.raises(ConfigError, match="a single string"):
        tasks.embed("CCO", model)


def test_room_opens_without_the_heavy_packages():
    code = (
        "import sys, processive.chem as chem; chem.read, chem.SmilesTokenizer, chem.embed, chem.report\n"
        "print([m for m in ('rdkit', 'matplotlib', 'torch_geometric') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_room_is_there():
    for name in chem.__all__:
        found = getattr(chem, name)
        assert found if name.isupper() else found.__name__ == name
    assert dir(chem) == sorted(chem.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        chem.nonsense  # noqa: B018

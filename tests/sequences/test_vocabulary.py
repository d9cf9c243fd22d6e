import json

import pytest
from processive.errors import ConfigError
from processive.sequences import Vocabulary, tokenizer_class

VOCABULARY = Vocabulary(("<pad>", "<eos>", "<x>", "A", "B"), {"pad": "<pad>", "eos": "<eos>"}, ("<x>",))


def test_ids_roles_and_specials():
    assert VOCABULARY.ids["A"] == 3
    assert VOCABULARY.role("eos") == VOCABULARY.require("eos") == 1
    assert VOCABULARY.role("mask") is None
    assert VOCABULARY.special_ids == {0, 1, 2}
    assert VOCABULARY.ordinary_ids.tolist() == list(range(3, len(VOCABULARY)))
    assert VOCABULARY.decode([3, 4]) == ["A", "B"]
    with pytest.raises(ConfigError, match="'mask' token"):
        VOCABULARY.require("mask")


def test_json_round_trip():
    assert Vocabulary.from_dict(json.loads(json.dumps(VOCABULARY.to_dict()))) == VOCABULARY


@pytest.mark.parametrize(
    ("tokens", "roles", "message"),
    [
        (("A", "A"), {}, "each token once"),
        (("A",), {"pad": "B"}, "'B'"),
        (("A",), {"start": "A"}, "'start'"),
    ],
)
def test_what_cannot_be_is_refused(tokens, roles, message):
    with pytest.raises(ConfigError, match=message):
        Vocabulary(tokens, roles)


def test_an_unknown_tokenizer_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'os.system'.*smiles"):
        tokenizer_class("os.system")

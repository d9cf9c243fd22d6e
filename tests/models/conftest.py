import numpy as np
import pytest
from processive.sequences import Vocabulary


class LetterTokenizer:
    """One token per small letter."""

    name = "letters"
    domain = "letters"

    def __init__(self, letters="abcdefgh"):
        self.vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<mask>", *letters), {"bos": "<bos>", "eos": "<eos>"})

    def encode(self, record):
        return np.array([1, *(self.vocabulary.ids[letter] for letter in record), 2], np.int32)

    def decode(self, ids):
        return "".join(self.vocabulary.tokens[i] for i in ids if i > 3)

    def to_dict(self):
        return {"letters": "".join(self.vocabulary.tokens[4:])}

    @classmethod
    def from_dict(cls, data):
        return cls(data["letters"])


@pytest.fixture
def tokenizer(monkeypatch):
    import processive.sequences.tokenizer as module

    monkeypatch.setattr(module, "tokenizer_class", {"letters": LetterTokenizer}.__getitem__)
    return LetterTokenizer()

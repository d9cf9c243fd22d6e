"""A small tokenizer, models and data for the tests of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.errors import InputError
from processive.models import LanguageModel
from processive.sequences import Vocabulary


class LetterTokenizer:
    """Letters a to h between a begin and an end token."""

    name: ClassVar[str] = "letters"
    domain: ClassVar[str] = "chem"

    def __init__(self) -> None:
        roles = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}
        self.vocabulary = Vocabulary((*roles.values(), *"abcdefgh"), roles)

    def encode(self, record: Any) -> np.ndarray:
        ids = self.vocabulary.ids
        for position, letter in enumerate(record, 1):
            if letter not in ids:
                raise InputError(f"{letter!r} is not a letter.", position=position)
        return np.array([ids["<bos>"], *(ids[letter] for letter in record), ids["<eos>"]], np.int32)

    def decode(self, ids: Any) -> str:
        return "".join(self.vocabulary.tokens[i] for i in ids if i not in self.vocabulary.special_ids)

    def to_dict(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_dict(cls, data: Any) -> LetterTokenizer:
        return cls()


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture
def make_model(tokenizer: LetterTokenizer) -> Callable[..., LanguageModel]:
    def make(kind: str = "xlstm", *, width: int = 16) -> LanguageModel:
        torch.manual_seed(0)
        size = len(tokenizer.vocabulary)
        config: XLSTMConfig | TransformerConfig
        if kind == "encoder":
            config = TransformerConfig(size, width, 2, heads=2, direction="bidirectional", dropout=0.1)
        elif kind == "decoder":
            config = TransformerConfig(size, width, 2, heads=2, dropout=0.1)
        else:
            config = XLSTMConfig(size, width, 2, heads=2, blocks=("mlstm", "slstm"), dropout=0.1)
        model = LanguageModel(tokenizer, config)
        with torch.no_grad():  # a head that is neither flat nor sure of one token has something to tell
            model.head.weight.mul_(1 if kind == "decoder" else 4)
        return model

    return make


@pytest.fixture
def words(rng: np.random.Generator) -> list[str]:
    """Fifteen words of 1 to 20 letters."""
    return ["".join("abcdefgh"[i] for i in rng.integers(0, 8, rng.integers(1, 21))) for _ in range(15)]

"""A small tokenizer, models and data for the tests of training."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.models import LanguageModel
from processive.sequences import Vocabulary
from processive.training.engines import plain


class LetterTokenizer:
    """Letters a to h between a begin and an end token."""

    name: ClassVar[str] = "letters"
    domain: ClassVar[str] = "chem"

    def __init__(self) -> None:
        roles = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}
        self.vocabulary = Vocabulary((*roles.values(), *"abcdefgh"), roles)

    def encode(self, record: Any) -> np.ndarray:
        ids = self.vocabulary.ids
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
    def make(kind: str = "causal", *, dropout: float = 0.1, seed: int = 0) -> LanguageModel:
        torch.manual_seed(seed)
        size = len(tokenizer.vocabulary)
        if kind == "masked":
            config = TransformerConfig(size, 16, 2, heads=2, direction="bidirectional", dropout=dropout)
        else:
            config = XLSTMConfig(size, 16, 2, heads=2, blocks=("mlstm", "slstm"), dropout=dropout)
        return LanguageModel(tokenizer, config, name="letters")

    return make


@pytest.fixture
def signal_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``signal_in_step(5)`` presses Ctrl-C, or sends another signal, while the fifth step from now is taken."""
    taken = plain.gradient_step

    def ask(step: int, number: int = signal.SIGINT) -> None:
        steps = itertools.count(1)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                signal.raise_signal(number)
            return taken(*args, **kwargs)

        monkeypatch.setattr(plain, "gradient_step", wrapper)

    return ask


@pytest.fixture
def sequences(tokenizer: LetterTokenizer, rng: np.random.Generator) -> list[np.ndarray]:
    """Forty words of 1 to 12 letters in which a letter is often followed by the next one."""
    words = []
    for _ in range(40):
        start = int(rng.integers(8))
        words.append("".join("abcdefgh"[(start + i) % 8] for i in range(int(rng.integers(1, 13)))))
    return [tokenizer.encode(word) for word in words]

"""What a tokenizer is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .vocabulary import Vocabulary

GROUP = "processive.tokenizers"


@runtime_checkable
class Tokenizer(Protocol):
    """Input of one domain to token ids and back.

    ``encode`` adds the tokenizer's own begin and end tokens; ``decode`` leaves special tokens out, so that
    ``decode(encode(x)) == x``. ``encode`` raises ``InputError`` with a position (counted from 1) rather than lose a
    character. ``name`` is the entry point in the group ``processive.tokenizers``; ``domain`` is the package that owns
    the verbs (``chem``, ``bio``, ``cells``). ``to_dict`` gives plain values that ``from_dict`` turns back. One that can
    encode many records faster together than one by one has ``encode_many`` too (``ManyTokenizer``).
    """

    name: ClassVar[str]
    domain: ClassVar[str]
    vocabulary: Vocabulary

    def encode(self, record: Any) -> NDArray[np.int32]:
        """Token ids of one record."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, specials left out."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the name."""
        ...

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tokenizer:
        """Inverse of ``to_dict``."""
        ...


@runtime_checkable
class ManyTokenizer(Tokenizer, Protocol):
    """A tokenizer that encodes many records faster together than one by one."""

    def encode_many(self, records: Sequence[Any]) -> tuple[NDArray[np.integer], NDArray[np.int64]] | None:
        """``encode`` of all records end to end, and how many tokens each has; None where ``encode`` refuses one."""
        ...


def tokenizer_class(name: str) -> type[Any]:
    """Return the tokenizer class registered under ``name``; imports only the domain it lives in.

    Raises:
        ConfigError: no installed package registers that name. A name is only looked up, never imported as code.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise ConfigError(f"No tokenizer is called {name!r}. Installed: {', '.join(sorted(found)) or 'none'}.")
    loaded: type[Any] = found[name].load()  # not type[Tokenizer]: a protocol with attributes knows no issubclass
    return loaded


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """Plain values for JSON, name included."""
    return {"name": tokenizer.name, **tokenizer.to_dict()}


def tokenizer_from_dict(data: Mapping[str, Any]) -> Tokenizer:
    """Inverse of ``tokenizer_to_dict``."""
    settings = {key: value for key, value in data.items() if key != "name"}
    tokenizer: Tokenizer = tokenizer_class(data["name"]).from_dict(settings)
    return tokenizer

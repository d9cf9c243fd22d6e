"""A vocabulary: the tokens in order, and which of them mean something to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

ROLES = ("pad", "bos", "eos", "mask", "unk")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order, with the roles some of them play.

    Attributes:
        tokens: every token, index = id.
        roles: role -> token, for the roles of ``ROLES`` that this vocabulary has. ESM's ``<cls>`` is its ``bos``.
        specials: tokens that stand for no part of an input (roles included); never generated, never averaged.
    """

    tokens: tuple[str, ...]
    roles: Mapping[str, str]
    specials: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            twice = sorted({t for t in self.tokens if self.tokens.count(t) > 1})
            raise ConfigError(f"A vocabulary holds each token once; these stand twice: {twice[:5]}.")
        unknown = set(self.roles) - set(ROLES)
        absent = (set(self.roles.values()) | set(self.specials)) - set(self.tokens)
        if unknown or absent:
            raise ConfigError(f"Unknown roles {sorted(unknown)}, or tokens not in the vocabulary {sorted(absent)}.")

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no part of an input."""
        return frozenset(self.ids[t] for t in (*self.roles.values(), *self.specials))

    @cached_property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """Ids of all others, in order, int64 [ordinary]."""
        special = np.array(sorted(self.special_ids), np.int64)
        return np.setdiff1d(np.arange(len(self), dtype=np.int64), special, assume_unique=True)

    def role(self, role: str) -> int | None:
        """Id of the token that plays ``role``, or None."""
        token = self.roles.get(role)
        return None if token is None else self.ids[token]

    def require(self, role: str) -> int:
        """Id of the token that plays ``role``.

        Raises:
            ConfigError: the vocabulary has none.
        """
        found = self.role(role)
        if found is None:
            raise ConfigError(f"This needs a {role!r} token, and the tokenizer has none.")
        return found

    def __len__(self) -> int:
        return len(self.tokens)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> list[str]:
        """Tokens of ``ids``."""
        return [self.tokens[i] for i in ids]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tokens": list(self.tokens), "roles": dict(self.roles), "specials": list(self.specials)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Vocabulary:
        """Inverse of ``to_dict``."""
        return cls(tuple(data["tokens"]), dict(data["roles"]), tuple(data.get("specials", ())))

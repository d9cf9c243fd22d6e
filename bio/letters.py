"""A published vocabulary of single letters, as it stands in a model's own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Vocabulary, check_file
from .sequence import Alphabet, ascii_letters, refused


class LetterTokenizer:
    """One token per amino acid, with whatever ids, begin and end a published model has (xTrimoPGLM).

    Tokens of one letter stand for amino acids, all others are special. A letter without a token is refused by position.

    Args:
        tokens: every token in the order of ids.
        roles: role -> token, as a ``Vocabulary`` has them.
        before: tokens put before every sequence.
        after: tokens put after every sequence.
    """

    name: ClassVar[str] = "protein-letters"
    domain: ClassVar[str] = "bio"
    alphabet: ClassVar[Alphabet] = "protein"
    letters_per_token: ClassVar[int] = 1

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        roles: Mapping[str, str],
        before: Sequence[str] = (),
        after: Sequence[str] = (),
    ) -> None:
        specials = tuple(token for token in tokens if len(token) != 1)
        self.vocabulary = Vocabulary(tuple(tokens), dict(roles), specials)
        self.before, self.after = tuple(before), tuple(after)
        absent = [token for token in (*before, *after) if token not in self.vocabulary.ids]
        if absent:
            raise ConfigError(f"{self.name}: {absent[0]!r} is no token of the vocabulary.")
        self._table = np.full(256, -1, np.int32)
        for token, i in self.vocabulary.ids.items():
            if len(token) == 1 and token.isascii():
                self._table[ord(token.upper())] = i
        self._before, self._after = (
            np.array([self.vocabulary.ids[token] for token in some], np.int32) for some in (before, after)
        )

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids, int32 [tokens].

        Raises:
            InputError: a letter has no token, with its position from 1.
        """
        ids = self._table[ascii_letters(record)]
        missing = np.flatnonzero(ids < 0)
        if len(missing):
            position = int(missing[0]) + 1
            raise refused(record[position - 1], "protein", position)
        return np.concatenate([self._before, ids, self._after])

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Residues of token ids, upper case, specials left out."""
        special = self.vocabulary.special_ids
        return "".join(self.vocabulary.decode(int(i) for i in ids if int(i) not in special))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tokens": list(self.vocabulary.tokens),
            "roles": dict(self.vocabulary.roles),
            "before": list(self.before),
            "after": list(self.after),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LetterTokenizer:
        """Inverse of ``to_dict``."""
        return cls(data["tokens"], roles=data["roles"], before=data["before"], after=data["after"])

    @classmethod
    def from_file(
        cls, path: str | Path, *, roles: Mapping[str, str], before: Sequence[str] = (), after: Sequence[str] = ()
    ) -> LetterTokenizer:
        """Read a plain list of tokens, one a line, the first of id 0.

        Raises:
            InputError: a token stands twice, or one with a role is missing.
        """
        tokens = [line.strip() for line in check_file(path).read_text(encoding="utf-8").rstrip().splitlines()]
        try:
            return cls(tokens, roles=roles, before=before, after=after)
        except ConfigError as error:
            raise InputError(str(error), path=path) from None

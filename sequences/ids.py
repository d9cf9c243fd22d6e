"""Token ids as they are, for models that come without a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from .vocabulary import Vocabulary


class IdTokenizer:
    """A record is a sequence of token ids, or a text of them with spaces between: ``"17 4 4 902"``.

    No token has a role: nothing is put before or behind a record, and none ends a generated one.

    Attributes:
        size: how many ids there are.
    """

    name: ClassVar[str] = "ids"
    domain: ClassVar[str] = "sequences"

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{self.name}: size is a number of tokens, not {size!r}.")
        self.size = size
        self.vocabulary = Vocabulary(tuple(map(str, range(size))), {})

    def encode(self, record: str | Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        """Token ids, as they are.

        Raises:
            InputError: something that is no id, or one beyond ``size``, with its position from 1.
        """
        ids = []
        for position, item in enumerate(record.split() if isinstance(record, str) else record, start=1):
            number = int(item) if not isinstance(item, str) or item.isdecimal() else -1
            if not 0 <= number < self.size:
                raise InputError(f"{item!r} is no token id from 0 to {self.size - 1}.", position=position)
            ids.append(number)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The ids with spaces between."""
        return " ".join(str(int(i)) for i in ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"size": self.size}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IdTokenizer:
        """Inverse of ``to_dict``.

        Raises:
            ConfigError: an unknown or missing setting.
        """
        if set(data) != {"size"}:
            raise ConfigError(f"{cls.name}: it has the setting 'size', not {sorted(data)}.")
        return cls(data["size"])

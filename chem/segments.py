"""SMILES in the vocabulary that a Chem-xLSTM model learnt: atoms, bonds, ring numbers, and brackets taken apart.

The vocabulary is what the training set of a model held, in the order in which it held it, so it comes with the model
(``token2label`` of its ``init_arguments.json``). Their code drops a character that no pattern fits, and reads a token
that the vocabulary has not as padding, both without a word; here each is refused by its position. A backslash is one
of those: their pattern asks for two in a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Vocabulary

BEGIN, END, PAD = "[BEG]", "[END]", "[PAD]"
SPECIALS = (PAD, BEGIN, END)
# The elements of two letters that are one token wherever they stand; caesium is one as a bare [Cs] alone, and every
# other element falls into its letters.
PAIRS = tuple(
    re.findall(
        r"\w+",
        """Ac Ag Al Am As Au Ba Be Bi Br Ca Cf Cl Cm Cu Dy Er Eu Fe Fm Gd He Kr La Li Lr Lu Mg Mn Na Nd Ne Ni
        Pa Pb Pm Pr Pt Pu Ra Rb Rf Sb Se Si Sm Sr Tb Te Th Ti Tm Xe Zn se te""",
    )
)
# The last branch takes any one character, so that the segments join to the whole string whatever it holds.
_SEGMENT = re.compile(rf"(?<=\[)Cs(?=\])|{'|'.join(PAIRS)}|\\\\|%\d\d|.", re.DOTALL)


class SegmentTokenizer:
    """SMILES by a learnt vocabulary of segments; ``encode`` gives ``[BEG] segments [END]``.

    Attributes:
        tokens: every token in the order of ids, the three special ones included.
    """

    name: ClassVar[str] = "smiles-segments"
    domain: ClassVar[str] = "chem"

    def __init__(self, tokens: Sequence[str]) -> None:
        """Build the vocabulary.

        Raises:
            ConfigError: it has no begin, end or padding, or holds a token twice.
        """
        absent = [special for special in SPECIALS if special not in tokens]
        if absent:
            raise ConfigError(f"{self.name}: the tokens have no {absent[0]}.")
        self.tokens = tuple(tokens)
        self.vocabulary = Vocabulary(self.tokens, {"pad": PAD, "bos": BEGIN, "eos": END})
        self._ids = {token: i for token, i in self.vocabulary.ids.items() if token not in SPECIALS}
        self._text = ["" if token in SPECIALS else token for token in self.tokens]
        self._begin, self._end = self.vocabulary.ids[BEGIN], self.vocabulary.ids[END]

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids of one SMILES, or of several with dots between, begin and end token included.

        Raises:
            InputError: a segment that the model never saw, with its position from 1.
        """
        ids = [self._begin]
        for match in _SEGMENT.finditer(record):
            number = self._ids.get(match[0])
            if number is None:
                raise InputError(
                    f"{match[0]!r} is not among the {len(self._ids)} segments of SMILES that this model knows.",
                    position=match.start() + 1,
                )
            ids.append(number)
        return np.array([*ids, self._end], np.int32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of token ids, special tokens left out."""
        return "".join([self._text[i] for i in np.asarray(ids, dtype=np.int64).tolist()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegmentTokenizer:
        """Inverse of ``to_dict``.

        Raises:
            ConfigError: an unknown or missing setting.
        """
        if set(data) != {"tokens"}:
            raise ConfigError(f"{cls.name}: it has the setting 'tokens', not {sorted(data)}.")
        return cls(data["tokens"])

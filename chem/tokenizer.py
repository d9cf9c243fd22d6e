"""SMILES to token ids and back, losing nothing.

Brackets are matched first. A frequent bracket atom (``[nH]``, ``[C@@H]``, ``[O-]``) is one token, every other one is
taken apart into isotope digits, element, chirality, hydrogens, charge and atom map, so that no bracket atom is ever
out of vocabulary. The tokens of a string always join to that string again; whether it is a molecule is RDKit's to say.

The alphabet is that of OpenSMILES 1.0, with RDKit's ``->``, ``<-``, ``~`` and ``[#6]`` and Daylight's ``>`` and ``?``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Vocabulary

ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "mask": "<mask>"}
BARE_ATOMS = (*"BCNOPSFI", "Cl", "Br", *"bcnops*")
BONDS_AND_RINGS = (*"-=#$:/\\~.()%>?0123456789", "->", "<-")
BRACKET_PARTS = ("[", "]", "+", "@", "@@", "@TH", "@AL", "@SP", "@TB", "@OH", "se", "as", "te", "si")
ELEMENTS = tuple(
    re.findall(
        "[A-Z][a-z]?",
        """H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
        Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu
        Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg
        Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og""",
    )
)
# Those met most in NCI, ChEMBL, ZINC, ChEBI and MoleculeNet; chosen once, so that ids mean the same in every model.
UNITS = tuple(
    re.findall(
        r"\[[^]]+\]",
        """[nH] [n+] [nH+] [n-] [NH+] [NH2+] [NH3+] [N+] [N-] [N] [NH] [N@] [N@@] [C@H] [C@@H] [C@] [C@@] [C]
        [CH] [CH-] [CH2-] [C-] [C+] [c-] [cH-] [O-] [O+] [OH+] [O] [OH-] [o+] [S+] [S-] [SH+] [S] [S@] [S@@]
        [s+] [P+] [P-] [PH] [P] [P@] [P@@] [B-] [Si] [SiH] [Se] [se] [As] [Sn] [H] [H+] [2H] [3H] [13C] [14C]
        [18F] [Li+] [Na+] [K+] [Mg+2] [Ca+2] [Zn+2] [F-] [Cl-] [Br-] [I-] [I+] [Cu] [Fe] [Co] [Hg]""",
    )
)
FORMAT = 1

_OUTSIDE = (*BARE_ATOMS, *BONDS_AND_RINGS)
_INSIDE = (*ELEMENTS, *(a for a in BARE_ATOMS if a not in ELEMENTS), *BRACKET_PARTS, *"-:#0123456789")
# The last branch of each takes any one character, so that the pieces join to the whole string whatever it holds.
_PIECE = re.compile(r"\[[^\[\]]*\]|Br|Cl|->|<-|.", re.DOTALL)
_PART = re.compile("|".join(re.escape(part) for part in sorted(_INSIDE, key=len, reverse=True)) + "|.", re.DOTALL)


class SmilesTokenizer:
    """A fixed vocabulary of some 240 tokens: every SMILES can be written in it, and a token id fits a byte.

    Attributes:
        vocabulary: special tokens, atoms, bonds, parts of bracket atoms, then ``units``.
        units: bracket atoms that are one token.
    """

    name: ClassVar[str] = "smiles"
    domain: ClassVar[str] = "chem"

    def __init__(self, units: Iterable[str] = UNITS) -> None:
        """Build the vocabulary.

        Raises:
            ConfigError: a unit is not a bracket atom, or stands twice.
        """
        self.units = tuple(units)
        parts = dict.fromkeys((*ROLES.values(), *_OUTSIDE, *_INSIDE))
        self.vocabulary = Vocabulary((*parts, *self.units), ROLES)
        self._inside = {part: self.vocabulary.ids[part] for part in _INSIDE}
        self._outside = {piece: self.vocabulary.ids[piece] for piece in (*_OUTSIDE, *self.units)}
        self._text = ["" if i in self.vocabulary.special_ids else t for i, t in enumerate(self.vocabulary.tokens)]
        self._bos, self._eos = self.vocabulary.require("bos"), self.vocabulary.require("eos")
        for unit in self.units:
            pieces, parts_of = _PIECE.findall(unit), _PART.findall(unit)
            if len(pieces) != 1 or not unit.startswith("[") or any(part not in self._inside for part in parts_of):
                raise ConfigError(f"{unit!r} is not a bracket atom such as [nH], so it cannot be a SMILES token.")

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids of one SMILES, begin and end token included.

        Raises:
            InputError: a character that is no part of a SMILES, or a bracket left open, with its position from 1.
        """
        try:
            ids = [self._outside[piece] for piece in _PIECE.findall(record)]
        except KeyError:
            ids = self._encode_parts(record)
        return np.array([self._bos, *ids, self._eos], np.int32)

    def _encode_parts(self, text: str) -> list[int]:
        """Token ids of a SMILES with bracket atoms that are no unit."""
        ids: list[int] = []
        for match in _PIECE.finditer(text):
            piece = match[0]
            if piece in self._outside:
                ids.append(self._outside[piece])
            elif len(piece) == 1:  # a lone bracket too: a closed pair is longer
                raise _unknown(text, match.start(), inside=False)
            else:
                for part in _PART.finditer(piece):
                    if part[0] not in self._inside:
                        raise _unknown(text, match.start() + part.start(), inside=True)
                    ids.append(self._inside[part[0]])
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of token ids, special tokens left out."""
        return "".join([self._text[i] for i in np.asarray(ids, dtype=np.int64).tolist()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, "units": list(self.units)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SmilesTokenizer:
        """Inverse of ``to_dict``; keys that are absent mean the defaults.

        Raises:
            ConfigError: an unknown key, or a format that another version wrote.
        """
        unknown = set(data) - {"format", "units"}
        if unknown:
            raise ConfigError(f"The smiles tokenizer has no setting {sorted(unknown)}; it has 'units'.")
        if data.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"SMILES vocabulary of format {data['format']}; this version reads {FORMAT}.")
        return cls(data.get("units", UNITS))


def _unknown(text: str, start: int, *, inside: bool) -> InputError:
    """The error for the character at ``start`` (from 0) that no token covers."""
    character = text[start]
    shown = text if len(text) <= 60 else f"{'...' if start > 30 else ''}{text[max(0, start - 30) : start + 27]}..."
    hint = None
    if character == "[":
        what = "The bracket opened here is not closed"
    elif character == "]":
        what = "A bracket is closed here that was not opened"
    elif character.isspace():
        what, hint = f"White space ({character!r}) is no part of a SMILES", "Give the SMILES without its name."
    else:
        what = f"{character!r} is not known in {'a bracket atom' if inside else 'SMILES outside brackets'}"
    return InputError(f"{what}, in {shown!r}.", position=start + 1, hint=hint)

"""DNA and proteins to token ids and back: single bases, k-mers, amino acids.

All take lower case (soft-masked) letters as upper case, and ``decode`` gives upper case: ``decode(encode(s)) ==
s.upper()`` for every sequence of A, C, G, T and N, or of amino acids. Nothing becomes an unknown token: what a
tokenizer has no token for is refused with its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from ..sequences import Vocabulary
from .sequence import IUPAC, Alphabet, ascii_letters, byte_table, encode_letters, refused, reverse_complement

Ambiguous = Literal["N", "refuse"]
Uracil = Literal["T", "refuse"]
Fallback = Literal["single", "refuse"]
Layout = Literal["generator", "nucleotide-transformer-v1", "nucleotide-transformer-v2"]

_NOTHING = 255  # a letter that has no code
_GENERATOR = (
    "<oov> <s> </s> <pad> <mask> <bog> <eog> <bok> <eok> <+> <-> <cds> <pseudo> <tRNA> <rRNA> <ncRNA> <miscRNA> <mam> "
    "<vrt> <inv> <pln> <fng> <prt> <arc> <bct> <mit> <plt> <plm> <vir> <sp0> <sp1> <sp2>"
)
_NUCLEOTIDE = ("<unk>", "<pad>", "<mask>", "<cls>")
_ROLES = {"bos": "<cls>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"}
_LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {  # special tokens and their roles
    "generator": (
        tuple(_GENERATOR.split()),
        {"bos": "<s>", "eos": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<oov>"},
    ),
    "nucleotide-transformer-v1": (_NUCLEOTIDE, _ROLES),
    "nucleotide-transformer-v2": ((*_NUCLEOTIDE, "<eos>", "<bos>"), _ROLES),
}
_ORDER = "ATCGN"  # codes 0 to 4, the order in which GENERator counts its k-mers


def _check_options(name: str, **options: tuple[object, Any]) -> None:
    for option, (value, kind) in options.items():
        if value not in get_args(kind):
            raise ConfigError(f"{name}: {option} is one of {', '.join(get_args(kind))}, not {value!r}.")


def _check_keys(name: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ConfigError(f"{name}: unknown setting {unknown[0]!r}. Known: {', '.join(known) or 'none'}.")


def _dna_table(iupac: Ambiguous, u: Uracil) -> NDArray[np.uint8]:
    """ASCII code -> index in ``_ORDER``, under the policies."""
    table = np.full(256, _NOTHING, np.uint8)
    for code, letter in enumerate(_ORDER):
        table[ord(letter)] = code
    if iupac == "N":
        table[[ord(letter) for letter in IUPAC]] = _ORDER.index("N")
    if u == "T":
        table[ord("U")] = _ORDER.index("T")
    return table


def _dna_codes(text: str, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Index in ``_ORDER`` of every letter, or the error for the first that has none."""
    codes = table[ascii_letters(text)]
    missing = np.flatnonzero(codes == _NOTHING)
    if not len(missing):
        return codes
    position = int(missing[0]) + 1
    letter = text[position - 1]
    if letter.upper() in IUPAC:
        raise InputError(
            f"{letter!r} (one of {', '.join(IUPAC[letter.upper()])}) is ambiguous, which this tokenizer refuses.",
            position=position,
            hint="Resolve it, or make the tokenizer with iupac='N'.",
        )
    if letter.upper() == "U":
        raise InputError(
            f"{letter!r} is RNA and this tokenizer reads DNA only.",
            position=position,
            hint="Replace it with T, or make the tokenizer with u='T'.",
        )
    raise refused(letter, "dna", position)


class DNATokenizer:
    """One token per base, with the vocabulary and ids of DNA-xLSTM, HyenaDNA and Caduceus.

    ``encode`` gives ``[BOS] bases [SEP]``, so base ``i`` (from 1) is token ``i``.

    Args:
        iupac: what becomes of R, Y, S, W, K, M, B, D, H and V: read as N, or refused by position.
        u: what becomes of U: read as T, or refused by position.
    """

    name: ClassVar[str] = "dna"
    domain: ClassVar[str] = "bio"
    alphabet: ClassVar[Alphabet] = "dna"
    letters_per_token: ClassVar[int] = 1

    def __init__(self, *, iupac: Ambiguous = "N", u: Uracil = "T") -> None:
        _check_options(self.name, iupac=(iupac, Ambiguous), u=(u, Uracil))
        self.iupac, self.u = iupac, u
        specials = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
        roles = {"bos": "[BOS]", "eos": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"}
        self.vocabulary = Vocabulary((*specials, *"ACGTN"), roles, specials)
        self._table = _dna_table(iupac, u)
        self._ids = np.array([self.vocabulary.ids[letter] for letter in _ORDER], np.int32)
        self._begin, self._end = self.vocabulary.require("bos"), self.vocabulary.require("eos")
        known = {chr(byte): int(self._ids[code]) for byte, code in enumerate(self._table) if code != _NOTHING}
        self._bytes = byte_table(known, self._begin, self._end)

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids, int32 [bases + 2].

        Raises:
            InputError: a letter is not a nucleotide or the policies refuse it, with its position from 1.
        """
        return _enclose(self._begin, self._ids[_dna_codes(record, self._table)], self._end)

    def encode_many(self, records: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
        """``encode`` of all records end to end, and how many tokens each has; None where ``encode`` refuses one."""
        return encode_letters(records, self._bytes)

    @property
    def complement(self) -> tuple[int, ...]:
        """Id of the reverse complement of each token.

        The begin and the end token are each other's, so that the ids of the other strand are these of the ids of this
        one, in reverse order. Another special token is its own.
        """
        return _complement(self.vocabulary)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Bases of token ids, upper case, specials left out."""
        return _join(self.vocabulary, ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"iupac": self.iupac, "u": self.u}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DNATokenizer:
        """Inverse of ``to_dict``; a setting left out has its default."""
        _check_keys(cls.name, data, ("iupac", "u"))
        return cls(**data)


class KmerTokenizer:
    """One token per ``k`` bases, not overlapping.

    The layout "generator" is GENERator's: its 32 special tokens, then all k-mers in the order of ``product("ATCG",
    repeat=k)``; with ``n`` and ``tail`` both "refuse" that is the whole vocabulary, id for id. Otherwise A, T, C, G
    and N follow as single-base tokens: a window that holds an N, and a tail shorter than ``k``, are written in them, so
    that nothing is lost and every later window stays where it was.

    Nucleotide Transformer's two layouts have fewer special tokens before the same k-mers and single bases. Their
    windows begin anew behind each N, and there is a token at the begin and none at the end.

    Args:
        k: bases per token, 2 to 8.
        n: a window with N in it: "single" bases, or "refuse" by position.
        tail: the last bases when the length is no multiple of ``k``: "single" bases, or "refuse".
        iupac: what becomes of the other ambiguity codes: read as N, or refused.
        u: what becomes of U: read as T, or refused.
        layout: "generator", "nucleotide-transformer-v1" or "nucleotide-transformer-v2".
        end: put the end token after a sequence, where the layout has one; GENERator itself does not.
    """

    name: ClassVar[str] = "dna-kmer"
    domain: ClassVar[str] = "bio"
    alphabet: ClassVar[Alphabet] = "dna"

    def __init__(
        self,
        *,
        k: int = 6,
        n: Fallback = "single",
        tail: Fallback = "single",
        iupac: Ambiguous = "N",
        u: Uracil = "T",
        layout: Layout = "generator",
        end: bool = True,
    ) -> None:
        _check_options(
            self.name,
            n=(n, Fallback),
            tail=(tail, Fallback),
            iupac=(iupac, Ambiguous),
            u=(u, Uracil),
            layout=(layout, Layout),
        )
        if not 2 <= k <= 8:
            raise ConfigError(f"{self.name}: k is 2 to 8, not {k}.")
        self.k, self.n, self.tail, self.iupac, self.u, self.layout, self.end = k, n, tail, iupac, u, layout, end
        specials, roles = _LAYOUTS[layout]
        kmers = ("".join(letters) for letters in product("ATCG", repeat=k))
        singles = _ORDER if "single" in (n, tail) or layout != "generator" else ""
        self.vocabulary = Vocabulary((*specials, *kmers, *singles), roles, specials)
        self._table = _dna_table(iupac, u)
        self._first_kmer = len(specials)
        self._first_single = len(specials) + 4**k
        self._begin = self.vocabulary.require("bos")
        self._end = self.vocabulary.role("eos") if end else None

    @property
    def letters_per_token(self) -> int:
        """Bases that one token stands for."""
        return self.k

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids, int32 [about bases / k + 2].

        Raises:
            InputError: a letter is not a nucleotide, or a policy refuses an N, a tail or another letter, with its
                position from 1.
        """
        codes = _dna_codes(record, self._table).astype(np.int32)
        unknown = codes == _ORDER.index("N")
        first = int(np.flatnonzero(unknown)[-1]) + 1 if unknown.any() and self.layout != "generator" else 0
        short = (len(codes) - first) % self.k
        if self.tail == "refuse" and short:
            raise InputError(
                f"{len(codes) - first} bases are no multiple of {self.k}; the last {short} make no {self.k}-mer.",
                position=len(codes) - short + 1,
                hint="Cut the sequence, or make the tokenizer with tail='single'.",
            )
        if self.n == "refuse" and unknown.any():
            position = int(unknown.argmax()) + 1
            raise InputError(
                f"{record[position - 1]!r} is an unknown base and makes no {self.k}-mer.",
                position=position,
                hint="Cut the sequence there, or make the tokenizer with n='single'.",
            )
        if self.layout == "generator":
            return _enclose(self._begin, self._windows(codes), self._end)
        cuts = np.flatnonzero(np.diff(unknown.astype(np.int8))) + 1
        parts = [self._windows(part) for part in np.split(codes, cuts)]
        return _enclose(self._begin, np.concatenate(parts), self._end)

    def _windows(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids of the windows from the first base on, of single bases where a window holds an N or is cut short."""
        whole = len(codes) // self.k * self.k
        in_singles = self._first_single + codes
        cut = in_singles[:whole].reshape(-1, self.k)
        with_n = (codes[:whole] == _ORDER.index("N")).reshape(-1, self.k).any(1, keepdims=True)
        number = codes[:whole].reshape(-1, self.k) @ (4 ** np.arange(self.k - 1, -1, -1, dtype=np.int32))
        in_kmers = np.full_like(cut, -1)  # one id per row, the rest is taken out below
        in_kmers[:, 0] = self._first_kmer + number
        ids = np.where(with_n, cut, in_kmers).ravel()
        return np.concatenate([ids[ids >= 0], in_singles[whole:]])

    @property
    def complement(self) -> tuple[int, ...]:
        """Id of the reverse complement of each token.

        The begin and the end token are each other's, so that the ids of the other strand are these of the ids of this
        one, in reverse order. Another special token is its own.
        """
        return _complement(self.vocabulary)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Bases of token ids, upper case, specials left out."""
        return _join(self.vocabulary, ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {"k": self.k, "n": self.n, "tail": self.tail, "iupac": self.iupac, "u": self.u}
        default = {"layout": "generator", "end": True}  # left out, so that older models and newer ones are alike
        return plain | {name: getattr(self, name) for name, value in default.items() if getattr(self, name) != value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KmerTokenizer:
        """Inverse of ``to_dict``; a setting left out has its default."""
        _check_keys(cls.name, data, ("k", "n", "tail", "iupac", "u", "layout", "end"))
        return cls(**data)


class ProteinTokenizer:
    """One token per amino acid, with the vocabulary and ids of ESM-1b, ESM-2 and Prot-xLSTM.

    ``encode`` gives ``<cls> residues <eos>``, so residue ``i`` (from 1) is token ``i``. Beside the 20 amino acids there
    are X (any), B, Z (ambiguous), U (selenocysteine), O (pyrrolysine) and the gaps ``-`` and ``.``; J and ``*`` have no
    token and are refused by position.

    Args:
        chains: ``|`` between chains is a token, as in ESM-C; the others have no meaning for its id.
    """

    name: ClassVar[str] = "protein"
    domain: ClassVar[str] = "bio"
    alphabet: ClassVar[Alphabet] = "protein"
    letters_per_token: ClassVar[int] = 1

    def __init__(self, *, chains: bool = False) -> None:
        self.chains = chains
        specials = ("<cls>", "<pad>", "<eos>", "<unk>", *(() if chains else ("<null_1>",)), "<mask>")
        roles = {"bos": "<cls>", "eos": "<eos>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"}
        letters = "LAGVSERTIDPKQNFYMHWCXBUZO.-" + ("|" if chains else "")
        self.vocabulary = Vocabulary((*specials[:4], *letters, *specials[4:]), roles, specials)
        self._table = np.full(256, -1, np.int32)
        for letter in set(self.vocabulary.tokens) - set(specials):
            self._table[ord(letter)] = self.vocabulary.ids[letter]
        self._begin, self._end = self.vocabulary.require("bos"), self.vocabulary.require("eos")
        known = {chr(byte): int(token) for byte, token in enumerate(self._table) if token >= 0}
        self._bytes = byte_table(known, self._begin, self._end)

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids, int32 [residues + 2].

        Raises:
            InputError: a letter is no amino acid, with its position from 1.
        """
        ids = self._table[ascii_letters(record)]
        missing = np.flatnonzero(ids < 0)
        if len(missing):
            position = int(missing[0]) + 1
            raise refused(record[position - 1], "protein", position)
        return _enclose(self._begin, ids, self._end)

    def encode_many(self, records: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
        """``encode`` of all records end to end, and how many tokens each has; None where ``encode`` refuses one."""
        return encode_letters(records, self._bytes)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Residues of token ids, upper case, specials left out."""
        return _join(self.vocabulary, ids)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"chains": True} if self.chains else {}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProteinTokenizer:
        """Inverse of ``to_dict``; a setting left out has its default."""
        _check_keys(cls.name, data, ("chains",))
        return cls(**data)


def _enclose(begin: int, ids: NDArray[np.int32], end: int | None) -> NDArray[np.int32]:
    out = np.empty(len(ids) + 2, np.int32)
    out[0], out[1:-1] = begin, ids
    if end is None:
        return out[:-1]
    out[-1] = end
    return out


def _complement(vocabulary: Vocabulary) -> tuple[int, ...]:
    ids, begin, end = vocabulary.ids, vocabulary.require("bos"), vocabulary.role("eos")
    found = [i if i in vocabulary.special_ids else ids[reverse_complement(t)] for i, t in enumerate(vocabulary.tokens)]
    if end is not None:
        found[begin], found[end] = end, begin
    return tuple(found)


def _join(vocabulary: Vocabulary, ids: Sequence[int] | NDArray[np.integer]) -> str:
    kept = (i for i in map(int, ids) if i not in vocabulary.special_ids)
    return "".join(vocabulary.decode(kept))

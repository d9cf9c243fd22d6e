"""Letters of nucleic acids and proteins, and what can be done to a sequence without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError, needs

Alphabet = Literal["dna", "protein"]

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
BASES = "ACGT"

# IUPAC-IUB 1984 nucleotide codes (Cornish-Bowden 1985), and the bases each stands for.
IUPAC = {
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
    "N": "ACGT",
}

NO_TOKEN = 255
BEGIN, END = "\x01", "\x02"  # stand for the tokens around a sequence, and are no letters of one

_COMPLEMENT = str.maketrans("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")
_DNA_LETTERS = frozenset("ACGTU" + "".join(IUPAC))
_PROTEIN_LETTERS = frozenset(AMINO_ACIDS + "XBUZO-.")


def ascii_letters(text: str) -> NDArray[np.uint8]:
    """Upper-case ASCII codes of ``text``, one per letter.

    Raises:
        InputError: a letter is not ASCII, with its position.
    """
    try:
        return np.frombuffer(text.encode("ascii").upper(), np.uint8)
    except UnicodeEncodeError as error:
        letter = text[error.start]
        raise InputError(f"{letter!r} is not a letter of a sequence.", position=error.start + 1) from None


def byte_table(letters: Mapping[str, int], begin: int, end: int) -> bytes:
    """Return for ``encode_letters`` the token id of each byte; a letter's is that of its lower case too.

    All ids are below 255.
    """
    table = bytearray([NO_TOKEN] * 256)
    for letter, token in letters.items():
        table[ord(letter)] = table[ord(letter.lower())] = token
    table[ord(BEGIN)], table[ord(END)] = begin, end
    return bytes(table)


def encode_letters(texts: Sequence[str], table: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """Token ids of many sequences end to end, each between its begin and end token, and their lengths.

    None where a letter of any of them has no token. It is ten times as fast as one sequence after the other.
    """
    if not texts:
        return np.zeros(0, np.uint8), np.zeros(0, np.int64)
    joined = f"{BEGIN}{(END + BEGIN).join(texts)}{END}"
    if not joined.isascii() or joined.count(BEGIN) != len(texts) or joined.count(END) != len(texts):
        return None
    ids = joined.encode("ascii").translate(table)
    if NO_TOKEN in ids:
        return None
    return np.frombuffer(ids, np.uint8), np.fromiter(map(len, texts), np.int64, len(texts)) + 2


def refused(letter: str, alphabet: Alphabet, position: int) -> InputError:
    """The error for a letter that ``alphabet`` does not hold, in the words of the field."""
    upper = letter.upper()
    what = "a nucleotide" if alphabet == "dna" else "an amino acid"
    if upper == "J":
        reason, hint = (
            f"{letter!r} (leucine or isoleucine) is not {what} that models know.",
            "Replace it with X." if alphabet == "protein" else "Is this a protein?",
        )
    elif upper == "*":
        reason, hint = f"{letter!r} (a stop) stands inside the sequence.", "Cut the sequence there, or remove the stop."
    elif upper in "-." and alphabet == "dna":
        reason, hint = f"{letter!r} (a gap) is not {what}.", "Remove the gaps of the alignment."
    elif alphabet == "dna" and upper in _PROTEIN_LETTERS:
        reason, hint = f"{letter!r} is not {what}.", "Is this a protein? Otherwise replace it with N."
    else:
        reason, hint = f"{letter!r} is not {what}.", f"Replace it with {'N' if alphabet == 'dna' else 'X'}."
    return InputError(reason, position=position, hint=hint)


def find_problem(text: str, alphabet: Alphabet) -> InputError | None:
    """What keeps ``text`` from being a sequence of ``alphabet``: nothing in it, or its first letter that is none."""
    if not text:
        return InputError("The sequence is empty.", hint="Remove the record or fill it.")
    allowed = _DNA_LETTERS if alphabet == "dna" else _PROTEIN_LETTERS
    unknown = {letter for letter in set(text) if letter.upper() not in allowed}
    if not unknown:
        return None
    position = min(text.index(letter) for letter in unknown) + 1
    return refused(text[position - 1], alphabet, position)


def guess_alphabet(texts: Iterable[str]) -> Alphabet:
    """Return "dna" if at least 9 in 10 letters of all ``texts`` are A, C, G, T, U or N, else "protein".

    In proteins these letters are about one in four. A few letters that are wrong do not change the answer, so that
    they are reported as such; a peptide of nothing but A, C, G, T and N does: name the alphabet where you know it.
    """
    plain = letters = 0
    for text in texts:
        upper = text.upper()
        counts = {letter: upper.count(letter) for letter in ascii_uppercase}  # a genome in seconds
        letters += sum(counts.values())
        plain += sum(counts[letter] for letter in "ACGTUN")
    return "dna" if letters and plain >= 0.9 * letters else "protein"


def reverse_complement(sequence: str) -> str:
    """The other strand, read 5' to 3'; IUPAC codes become the code of their complements, case is kept, U becomes A.

    Raises:
        InputError: a letter is not a nucleotide, with its position.

    >>> reverse_complement("ATGCRn")
    'nYGCAT'
    """
    problem = find_problem(sequence, "dna") if sequence else None
    if problem:
        raise problem
    return sequence.translate(_COMPLEMENT)[::-1]


def translate(sequence: str, *, table: int = 1, to_stop: bool = False) -> str:
    """Protein of a coding sequence by an NCBI genetic code (Biopython); a stop is ``*``, an ambiguous codon ``X``.

    Raises:
        InputError: the length is not a multiple of 3, or a letter is not a nucleotide.
        ConfigError: NCBI has no such table.
        MissingExtra: Biopython is not installed.
    """
    with needs("bio"):
        from Bio.Data import CodonTable
        from Bio.Seq import Seq
    problem = find_problem(sequence, "dna") if sequence else None
    if problem:
        raise problem
    if len(sequence) % 3:
        raise InputError(
            f"A coding sequence has a length that is a multiple of 3; this one has {len(sequence)}.",
            hint="Cut it to whole codons.",
        )
    if table not in CodonTable.unambiguous_dna_by_id:
        raise ConfigError(f"NCBI has no genetic code {table}. Known: {sorted(CodonTable.unambiguous_dna_by_id)}.")
    return str(Seq(sequence).translate(table=table, to_stop=to_stop))  # type: ignore[no-untyped-call]

"""Splits of a set of molecules that depend on the molecules and a seed, never on the order of the rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError, needs
from ..sequences import check_file, replacing
from .molecules import canonical_smiles, parse_all

if TYPE_CHECKING:
    from rdkit.Chem import Mol

FORMAT = 1
PARTS = ("train", "valid", "test")
Fractions = tuple[float | int, float | int, float | int]


@dataclass(frozen=True)
class Split:
    """Row indices (from 0, ascending, int64) of each part.

    Attributes:
        train: rows to learn from.
        valid: rows to choose by.
        test: rows to report on.
        unusable: rows that are no molecule; they belong to no part.
        method: "scaffold" or "random".
        seed: what the split was drawn with.
        fractions: the shares asked for.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    unusable: NDArray[np.int64]
    method: str
    seed: int
    fractions: Fractions


def scaffold_split(smiles: Sequence[str], fractions: Fractions = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Split so that no Bemis-Murcko scaffold (without chirality) stands in two parts.

    An acyclic molecule has no scaffold, so each is a group of its own. Groups larger than half of the smaller
    held-out part go to train, largest first; the others follow in the order of a hash of seed and scaffold, each to
    the first of train, valid, test that has room (to the one with most room when none has). Rows of one molecule
    (equal canonical SMILES) always share a part.

    Source: Bemis and Murcko 1996, doi:10.1021/jm9602928.

    Raises:
        ConfigError: the fractions are not three shares that sum to 1.
        InputError: no row is a molecule.
    """
    return _split(scaffold_groups(smiles), fractions, seed, "scaffold")


def scaffold_groups(smiles: Sequence[str]) -> list[str | None]:
    """Return the scaffold of each molecule as ``scaffold_split`` groups by it, for ``training.cluster_folds``.

    None is a row that is no molecule.
    """
    with needs("chem"):
        from rdkit.Chem import MolToSmiles
        from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol

    def scaffold(molecule: Mol) -> str:
        core: Mol = GetScaffoldForMol(molecule)  # type: ignore[no-untyped-call]
        return MolToSmiles(core, isomericSmiles=False)

    return [
        None if molecule is None else scaffold(molecule) or f"acyclic {MolToSmiles(molecule)}"
        for molecule in parse_all(smiles)
    ]


def random_split(smiles: Sequence[str], fractions: Fractions = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Split molecules at random; rows of one molecule (equal canonical SMILES) share a part.

    Raises:
        ConfigError: the fractions are not three shares that sum to 1.
        InputError: no row is a molecule.
    """
    return _split(canonical_smiles(smiles), fractions, seed, "random")


def _split(groups: Sequence[str | None], fractions: Fractions, seed: int, method: str) -> Split:
    """Give every group to a part; None is an unusable row."""
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ConfigError(f"The fractions of a split are three shares that sum to 1, not {fractions}.")
    rows: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        if group is not None:
            rows[group].append(row)
    if not rows:
        raise InputError("No row is a molecule, so there is nothing to split.")
    total = sum(map(len, rows.values()))
    room = dict(zip(PARTS, (share * total for share in fractions), strict=True))
    large = min((room[part] for part in PARTS[1:] if room[part]), default=0) / 2 if method == "scaffold" else math.inf

    def order(group: str) -> tuple[int, str]:
        digest = hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest()
        return (-len(rows[group]) if len(rows[group]) > large else 0, digest)

    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for group in sorted(rows, key=order):
        size = len(rows[group])
        fitting = (part for part in PARTS if size <= room[part] + 1e-9)
        part = next(fitting, None) or max(PARTS, key=lambda part: room[part])
        parts[part].extend(rows[group])
        room[part] -= size
    unusable = [row for row, group in enumerate(groups) if group is None]
    train, valid, test = (np.array(sorted(parts[part]), np.int64) for part in PARTS)
    return Split(
        train, valid, test, np.array(unusable, np.int64), method, seed, (fractions[0], fractions[1], fractions[2])
    )


def _hash(values: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()


def _index_lines(parts: dict[str, list[int]]) -> list[str]:
    return [f"{part} {' '.join(map(str, indices))}" for part, indices in parts.items()]


def write_split(path: str | Path, split: Split, smiles: Sequence[str]) -> None:
    """Write a split as JSON: row indices, with the hash (sha256) of the strings they point into and of themselves.

    Raises:
        OutputError: the file cannot be written.
    """
    with needs("chem"):
        from rdkit import rdBase
    parts = {part: getattr(split, part).tolist() for part in (*PARTS, "unusable")}
    content = {
        "format": FORMAT,
        "method": split.method,
        "seed": split.seed,
        "fractions": list(split.fractions),
        "rdkit": rdBase.rdkitVersion,
        "rows": len(smiles),
        "inputs_sha256": _hash(smiles),
        "indices_sha256": _hash(_index_lines(parts)),
        **parts,
    }
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_split(path: str | Path, smiles: Sequence[str]) -> Split:
    """Read a split back, checked against the strings it was made of.

    Raises:
        InputError: the file is no split, was changed, or was made from other rows or another order of them.
    """
    path = check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InputError(f"Split of format {content['format']}; this version reads {FORMAT}.", path=path)
        parts = {part: [int(i) for i in content[part]] for part in (*PARTS, "unusable")}
        inputs, indices, rows = content["inputs_sha256"], content["indices_sha256"], content["rows"]
        method, seed, (a, b, c) = content["method"], content["seed"], content["fractions"]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"This is not a split file ({type(error).__name__}: {error}).", path=path) from None
    if indices != _hash(_index_lines(parts)) or Counter(i for p in parts.values() for i in p) != Counter(range(rows)):
        raise InputError("The indices of this split were changed after it was written.", path=path)
    if inputs != _hash(smiles):
        raise InputError(
            f"This split was made for {rows} other rows than the {len(smiles)} given, or another order of them.",
            path=path,
            hint="Give the same rows in the same order, or split again.",
        )
    arrays = {part: np.array(found, np.int64) for part, found in parts.items()}
    return Split(**arrays, method=method, seed=seed, fractions=(a, b, c))

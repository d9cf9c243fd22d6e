"""What chemists report of generated molecules: valid, unique, novel, diverse, and with which properties.

The shares are nested as in the literature: unique is a share of the valid, novel a share of the unique ones. Two
strings are the same molecule when RDKit writes the same canonical SMILES for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError
from .molecules import canonical, canonical_smiles, parse_all

if TYPE_CHECKING:
    from rdkit.Chem import Mol

Table = Mapping[str, NDArray[np.float64]]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def validity(smiles: Sequence[str]) -> float:
    """Share of the strings that RDKit parses and sanitises to a molecule of at least one atom; NaN for no string."""
    return _share(sum(molecule is not None for molecule in parse_all(smiles)), len(smiles))


def uniqueness(smiles: Sequence[str]) -> float:
    """Distinct molecules as a share of the valid strings; NaN when none is valid."""
    valid = [text for text in canonical_smiles(smiles) if text is not None]
    return _share(len(set(valid)), len(valid))


def novelty(smiles: Sequence[str], training: Sequence[str]) -> float:
    """Share of the distinct valid molecules that do not stand in ``training``; NaN when none is valid."""
    distinct = set(canonical_smiles(smiles)) - {None}
    return _share(len(distinct - set(canonical_smiles(training))), len(distinct))


def internal_diversity(smiles: Sequence[str], *, sample: int = 1000, seed: int = 0) -> float:
    """Mean Tanimoto distance (0 to 1) between pairs of distinct valid molecules, by ECFP4 of 2048 bits.

    Of more than ``sample`` molecules, that many are drawn by ``seed``, whatever their order. NaN below two molecules.

    Source: Benhenda 2017, arXiv:1708.08227 (there over all pairs, a molecule with itself included).
    """
    return _diversity(dict(_distinct(parse_all(smiles))), sample, seed)


def _distinct(molecules: Sequence[Mol | None]) -> list[tuple[str, Mol]]:
    """Canonical SMILES and molecule of each valid entry; a dict of it holds each once."""
    return [(t, m) for t, m in zip(canonical(molecules), molecules, strict=True) if t is not None and m is not None]


def _diversity(distinct: Mapping[str, Mol], sample: int, seed: int) -> float:
    from rdkit import DataStructs
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    texts = sorted(distinct)
    if len(texts) > sample:
        chosen = np.random.default_rng(seed).choice(len(texts), sample, replace=False)
        texts = [texts[i] for i in chosen]
    if len(texts) < 2:
        return float("nan")
    generator = GetMorganGenerator(radius=2, fpSize=2048)
    prints = [generator.GetFingerprint(distinct[text]) for text in texts]
    total = sum(sum(DataStructs.BulkTanimotoSimilarity(prints[i], prints[:i])) for i in range(1, len(prints)))
    return 1 - total / (len(prints) * (len(prints) - 1) / 2)


def _calculators() -> dict[str, Callable[[Mol], float]]:
    """The properties of the table, in its order."""
    from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors

    return {
        "logP": Crippen.MolLogP,  # type: ignore[attr-defined]
        "molecular weight": Descriptors.MolWt,  # type: ignore[attr-defined]
        "TPSA": rdMolDescriptors.CalcTPSA,
        "QED": QED.qed,
        "H-bond donors": rdMolDescriptors.CalcNumHBD,
        "H-bond acceptors": rdMolDescriptors.CalcNumHBA,
        "rings": rdMolDescriptors.CalcNumRings,
        "rotatable bonds": rdMolDescriptors.CalcNumRotatableBonds,
    }


def _properties(molecules: Sequence[Mol | None]) -> dict[str, NDArray[np.float64]]:
    from rdkit import rdBase

    with rdBase.BlockLogs():
        return {
            name: np.array([np.nan if m is None else calculate(m) for m in molecules], np.float64)
            for name, calculate in _calculators().items()
        }


def property_table(smiles: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Properties by name, each float64 [strings], NaN where a string is no molecule.

    logP (Crippen), molecular weight (g/mol), TPSA (square angstrom), QED (0 to 1), hydrogen-bond donors and acceptors,
    rings and rotatable bonds, all by RDKit.
    """
    return _properties(parse_all(smiles))


def wasserstein(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """First Wasserstein distance between two samples, in their unit; NaN values are left out.

    The area between the two empirical distribution functions. NaN when a sample is empty.
    """
    a, b = np.sort(a[~np.isnan(a)]), np.sort(b[~np.isnan(b)])
    if not len(a) or not len(b):
        return float("nan")
    points = np.sort(np.concatenate([a, b]))
    share_a = np.searchsorted(a, points[:-1], "right") / len(a)
    share_b = np.searchsorted(b, points[:-1], "right") / len(b)
    return float(np.sum(np.abs(share_a - share_b) * np.diff(points)))


@dataclass(frozen=True)
class MoleculeReport:
    """What a set of generated strings is worth, beside a reference set.

    Attributes:
        count: strings generated.
        valid: share that are molecules.
        unique: distinct molecules, share of the valid.
        novel: molecules not in the reference, share of the distinct; None without a reference.
        internal_diversity: mean Tanimoto distance between distinct molecules (ECFP4).
        generated: properties of the valid molecules, by name.
        reference: properties of the reference molecules (a sample of a large one), by name; empty without one.
    """

    count: int
    valid: float
    unique: float
    novel: float | None
    internal_diversity: float
    generated: Table = field(repr=False)
    reference: Table = field(repr=False, default_factory=dict)

    @property
    def distances(self) -> dict[str, float]:
        """Wasserstein distance of each property from the reference, in the property's unit."""
        return {name: wasserstein(self.generated[name], values) for name, values in self.reference.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the shares, then mean and standard deviation of each property."""
        distances = self.distances
        properties = {}
        for name, values in self.generated.items():
            properties[name] = dict(zip(("mean", "std"), _moments(values), strict=True))
            if name in self.reference:
                properties[name] |= dict(
                    zip(("reference_mean", "reference_std"), _moments(self.reference[name]), strict=True)
                )
                properties[name]["wasserstein"] = distances[name]
        return {
            "count": self.count,
            "valid": self.valid,
            "unique": self.unique,
            "novel": self.novel,
            "internal_diversity": self.internal_diversity,
            "properties": properties,
        }

    def __str__(self) -> str:
        lines = [f"{self.count:,} strings: valid {self.valid:.3f}, unique (of valid) {self.unique:.3f}"]
        if self.novel is not None:
            lines[0] += f", novel (of unique) {self.novel:.3f}"
        lines[0] += f", internal diversity {self.internal_diversity:.3f}"
        head = f"{'property':<18}{'generated':>18}"
        lines.append(head + (f"{'reference':>18}{'distance':>10}" if self.reference else ""))
        for name, values in self.to_dict()["properties"].items():
            line = f"{name:<18}{_spread(values['mean'], values['std'])}"
            if "wasserstein" in values:
                line += f"{_spread(values['reference_mean'], values['reference_std'])}{values['wasserstein']:>10.2f}"
            lines.append(line)
        return "\n".join(lines)


def _moments(values: NDArray[np.float64]) -> tuple[float, float]:
    return (float(values.mean()), float(values.std())) if len(values) else (float("nan"), float("nan"))


def _spread(mean: float, std: float) -> str:
    return f"{f'{mean:.2f} ± {std:.2f}':>18}"


def report(
    generated: Sequence[str], reference: Sequence[str] | None = None, *, sample: int = 1000, seed: int = 0
) -> MoleculeReport:
    """Report on generated strings, beside the molecules a model was trained on.

    All of ``reference`` counts for novelty. Properties are those of at most ``sample`` molecules of either side and
    diversity that of at most 1,000, drawn by ``seed``.

    Raises:
        ConfigError: there is nothing generated.
        InputError: a reference is given and holds no molecule.
    """
    if not len(generated):
        raise ConfigError("There is nothing to report on: no string was generated.")
    valid = _distinct(parse_all(generated))
    distinct = dict(valid)
    novel, table = None, {}
    if reference is not None:
        known = dict(_distinct(parse_all(reference)))
        if not known:
            raise InputError("The reference set holds no molecule.")
        novel = _share(len(distinct.keys() - known.keys()), len(distinct))
        table = _properties(_sampled(list(known.values()), sample, seed))
    return MoleculeReport(
        count=len(generated),
        valid=_share(len(valid), len(generated)),
        unique=_share(len(distinct), len(valid)),
        novel=novel,
        internal_diversity=_diversity(distinct, 1000, seed),
        generated=_properties(_sampled([molecule for _, molecule in valid], sample, seed)),
        reference=table,
    )


def _sampled(molecules: list[Mol], count: int, seed: int) -> list[Mol]:
    if len(molecules) <= count:
        return molecules
    return [molecules[i] for i in np.random.default_rng(seed).choice(len(molecules), count, replace=False)]

"""RDKit's two-dimensional descriptors and Morgan counts, and their scaling: what a graph network likes to be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, needs

if TYPE_CHECKING:
    from rdkit.Chem import Mol
else:
    Mol = object

# Left out: a third of the time of the whole list goes into these, and the others already say what they say
# (the drug-likeness score is a function of eight others; Ipc overflows; the absolute indices repeat the signed ones).
_COSTLY = {"qed", "SPS", "Ipc", "AvgIpc", "MaxAbsEStateIndex", "MinAbsEStateIndex"}


def descriptor_names() -> tuple[str, ...]:
    """Names of the descriptors in RDKit's order, as the installed RDKit has them."""
    with needs("chem"):
        from rdkit.Chem import Descriptors
    return tuple(name for name, _ in Descriptors.descList if name not in _COSTLY)


def molecule_descriptors(molecule: Mol, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the named descriptors of a molecule, float64 [names]; NaN where one is not defined for it.

    Raises:
        ConfigError: the installed RDKit has no such descriptor.
    """
    with needs("chem"):
        from rdkit.Chem import Descriptors
    functions = dict(Descriptors.descList)
    unknown = [name for name in names if name not in functions]
    if unknown:
        raise ConfigError(
            f"The installed RDKit has no descriptor {', '.join(unknown[:5])}; the model was made with one."
        )
    values = np.array([functions[name](molecule) for name in names], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


@dataclass(frozen=True)
class Scaling:
    """How descriptors are brought to one scale, learned from the training molecules.

    A value is clipped to the range seen in training (``low``, ``high``; float64 [descriptors]), shifted and divided;
    an undefined value becomes the mean. Descriptors that did not vary in training become zero.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> Scaling:
        """Learn the scaling from ``values`` [molecules, descriptors], NaN where undefined."""
        known = np.where(np.isnan(values).all(0), 0.0, values)  # a descriptor that no molecule has is constant
        low, high = (np.nanquantile(known, share, axis=0) for share in (0.001, 0.999))
        clipped = np.clip(known, low, high)
        return cls(low, high, np.nanmean(clipped, axis=0), np.nanstd(clipped, axis=0))

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scale ``values`` [molecules, descriptors]."""
        varies = self.scale > 1e-9
        scaled = (np.clip(values, self.low, self.high) - self.mean) / np.where(varies, self.scale, 1.0)
        return np.where(varies & ~np.isnan(scaled), scaled, 0.0).astype(np.float32)

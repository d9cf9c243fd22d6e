"""Ensembles over folds that keep clusters whole; how much the members disagree is the uncertainty.

Each member learns on all folds but one and is stopped, or chosen, on that one (CLIN-X, Lange et al. 2022). Folds of
clusters (scaffolds, sequence families) make it a fold of new kinds, so that members disagree where the data is thin.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, InputError


@runtime_checkable
class Predictor(Protocol):
    """What ``fit_folds`` trains, such as ``chem.PropertyPredictor``."""

    def fit(self, x: Any, y: Any, validation: Any = None) -> Any:
        """Learn from ``x`` and ``y``, and stop by ``validation``, a pair of both."""

    def predict(self, x: Any) -> Any:
        """Return predictions, one row for each of ``x``."""


class Agreement(NamedTuple):
    """What the members of an ensemble say together.

    Attributes:
        mean: of their predictions.
        deviation: standard deviation between them (n - 1 in the denominator).
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


def cluster_folds(clusters: Sequence[Hashable | None], folds: int = 5, *, seed: int = 0) -> Int[np.ndarray, " rows"]:
    """Return the fold of each row, from 0; no cluster stands in two, and None is of no fold: -1.

    Clusters go, largest first and equally large ones in the order of a hash of seed and name, each to the fold that is
    smallest so far. So the folds depend on the clusters and the seed and not on the order of the rows.

    Raises:
        ConfigError: there are fewer than 2 folds.
        InputError: there are fewer clusters than folds.
    """
    if folds < 2:
        raise ConfigError(f"An ensemble needs at least 2 folds, not {folds}.")
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, cluster in enumerate(clusters):
        if cluster is not None:
            rows[cluster].append(row)
    if len(rows) < folds:
        raise InputError(f"There are {len(rows)} clusters, too few for {folds} folds.", hint="Use smaller clusters.")

    def order(cluster: Hashable) -> tuple[int, str]:
        return -len(rows[cluster]), hashlib.sha256(f"{seed}\0{cluster}".encode()).hexdigest()

    assigned = np.full(len(clusters), -1, np.int64)
    sizes = [0] * folds
    for cluster in sorted(rows, key=order):
        fold = sizes.index(min(sizes))
        assigned[rows[cluster]] = fold
        sizes[fold] += len(rows[cluster])
    return assigned


def fit_folds(
    make: Callable[[int], Predictor], x: Sequence[Any], y: ArrayLike, folds: Int[np.ndarray, " rows"]
) -> list[Predictor]:
    """Train one member for each fold, on the rows of all the others, with that fold as its validation.

    ``make`` is given the number of the member. Rows of fold -1 are left out.

    Raises:
        InputError: the lengths disagree.
    """
    targets = np.asarray(y)
    if not len(x) == len(targets) == len(folds):
        raise InputError(f"There are {len(x)} rows, {len(targets)} targets and {len(folds)} folds.")
    members = []
    for fold in range(int(folds.max()) + 1):
        parts = []
        for rows in (np.flatnonzero((folds != fold) & (folds >= 0)), np.flatnonzero(folds == fold)):
            parts.append(([x[int(row)] for row in rows], targets[rows]))
        member = make(fold)
        member.fit(*parts[0], validation=parts[1])
        members.append(member)
    return members


def predict_folds(members: Sequence[Predictor], x: Sequence[Any]) -> Agreement:
    """Return what the members predict together, and how much they disagree."""
    return agreement([member.predict(x) for member in members])


def agreement(predictions: Sequence[ArrayLike] | Float[np.ndarray, "members *shape"]) -> Agreement:
    """Return mean and standard deviation over the members; NaN where a member predicts NaN.

    Raises:
        ConfigError: there are fewer than two members, which cannot disagree.
    """
    stacked = np.stack([np.asarray(prediction, np.float64) for prediction in predictions]) if len(predictions) else None
    if stacked is None or len(stacked) < 2:
        raise ConfigError(f"Disagreement needs at least two members, not {len(predictions)}.")
    return Agreement(stacked.mean(axis=0), stacked.std(axis=0, ddof=1))

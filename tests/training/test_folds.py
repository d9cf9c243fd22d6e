"""Folds that keep clusters whole, and ensembles over them."""

from __future__ import annotations

import numpy as np
import pytest
from processive.errors import ConfigError, InputError
from processive.training import agreement, cluster_folds, fit_folds, predict_folds

CLUSTERS = [*"aaaaa", *"bbb", *"ccc", *"dd", "e", None]


def test_folds_by_hand():
    """a (5) to 0; b and c (3 each) to 1, which is smaller both times; d (2) to 0, which has 5 of 6; e to either 7."""
    folds = cluster_folds(CLUSTERS, 2)
    assert folds.tolist() == [*[0] * 5, *[1] * 6, *[0] * 2, 1, -1]


def test_folds_depend_on_clusters_and_seed_and_not_on_the_order(rng):
    clusters = [f"c{number}" for number in rng.integers(60, size=300)]
    folds = cluster_folds(clusters, 5, seed=1)
    assert all(len(set(folds[np.array(clusters) == name])) == 1 for name in set(clusters))
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == 300 and sizes.max() - sizes.min() <= 3
    order = rng.permutation(300)
    assert np.array_equal(cluster_folds([clusters[i] for i in order], 5, seed=1), folds[order])
    assert not np.array_equal(cluster_folds(clusters, 5, seed=2), folds)


def test_folds_that_cannot_be():
    with pytest.raises(ConfigError, match="at least 2 folds, not 1"):
        cluster_folds(CLUSTERS, 1)
    with pytest.raises(InputError, match="5 clusters, too few for 6 folds"):
        cluster_folds(CLUSTERS, 6)


class Mean:
    """Predicts the mean of what it saw."""

    def __init__(self, number):
        self.number = number

    def fit(self, x, y, validation=None):
        self.seen, self.checked, self.mean = list(x), list(validation[0]), float(np.mean(y))
        assert len(x) == len(y) and len(validation[0]) == len(validation[1])
        return self

    def predict(self, x):
        return np.full(len(x), self.mean)


def test_an_ensemble_by_hand():
    folds = np.array([0, 1, 0, 2, -1, 1])
    members = fit_folds(Mean, list("uvwxyz"), [0.0, 6.0, 3.0, 9.0, 100.0, 12.0], folds)
    assert [member.number for member in members] == [0, 1, 2]
    assert [member.seen for member in members] == [list("vxz"), list("uwx"), list("uvwz")]
    assert [member.checked for member in members] == [list("uw"), list("vz"), ["x"]]
    # means (6 + 9 + 12) / 3 = 9, (0 + 3 + 9) / 3 = 4, (0 + 6 + 3 + 12) / 4 = 5.25
    found = predict_folds(members, ["a", "b"])
    mean = (9 + 4 + 5.25) / 3
    deviation = (((9 - mean) ** 2 + (4 - mean) ** 2 + (5.25 - mean) ** 2) / 2) ** 0.5
    np.testing.assert_allclose(found.mean, [mean] * 2)
    np.testing.assert_allclose(found.deviation, [deviation] * 2)
    with pytest.raises(InputError, match="6 rows, 1 targets"):
        fit_folds(Mean, list("uvwxyz"), [0.0], folds)


def test_agreement():
    found = agreement([[[1.0, 2.0]], [[3.0, 2.0]]])
    np.testing.assert_allclose(found.mean, [[2.0, 2.0]])
    np.testing.assert_allclose(found.deviation, [[2**0.5, 0.0]])
    assert np.isnan(agreement([[np.nan, 1.0], [1.0, 1.0]]).deviation).tolist() == [True, False]
    for few in ([], [[1.0]]):
        with pytest.raises(ConfigError, match="at least two members"):
            agreement(few)

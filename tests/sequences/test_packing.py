import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processive.errors import ConfigError
from processive.sequences import pack, unused_share


def naive_first_fit_decreasing(lengths, capacity):
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = min(lengths[i], capacity)
        b = next((b for b, free in enumerate(room) if free >= size), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(capacity)
        bins[b].append(i)
        room[b] -= size
    return bins


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 50))
def test_equals_the_naive_packing(lengths, capacity):
    assert pack(lengths, capacity) == naive_first_fit_decreasing(lengths, capacity)


def test_real_length_distributions_fill_the_batch(rng):
    molecules = np.clip(rng.normal(48, 14, 20_000), 5, 120).astype(int)
    proteins = np.clip(rng.lognormal(5.7, 0.6, 5_000), 20, 1_024).astype(int)
    for lengths, capacity in ((molecules, 4_096), (proteins, 8_192)):
        bins = pack(lengths, capacity)
        assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
        assert 0 <= unused_share(lengths, bins, capacity) <= 0.05


def test_capacity_must_be_positive():
    with pytest.raises(ConfigError, match="capacity is 0"):
        pack([1], 0)


def test_nothing_to_pack():
    assert pack([], 8) == []
    assert unused_share([], [], 8) == 0.0

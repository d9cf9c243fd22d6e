import json

import numpy as np
import pytest
from processive.errors import ConfigError, InputError
from processive.sequences import TokenStore


@pytest.mark.parametrize(("size", "dtype"), [(37, np.uint8), (4_128, np.uint16), (100_000, np.uint32)])
def test_round_trip_in_the_smallest_type(tmp_path, rng, size, dtype):
    sequences = [rng.integers(0, size, n) for n in (5, 0, 1, 300)]
    store = TokenStore.write(tmp_path / "store", iter(sequences), vocabulary_size=size, meta={"tokenizer": "t"})
    assert len(store) == 4
    assert store.lengths.tolist() == [5, 0, 1, 300]
    assert store.meta["tokenizer"] == "t"
    assert store[0].dtype == dtype
    for read, written in zip(store, sequences, strict=True):
        assert np.array_equal(read, written)
    assert np.array_equal(store[-1], sequences[-1])
    assert len(store[1:3]) == 2
    with pytest.raises(IndexError):
        store[4]


def test_empty_store(tmp_path):
    assert len(TokenStore.write(tmp_path / "store", [], vocabulary_size=4)) == 0


def test_it_is_memory_mapped(tmp_path):
    store = TokenStore.write(tmp_path / "store", [[1, 2, 3]], vocabulary_size=4)
    assert isinstance(store.tokens, np.memmap)


def test_an_id_outside_the_vocabulary_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="Sequence 2"):
        TokenStore.write(tmp_path / "store", [[1], [9]], vocabulary_size=4)
    assert list(tmp_path.iterdir()) == []


def test_broken_stores_are_named(tmp_path):
    with pytest.raises(InputError, match="not a whole token store"):
        TokenStore(tmp_path)
    path = tmp_path / "store"
    TokenStore.write(path, [[1, 2, 3]], vocabulary_size=4)
    meta = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        TokenStore(path)
    (path / "store.json").write_text(json.dumps({**meta, "tokens": 1_000}))
    with pytest.raises(InputError, match="not a whole token store"):
        TokenStore(path)

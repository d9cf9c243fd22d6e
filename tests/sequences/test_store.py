import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processive.errors import ConfigError, InputError
from processive.sequences import TokenStore
from processive.sequences.store import StoreWriter


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


def test_a_store_that_ends_early_is_not_whole(tmp_path):
    path = tmp_path / "store"
    TokenStore.write(path, [[1, 2], [3]], vocabulary_size=4)
    np.array([0, 2, 2], np.int64).tofile(path / "offsets.bin")
    with pytest.raises(InputError, match="not a whole token store"):
        TokenStore(path)


def test_a_writer_goes_on_behind_what_is_kept(tmp_path):
    with StoreWriter(tmp_path, 300) as writer:
        writer.append(np.array([1, 2, 299]), [2, 1])
        writer.append(np.array([7]), [1])
    with StoreWriter(tmp_path, 300, sequences=2, tokens=3) as writer:
        writer.append(np.array([5, 6], np.uint16), [0, 2])
        writer.finish({"tokenizer": "t"})
    store = TokenStore(tmp_path)
    assert [ids.tolist() for ids in store] == [[1, 2], [299], [], [5, 6]]
    assert store.lengths.dtype == np.int32
    assert pickle.loads(pickle.dumps(store))[3].tolist() == [5, 6]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of memory to read")
def test_reading_in_any_order_holds_no_store_in_memory(tmp_path):
    script = """
import sys, numpy as np
from processive.sequences import TokenStore
from processive.sequences.store import StoreWriter
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
store = TokenStore(sys.argv[1])
before = peak()
lengths = store.lengths
total = sum(int(store[int(i)][0]) for i in np.random.default_rng(0).permutation(len(store)))
print(peak() - before, total)
"""
    path = tmp_path / "store"
    path.mkdir()
    count, length = 60_000, 5_000  # 300 MB
    with StoreWriter(path, 200) as writer:
        for start in range(0, count, 1000):
            writer.append(np.full(1000 * length, start // 1000, np.uint8), np.full(1000, length))
        writer.finish({})
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    grown, total = done.stdout.split()
    assert int(total) == sum(i // 1000 for i in range(count))
    assert float(grown) < 20  # MB; through the mapping, 300

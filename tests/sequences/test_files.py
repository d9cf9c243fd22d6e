import gzip
from pathlib import Path

import pytest
import zstandard
from processive.errors import InputError, OutputError
from processive.sequences import check_file, check_writable, open_text, read_lines, replacing

TEXT = "CCO ethanol\r\n\nc1ccccc1 benzene\n"


@pytest.mark.parametrize("packing", ["plain", "gz", "zst"])
def test_reads_every_packing_whatever_the_name(tmp_path, packing):
    data = TEXT.encode()
    if packing == "gz":
        data = gzip.compress(data)
    elif packing == "zst":
        data = zstandard.compress(data)
    path = tmp_path / "molecules.smi"
    path.write_bytes(data)
    assert list(read_lines(path)) == [(1, "CCO ethanol"), (2, ""), (3, "c1ccccc1 benzene")]


def test_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfsmiles\n")
    assert list(read_lines(path)) == [(1, "smiles")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (bytes(range(128, 256)), "not a text file"),
        (b"abc\0def\n", "not a text file"),
        (gzip.compress(b"CCO\n" * 100_000)[:-20], "damaged or cut short"),
        (b"\x1f\x8bnot really gzip at all", "damaged or cut short"),
        (zstandard.compress(b"CCO\n" * 100_000)[:-5], "damaged or cut short"),
        (b"\x28\xb5\x2f\xfdnot zstandard", "damaged or cut short"),
    ],
)
def test_bad_files_are_named(tmp_path, data, message):
    path = tmp_path / "input"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        list(read_lines(path))
    assert str(path) in str(caught.value)


def test_missing_and_directory(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check_file(tmp_path / "absent")
    with pytest.raises(InputError, match="directory"), open_text(tmp_path):
        pass


def test_replacing_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "out.txt"
    with replacing(path) as new:
        new.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as new:
        new.write_text("second")
        raise RuntimeError("half way")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_a_folder(tmp_path):
    path = tmp_path / "model"
    for text in ("one", "two"):
        with replacing(path) as new:
            new.mkdir()
            (new / "weights").write_text(text)
    assert (path / "weights").read_text() == "two"
    assert [part.name for part in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"), replacing(blocker / "out.txt"):
        pass
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(blocker / "out.txt")


def test_a_full_disk_says_so(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), replacing(tmp_path / "out") as new:
        new.write_text("x")
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_users_others(tmp_path):
    other = tmp_path / "other"
    other.write_text("x")
    with replacing(tmp_path / "out") as new:
        new.write_text("x")
        new.chmod(0o600)
    assert (tmp_path / "out").stat().st_mode == other.stat().st_mode

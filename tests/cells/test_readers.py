import errno

import anndata
import h5py
import numpy as np
import pytest
from processive import cells
from processive.errors import InputError, OutputError


@pytest.fixture
def adata(rng):
    return anndata.AnnData(rng.poisson(1.0, size=(12, 5)).astype(np.float32))


def test_round_trip(adata, tmp_path):
    cells.write_h5ad(tmp_path / "new" / "a.h5ad", adata)
    again = cells.read(tmp_path / "new" / "a.h5ad")
    assert not again.isbacked
    np.testing.assert_array_equal(again.X, adata.X)
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a.h5ad"]


def test_backed_round_trip_leaves_the_source_where_it_is(adata, tmp_path):
    source, target = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    cells.write_h5ad(source, adata)
    backed = cells.read(source, backed=True)
    assert backed.isbacked
    backed.obsm["X_new"] = np.ones((12, 2), np.float32)
    cells.write_h5ad(target, backed)
    assert str(backed.filename) == str(source)
    np.testing.assert_array_equal(backed[:3].X, adata.X[:3])
    again = cells.read(target)
    np.testing.assert_array_equal(again.X, adata.X)
    assert again.obsm["X_new"].shape == (12, 2)
    assert "X_new" not in cells.read(source).obsm


def test_large_files_stay_on_disk(adata, tmp_path, monkeypatch):
    from processive.cells import readers

    cells.write_h5ad(tmp_path / "a.h5ad", adata)
    monkeypatch.setattr(readers, "IN_MEMORY", 100)
    assert cells.read(tmp_path / "a.h5ad").isbacked
    assert not cells.read(tmp_path / "a.h5ad", backed=False).isbacked


def test_bad_files(adata, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad", adata)
    whole = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "empty.h5ad").write_bytes(b"")
    (tmp_path / "text.h5ad").write_text("gene,cell\n")
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    with h5py.File(tmp_path / "10x.h5", "w") as file:
        file.create_group("matrix")
    with h5py.File(tmp_path / "odd.h5ad", "w") as file:
        file["obs"] = file["var"] = 3
    cells.write_h5ad(tmp_path / "none.h5ad", adata[:0].copy())
    for name, message in {
        "absent.h5ad": "no such file",
        ".": "directory",
        "empty.h5ad": "file is empty",
        "text.h5ad": "not an .h5ad file",
        "cut.h5ad": "damaged or cut short",
        "10x.h5": "it holds matrix.*read_10x_h5",
        "odd.h5ad": "damaged",
        "none.h5ad": "0 cells and 5 genes",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            cells.read(tmp_path / name)
        assert str(tmp_path) in str(caught.value), name
        assert "\n" not in str(caught.value), name


def test_a_full_disk_leaves_the_old_file(adata, tmp_path, monkeypatch):
    path = tmp_path / "a.h5ad"
    cells.write_h5ad(path, adata)
    before = path.read_bytes()

    def full(self, filename):
        filename.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", full)
    with pytest.raises(OutputError, match="disk is full"):
        cells.write_h5ad(path, adata)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_the_folder(adata, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        cells.write_h5ad(tmp_path / "file" / "a.h5ad", adata)

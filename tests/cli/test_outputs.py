"""Every output format gives back what was written, row by row."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from processive.cli.outputs import (
    EMBEDDINGS,
    SEQUENCES,
    TABLES,
    check_output,
    write_embeddings,
    write_sequences,
    write_table,
)
from processive.errors import ConfigError, OutputError

COLUMNS = {
    "record": [1, 2, 4],
    "name": ["first", "", 'quote " , comma'],
    "status": ["ok", "There is no SMILES in this row.", "ok"],
}
VECTORS = np.array([[0.1, -2.0], [np.nan, np.nan], [1e-12, 3e38]], np.float32)


def read_table(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return {name: [str(v) for v in values] for name, values in parquet.read_table(path).to_pydict().items()}
    with path.open(newline="") as handle:
        head, *rows = csv.reader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
    return {name: [row[i] for row in rows] for i, name in enumerate(head)}


@pytest.mark.parametrize("suffix", TABLES)
def test_embedding_table_gives_back_every_bit(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_embeddings(path, COLUMNS, VECTORS)
    table = read_table(path)
    assert list(table) == ["record", "name", "status", "e0", "e1"]
    assert table["record"] == ["1", "2", "4"]
    assert table["name"] == COLUMNS["name"]
    got = np.array([table["e0"], table["e1"]]).T.astype(np.float64).astype(np.float32)
    np.testing.assert_array_equal(got, VECTORS)


def test_csv_writes_float32_short_and_nan_as_nan(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", {"single": np.float32([0.1, np.nan]), "double": np.array([0.1, 1 / 3])})
    assert (tmp_path / "a.csv").read_text() == "single,double\n0.1,0.1\nNaN,0.3333333333333333\n"


def test_parquet_keeps_the_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_embeddings(tmp_path / "a.parquet", COLUMNS, VECTORS)
    types = {field.name: str(field.type) for field in parquet.read_schema(tmp_path / "a.parquet")}
    assert types == {"record": "int64", "name": "string", "status": "string", "e0": "float", "e1": "float"}


def test_npz_needs_no_pickle(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a.npz", COLUMNS, VECTORS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["embeddings"], VECTORS)
        assert stored["embeddings"].dtype == np.float32
        assert stored["status"].tolist() == COLUMNS["status"]
        assert stored["record"].tolist() == COLUMNS["record"]


def test_h5ad_holds_embeddings_and_columns(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    write_embeddings(tmp_path / "a.h5ad", COLUMNS, VECTORS)
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(adata.X, VECTORS)
    assert adata.obs_names.tolist() == ["1", "2", "4"]
    assert adata.obs["status"].tolist() == COLUMNS["status"]


def test_sequences(tmp_path: Path) -> None:
    long = "ACGT" * 20
    for suffix in SEQUENCES:
        write_sequences(tmp_path / f"out{suffix}", ["CCO", long], prefix="m", column="smiles")
    assert (tmp_path / "out.smi").read_text() == f"CCO m_1\n{long} m_2\n"
    assert (tmp_path / "out.txt").read_text() == f"CCO\n{long}\n"
    assert (tmp_path / "out.fasta").read_text() == f">m_1\nCCO\n>m_2\n{long[:60]}\n{long[60:]}\n"
    for suffix in TABLES:
        assert read_table(tmp_path / f"out{suffix}") == {"name": ["m_1", "m_2"], "smiles": ["CCO", long]}


def test_columns_of_different_length_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(ValueError, match="shorter"):
        write_table(path, {"a": [1, 2], "b": [1]})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.npz.bak", "out.CSV"])
def test_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.npz, \.h5ad, \.csv, \.tsv, \.parquet"):
        check_output(tmp_path / name, EMBEDDINGS)


def test_folder_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(OutputError, match="folder"):
        check_output(tmp_path / "out.csv", TABLES)


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "out.csv", TABLES)

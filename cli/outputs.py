"""Writing results: the suffix of the path says the format, and a file is written whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ..errors import ConfigError, OutputError, needs

TABLES = (".csv", ".tsv", ".parquet")
EMBEDDINGS = (".npz", ".h5ad", *TABLES)
SEQUENCES = (".smi", ".fasta", ".txt", *TABLES)

Column = Sequence[Any] | NDArray[Any]
Columns = Mapping[str, Column]


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse an output that could not be written later, before any work is done.

    Raises:
        ConfigError: the suffix is none of ``suffixes``.
        OutputError: the path is a folder, or its folder cannot be written.
        MissingExtra: the format needs a package that is not installed.
    """
    if path.suffix not in suffixes:
        what = f"the format {path.suffix!r} is not known here" if path.suffix else "the name has no suffix"
        raise ConfigError(f"{path}: {what}. End the name in one of {', '.join(suffixes)}.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file in it.")
    if path.suffix == ".parquet":
        with needs("tables"):
            import pyarrow.parquet  # noqa: F401
    if path.suffix == ".h5ad":
        with needs("cells"):
            import anndata  # noqa: F401
    from ..sequences import check_writable

    check_writable(path)


def write_table(path: Path, columns: Columns) -> None:
    """Write equally long columns as ``.csv``, ``.tsv`` or ``.parquet``, one row per record.

    Raises:
        OutputError: the file could not be written.
    """
    from ..sequences import replacing

    with replacing(path) as new:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            arrays = {name: pyarrow.array(values) for name, values in columns.items()}
            pyarrow.parquet.write_table(pyarrow.table(arrays), new)
        else:
            with new.open("w", newline="", encoding="utf-8") as handle:
                writer = csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(zip(*(map(_cell, values) for values in columns.values()), strict=True))


def write_embeddings(path: Path, columns: Columns, embeddings: Float[np.ndarray, "records width"]) -> None:
    """Write one embedding per record in the format of the suffix.

    ``.npz`` holds the array ``embeddings`` and one array per column (``status`` among them); a table has the columns
    ``e0``, ``e1``, ... after the given ones; ``.h5ad`` is an AnnData with the embeddings as X and the columns in obs.

    Raises:
        OutputError: the file could not be written.
    """
    from ..sequences import replacing

    if path.suffix in TABLES:
        write_table(path, {**columns, **{f"e{i}": embeddings[:, i] for i in range(embeddings.shape[1])}})
    elif path.suffix == ".npz":
        with replacing(path) as new, new.open("wb") as handle:
            arrays: dict[str, Any] = {name: np.asarray(values) for name, values in columns.items()}
            np.savez(handle, embeddings=embeddings, **arrays)
    else:
        import pandas as pd
        from anndata import AnnData

        obs = pd.DataFrame(dict(columns)).set_index("record", drop=False)
        obs.index = obs.index.astype(str).rename(None)
        with replacing(path) as new:
            AnnData(X=embeddings, obs=obs).write_h5ad(new)


def write_token_embeddings(path: Path, columns: Columns, embeddings: Sequence[NDArray[np.float32]]) -> None:
    """Write one embedding per token as ``.npz``: record ``i`` has the rows ``offsets[i]:offsets[i + 1]``.

    Raises:
        OutputError: the file could not be written.
    """
    from ..sequences import replacing

    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in columns.items()}
    arrays["offsets"] = np.cumsum([0, *map(len, embeddings)], dtype=np.int64)
    with replacing(path) as new, new.open("wb") as handle:
        np.savez(handle, embeddings=np.concatenate(embeddings), **arrays)


def write_sequences(path: Path, sequences: Sequence[str], *, prefix: str, column: str) -> None:
    """Write sequences named ``<prefix>_1``, ``<prefix>_2``, ... as ``.smi``, ``.fasta``, ``.txt`` or a table.

    Raises:
        OutputError: the file could not be written.
    """
    from ..sequences import replacing

    names = [f"{prefix}_{i}" for i in range(1, len(sequences) + 1)]
    if path.suffix in TABLES:
        write_table(path, {"name": names, column: sequences})
        return
    with replacing(path) as new, new.open("w", encoding="utf-8") as handle:
        for name, sequence in zip(names, sequences, strict=True):
            if path.suffix == ".fasta":
                lines = [sequence[i : i + 60] for i in range(0, len(sequence), 60)]
                handle.write("\n".join([f">{name}", *lines]) + "\n")
            else:
                handle.write(f"{sequence} {name}\n" if path.suffix == ".smi" else f"{sequence}\n")


def _cell(value: object) -> object:
    """A number in the fewest digits that give it back in its own precision; NaN as every reader spells it."""
    if isinstance(value, float | np.floating):
        return "NaN" if np.isnan(value) else str(value)
    return value

"""AnnData files in and out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, needs
from ..sequences import check_file, replacing

if TYPE_CHECKING:
    from anndata import AnnData
else:
    AnnData = Any

IN_MEMORY = 2**30  # bytes; the matrix of a larger file stays on disk


def read(path: str | Path, *, backed: bool | None = None) -> AnnData:
    """Read an ``.h5ad`` file.

    Args:
        path: the file.
        backed: leave the matrix on disk and read it in blocks; None does so for files above 1 GiB.

    Raises:
        InputError: the file is missing, a directory, empty, no ``.h5ad`` or damaged, or holds no cell or no gene.
        MissingExtra: ``processive[cells]`` is not installed.
    """
    with needs("cells"):
        import anndata
        import h5py
    path = check_file(path)
    hint = "Other formats are read by scanpy (sc.read_10x_h5, sc.read_10x_mtx, sc.read_loom) and saved by write_h5ad."
    if not h5py.is_hdf5(path):
        raise InputError("This is not an .h5ad file.", path=path, hint=hint)
    on_disk = path.stat().st_size > IN_MEMORY if backed is None else backed
    try:
        with h5py.File(path, "r") as file:
            if not {"obs", "var"} <= set(file):
                parts = ", ".join(sorted(file)[:5]) or "nothing"
                raise InputError(f"This HDF5 file is no AnnData: it holds {parts}.", path=path, hint=hint)
        with warnings.catch_warnings():
            for category in (
                FutureWarning,
                PendingDeprecationWarning,
            ):  # on the age of the layout; it is read all the same
                warnings.simplefilter("ignore", category)
            adata = anndata.read_h5ad(path, backed="r" if on_disk else None)
    except InputError:
        raise
    except Exception as error:  # damaged files make h5py and anndata raise OSError, KeyError, ValueError and more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"The .h5ad file is damaged or cut short ({reason}).", path=path, hint="Fetch it again."
        ) from error
    if not adata.n_obs or not adata.n_vars:
        raise InputError(f"The file holds {adata.n_obs} cells and {adata.n_vars} genes.", path=path)
    return adata


def write_h5ad(path: str | Path, adata: AnnData) -> None:
    """Write ``adata`` to ``path``, whole or not at all.

    Raises:
        OutputError: the disk is full or the folder cannot be written; what stood there before is untouched.
    """
    with replacing(path) as new:
        if adata.isbacked:
            adata.copy(filename=new).file.close()  # write_h5ad would leave the object pointing at the scratch file
        else:
            adata.write_h5ad(new)

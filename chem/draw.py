"""Pictures of molecules: their structures, their properties beside those of a reference, and a map of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError, needs
from ..sequences import replacing
from .molecules import parse_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .metrics import Table


def draw_molecules(
    path: str | Path,
    smiles: Sequence[str],
    *,
    legends: Sequence[str] | None = None,
    columns: int = 6,
    cell: tuple[int, int] = (240, 200),
) -> Path:
    """Draw molecules in a grid, row by row; a string that is no molecule keeps its cell, with a question mark.

    Args:
        path: ``.png`` or ``.svg``.
        smiles: what to draw.
        legends: a line under each molecule.
        columns: molecules in a row.
        cell: width and height of a cell in pixels.

    Raises:
        ConfigError: the suffix is neither, or there are not as many legends as molecules.
        InputError: there is no molecule to draw.
        OutputError: the file cannot be written.
    """
    with needs("chem"):
        from rdkit.Chem import MolFromSmiles
        from rdkit.Chem.Draw import rdMolDraw2D

    path = _checked_suffix(path, (".png", ".svg"))
    labels = list(legends) if legends is not None else [""] * len(smiles)
    if len(labels) != len(smiles):
        raise ConfigError(f"{len(labels)} legends for {len(smiles)} molecules.")
    molecules = parse_all(smiles)
    if not any(molecules):
        raise InputError("There is no molecule to draw.")
    labels = [
        label if m is not None else f"{label} (not a molecule)" for label, m in zip(labels, molecules, strict=True)
    ]
    columns = min(columns, len(molecules))
    size = (columns * cell[0], math.ceil(len(molecules) / columns) * cell[1])
    canvas = rdMolDraw2D.MolDraw2DCairo if path.suffix.lower() == ".png" else rdMolDraw2D.MolDraw2DSVG
    drawer = canvas(*size, *cell)
    options = drawer.drawOptions()  # RDKit's stubs give its fields the type of the whole
    options.drawMolsSameScale = False  # type: ignore[assignment]  # one large molecule would make the others tiny
    options.padding = 0.1  # type: ignore[assignment]
    absent = MolFromSmiles("*")  # RDKit passes over a molecule without atoms, legend and all
    absent.GetAtomWithIdx(0).SetProp("atomLabel", "?")
    drawer.DrawMolecules([absent if m is None else m for m in molecules], legends=labels)
    drawer.FinishDrawing()
    picture = drawer.GetDrawingText()
    with replacing(path) as new:
        new.write_bytes(picture if isinstance(picture, bytes) else picture.encode())
    return path


def draw_properties(path: str | Path, tables: Mapping[str, Table], *, columns: int = 4) -> Path:
    """Draw a histogram of each property, the sets (generated, training, ...) over one another as shares.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``.
        tables: label of a set -> its ``property_table``; a report's ``generated`` and ``reference`` are such.
        columns: histograms in a row.

    Raises:
        ConfigError: the suffix is none of these.
        InputError: the sets hold no property.
        OutputError: the file cannot be written.
    """
    with needs("chem"):
        from matplotlib.figure import Figure

    path = _checked_suffix(path, (".png", ".svg", ".pdf"))
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    if not names:
        raise InputError("There is no property to draw.")
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        found = {label: _finite(table[name]) for label, table in tables.items() if name in table}
        bins = _bins(np.concatenate(list(found.values())))
        for label, values in found.items():
            if len(values):
                weights = np.full(len(values), 1 / len(values))
                axis.hist(values, bins, weights=weights, label=label, alpha=0.5)
        axis.set_xlabel(name)
        axis.set_ylabel("share")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False)
    return _save(figure, path)


def draw_map(
    path: str | Path,
    embeddings: NDArray[np.floating],
    values: NDArray[np.floating],
    *,
    label: str = "logP",
    title: str = "",
) -> Path:
    """Draw embeddings [molecules, width] on their first two principal components, coloured by ``values`` [molecules].

    Rows with a NaN are left out.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``.
        embeddings: what ``embed`` returns.
        values: a property of each molecule, a column of ``property_table`` for instance.
        label: name of the property, for the colour bar.
        title: heading of the picture.

    Raises:
        ConfigError: the suffix is none of these, or the lengths differ.
        InputError: fewer than two rows can be drawn.
        OutputError: the file cannot be written.
    """
    with needs("chem"):
        from matplotlib.figure import Figure

    path = _checked_suffix(path, (".png", ".svg", ".pdf"))
    if embeddings.ndim != 2 or len(embeddings) != len(values):
        raise ConfigError(f"Embeddings {embeddings.shape} and {len(values)} values do not belong together.")
    usable = np.isfinite(embeddings).all(1) & np.isfinite(values)
    if usable.sum() < 2 or embeddings.shape[1] < 2:
        raise InputError("A map needs at least two molecules and an embedding of at least two numbers.")
    points, share = principal_components(embeddings[usable])
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axis = figure.subplots()
    low, high = np.percentile(values[usable], [1, 99])
    dots = axis.scatter(
        points[:, 0], points[:, 1], c=values[usable], s=8, vmin=low, vmax=high, cmap="viridis", linewidths=0
    )
    figure.colorbar(dots, ax=axis, label=label)
    axis.set_xlabel(f"PC 1 ({share[0]:.0%} of variance)")
    axis.set_ylabel(f"PC 2 ({share[1]:.0%} of variance)")
    axis.set_title(title)
    return _save(figure, path)


def principal_components(
    embeddings: NDArray[np.floating], count: int = 2
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [rows, count] on the first principal components, and the share of variance of each [count].

    Each component points where its largest loading is positive, so that a picture does not flip between machines.
    """
    centred = np.asarray(embeddings, np.float64) - embeddings.mean(0, dtype=np.float64)
    variance, vectors = np.linalg.eigh(centred.T @ centred)
    variance, vectors = variance[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.where(vectors[largest, np.arange(count)] < 0, -1.0, 1.0)
    total = float(np.square(centred).sum())
    return centred @ vectors, np.maximum(variance, 0) / total if total else np.zeros(count)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _bins(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of histogram bins: one per whole number for small counts, else 30 over all but the outermost 0.5%."""
    if not len(values):
        return np.array([0.0, 1.0])
    low, high = np.percentile(values, [0.5, 99.5])
    if np.array_equal(values, np.round(values)) and high - low <= 40:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1)
    return np.linspace(low, high if high > low else low + 1, 31)


def _checked_suffix(path: str | Path, suffixes: Sequence[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path} ends on none of {', '.join(suffixes)}, the pictures that can be drawn.")
    return path


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as new:
        figure.savefig(new, dpi=150)
    return path

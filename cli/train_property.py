"""processive train, for a recipe of a molecular property."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ..errors import ConfigError, InputError
from .inputs import OnError

if TYPE_CHECKING:
    from ..chem import PropertyPredictor
    from ..sequences import Records
    from ..training import Recipe


def train_property(
    plan: Recipe, data: Path, targets: list[str], out: Path, *, seed: int | None, on_error: OnError, device: str
) -> None:
    """Fit a property model on a table, split by scaffold, and report on the part it never saw.

    ``out`` receives the model and ``split.json``, the row indices of each part with their hash.
    """
    from .. import chem

    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty. Choose another folder.")
    records = chem.read(data)
    y = read_targets(data, targets, records)
    records = records.checked(on_error)
    labels = np.isin(y[~np.isnan(y)], (0, 1)).all()
    settings = {"task": "classification" if labels else "regression", **plan.predictor}
    settings |= {} if seed is None else {"seed": seed}
    predictor = chem.PropertyPredictor().set_params(**settings, device=device)
    smiles = [record.text if record.problem is None else "" for record in records]
    split = chem.scaffold_split(smiles, seed=predictor.seed)
    train, valid, test = ([smiles[i] for i in rows] for rows in (split.train, split.valid, split.test))
    predictor.fit(train, y[split.train], validation=(valid, y[split.valid]))
    predictor.save(out)
    chem.write_split(out / "split.json", split, smiles)
    quality = test_quality(predictor, test, y[split.test])
    print(f"{quality} on the {len(test)} molecules of the test part, whose scaffolds are new: the model is in {out}.")
    print(f"Next: processive predict {out} --help")


def test_quality(predictor: PropertyPredictor, smiles: list[str], y: Float[np.ndarray, "molecules ..."]) -> str:
    """What the field reports, the mean over targets: RMSE and R2, or the area under the ROC curve."""
    wanted = y.reshape(len(y), -1)
    if predictor.task == "regression":
        error = np.sqrt(np.nanmean((np.reshape(predictor.predict(smiles), wanted.shape) - wanted) ** 2, axis=0)).mean()
        return f"RMSE {error:.3f}, R2 {predictor.score(smiles, y):.3f}"
    probability = predictor.predict_proba(smiles)
    areas = [roc_auc(p, t) for p, t in zip(probability.T[-wanted.shape[1] :], wanted.T, strict=True)]
    return f"ROC AUC {np.nanmean(areas):.3f}"


def roc_auc(scores: Float[np.ndarray, " molecules"], labels: Float[np.ndarray, " molecules"]) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher, ties half; NaN without both labels."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below, upto = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(negative)))


def read_targets(path: Path, columns: list[str], records: Records) -> Float[np.ndarray, "records ..."]:
    """Read columns of numbers from the table that ``records`` came from: [records], or [records, columns] for several.

    An empty cell is NaN: not known.

    Raises:
        InputError: there is no such column, or a cell is no number.
    """
    from ..sequences import read_lines

    lines = (line for _, line in read_lines(path) if line.strip())
    head = next(lines)
    delimiter = max(",\t;", key=head.count)
    names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter))]
    absent = [column for column in columns if column not in names]
    if absent:
        raise InputError(f"There is no column {absent[0]!r}; there are: {', '.join(names)}.", path=path)
    rows = [row for row in csv.reader((f"{line}\n" for line in lines), delimiter=delimiter) if any(map(str.strip, row))]
    if len(rows) != len(records):
        raise InputError(f"The table has {len(rows)} rows and {len(records)} molecules.", path=path)
    values = np.full((len(records), len(columns)), np.nan)
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        for j, column in enumerate(columns):
            cell = row[names.index(column)].strip() if names.index(column) < len(row) else ""
            try:
                values[i, j] = float(cell or "nan")
            except ValueError:
                raise InputError(
                    f"{cell!r} in column {column} is no number.", path=path, record=record.number
                ) from None
    return values[:, 0] if len(columns) == 1 else values

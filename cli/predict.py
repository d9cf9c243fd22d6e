"""processive predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .inputs import DeviceOption, OnErrorOption, check_device, record_columns

if TYPE_CHECKING:
    from .outputs import Column


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a molecule property model.")],
    data: Annotated[
        Path, typer.Argument(metavar="INPUT", help="SMILES, one per line, or a .csv with a smiles column.")
    ],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Result: .csv, .tsv or .parquet.")],
    on_error: OnErrorOption = "raise",
    device: DeviceOption = "cpu",
) -> None:
    """Predict a property of every molecule of a file, one row each (of a class: its probability)."""
    import numpy as np

    from .outputs import TABLES, check_output, write_table

    check_output(output, TABLES)
    check_device(device)
    from .. import chem

    predictor = chem.PropertyPredictor.load(model, device=device)
    records = chem.read(data).checked(on_error)
    usable = [i for i, record in enumerate(records) if record.problem is None]
    smiles = [records[i].text for i in usable]
    if predictor.task == "regression":
        found = predictor.predict(smiles).reshape(len(smiles), -1)
    else:
        found = predictor.predict_proba(smiles)
        found = found[:, 1:] if predictor.single_ else found
    values = np.full((len(records), found.shape[1]), np.nan)
    values[usable] = found
    columns: dict[str, Column] = {**record_columns(records, "chem")}
    for task in range(values.shape[1]):
        columns["prediction" if values.shape[1] == 1 else f"prediction_{task + 1}"] = values[:, task]
    write_table(output, columns)
    print(f"{len(records)} predictions are in {output}.")

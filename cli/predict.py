"""processive predict: a property of molecules, or what a language model has learned from labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .inputs import DeviceOption, OnError, OnErrorOption, check_device, read_records, record_columns

if TYPE_CHECKING:
    from ..models import LanguageModel
    from .outputs import Column


def predict(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a model of molecular properties, or of a tuned one."),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="INPUT", help="FASTA; or SMILES, one per line, or a .csv with a smiles column.")
    ],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Result: .csv, .tsv or .parquet.")],
    on_error: OnErrorOption = "raise",
    device: DeviceOption = "cpu",
) -> None:
    """Predict what a model has learned of every record of a file, one row each (of a class: its probability)."""
    from .outputs import TABLES, check_output, write_table

    check_output(output, TABLES)
    check_device(device)
    read = _by_language_model if is_language_model(model) else _by_property_model
    columns = read(model, data, on_error, device)
    write_table(output, columns)
    print(f"{len(columns['record'])} predictions are in {output}.")


def is_language_model(folder: Path) -> bool:
    """Tell whether a folder holds a language model; what is no model at all is for the reader to refuse."""
    from ..models.files import CONFIG, KIND

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("kind") == KIND


def _by_language_model(model: Path, data: Path, on_error: OnError, device: str) -> dict[str, Column]:
    import numpy as np

    from ..inference.predict import predict, task_of
    from ..models import load

    loaded: LanguageModel = load(model, device=device)
    task, domain = task_of(loaded), loaded.tokenizer.domain
    if task.level == "token" or domain not in ("bio", "chem"):
        of = "each token" if task.level == "token" else f"records of {domain}"
        raise ConfigError(f"{model} predicts {of}, which is no row of a table: use its predict in Python.")
    records = read_records(data, loaded.tokenizer, on_error)
    texts = [record.text if record.problem is None else None for record in records]
    values = np.asarray(predict(loaded, texts, progress=True)).reshape(len(records), -1)
    columns: dict[str, Column] = {**record_columns(records, domain)}
    for name, column in zip(task.names, values.T, strict=True):
        columns["prediction" if len(task.names) == 1 else f"prediction_{name}"] = column
    return columns


def _by_property_model(model: Path, data: Path, on_error: OnError, device: str) -> dict[str, Column]:
    import numpy as np

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
    return columns

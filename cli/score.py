"""processive score."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, InputError
from .inputs import (
    DeviceOption,
    InputArgument,
    ModelArgument,
    OnErrorOption,
    cell_columns,
    domain_module,
    load_model,
    read_records,
    record_columns,
)

if TYPE_CHECKING:
    from ..models import LanguageModel
    from .outputs import Column

VARIANT_COLUMNS = ("variant", "mutant", "mutation")


def score(
    model: ModelArgument,
    data: InputArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Result: .csv, .tsv or .parquet.")],
    variants: Annotated[
        str | None,
        typer.Option(help="Score variants of the one sequence in INPUT: A42G,K7E or a file with one per line."),
    ] = None,
    on_error: OnErrorOption = "raise",
    device: DeviceOption = "cpu",
) -> None:
    """Score every record of a file by its log-likelihood in nats (a masked model: pseudo-log-likelihood)."""
    from .outputs import TABLES, check_output, write_table

    check_output(output, TABLES)
    named = None if variants is None else read_variants(variants)
    loaded = load_model(model, device)
    domain = loaded.tokenizer.domain
    columns: dict[str, Column]
    if named is not None:
        columns = _score_variants(loaded, data, named)
    elif domain == "cells":
        columns = _score_cells(loaded, data)
    else:
        records = read_records(data, loaded.tokenizer, on_error)
        columns = {
            **record_columns(records, domain),
            "score": domain_module(domain).score(records, loaded, progress=True),
        }
    write_table(output, columns)
    print(f"{len(columns['score'])} scores are in {output}.")


def read_variants(given: str) -> list[str]:
    """Return the variants of a list (``A42G,K7E``) or of a file: one per line, or a table's variant column.

    Raises:
        InputError: there is no variant, or the file cannot be read.
    """
    from ..sequences import read_lines

    path = Path(given)
    if not path.exists() and not path.suffix:
        found = given.split(",")
    else:
        rows = csv.reader(line for _, line in read_lines(path) if line.strip())
        head = next(rows, [])
        column = next((i for i, name in enumerate(head) if name.strip().lower() in VARIANT_COLUMNS), None)
        found = [] if column is not None else head[:1]
        found += [row[column or 0] for row in rows]
    found = [variant.strip() for variant in found if variant.strip()]
    if not found:
        raise InputError("No variant is named.", hint="Write --variants A42G,K7E or name a file with one per line.")
    return found


def _score_variants(model: LanguageModel, data: Path, variants: list[str]) -> dict[str, Column]:
    if model.tokenizer.domain != "bio":
        raise ConfigError(f"Variants are of DNA and proteins; {model.name} reads {model.tokenizer.domain!r} input.")
    bio = domain_module("bio")
    records = read_records(data, model.tokenizer, "raise")
    if len(records) != 1:
        raise InputError(
            f"Variants are named on one sequence; the file holds {len(records)}.", path=data, hint="Keep that one."
        )
    scores = bio.score_variants(records[0].text, variants, model, progress=True)
    return {"name": [records[0].name] * len(variants), "variant": variants, "score": scores}


def _score_cells(model: LanguageModel, data: Path) -> dict[str, Column]:
    import numpy as np

    cells = domain_module("cells")
    adata = cells.read(data)
    scores = cells.score(adata, model, progress=True)
    return {**cell_columns(adata.obs_names.tolist(), (~np.isnan(scores)).tolist()), "score": scores}

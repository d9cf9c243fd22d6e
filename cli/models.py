"""processive models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

MODEL_COLUMNS = ("name", "kind", "family", "parameters", "tokenizer", "folder")
RECIPE_COLUMNS = ("recipe", "domain", "what it trains")


def models(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, two levels deep.")] = Path(),
) -> None:
    """List the models under a folder, and the recipes that come with the package."""
    if not folder.is_dir():
        raise InputError("There is no such folder.", path=folder, hint="Name the folder that holds your models.")
    rows = list(find_models(folder))
    if rows:
        _print_table(MODEL_COLUMNS, [[_cell(row[column]) for column in MODEL_COLUMNS] for row in rows])
    else:
        print(f"No model in {folder} or the folders in it.")
    print()
    _print_table(RECIPE_COLUMNS, bundled_recipes())


def find_models(folder: Path) -> Iterator[dict[str, Any]]:
    """Describe every model in ``folder`` and two levels below, from its configuration; no weight is read."""
    for depth in ("config.json", "*/config.json", "*/*/config.json"):
        for path in sorted(folder.glob(depth)):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # another program's file, or one that may not be read: not a model of ours
            if isinstance(config, dict) and {"format", "kind"} <= config.keys():
                yield {
                    "name": config.get("name", path.parent.name),
                    "kind": config["kind"],
                    "family": config.get("backbone", {}).get("family", "-"),
                    "parameters": count_parameters(path.with_name("model.safetensors")),
                    "tokenizer": config.get("tokenizer", {}).get("name", "-"),
                    "folder": path.parent,
                }


def count_parameters(weights: Path) -> int | str:
    """Number of stored weights, read from the header of a safetensors file; "-" if there is no such file."""
    if not weights.is_file():
        return "-"
    with weights.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


def bundled_recipes() -> list[list[str]]:
    """Name, domain and description of each recipe of the package."""
    from .. import recipes
    from ..training import read_recipe

    found = [read_recipe(name) for name in recipes.names()]
    return [[recipe.name, recipe.domain, recipe.description] for recipe in found]


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

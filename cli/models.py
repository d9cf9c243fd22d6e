"""processive models: what can be loaded, and what one of them is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import InputError

if TYPE_CHECKING:
    from ..models.catalogue import Listed
    from ..models.describe import Description
    from ..training import Recipe

MODEL_COLUMNS = ("name", "kind", "family", "parameters", "tokenizer", "folder")
HUB_COLUMNS = (*MODEL_COLUMNS[:5], "place")
FAIR_COLUMNS = ("fair-esm's name", "file")
FORMAT_COLUMNS = ("format", "what comes in it")
RECIPE_COLUMNS = ("recipe", "domain", "what it trains")


class _ListByDefault(TyperGroup):
    """``processive models`` and ``processive models FOLDER`` list; a verb's name comes first otherwise."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``list`` before what is no verb."""
        known = (*self.commands, "--help")
        parsed: list[str] = super().parse_args(ctx, args if args and args[0] in known else ["list", *args])
        return parsed


models = typer.Typer(cls=_ListByDefault, rich_markup_mode=None)


@models.callback()
def _models() -> None:
    """List the models that can be loaded, or describe one: models describe MODEL."""


@models.command("list", epilog="Example: processive models runs")
def list_models(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, two levels deep.")] = Path(),
) -> None:
    """List the models under a folder, in the hub's cache and of fair-esm, the formats, and the recipes."""
    if not folder.is_dir():
        raise InputError("There is no such folder.", path=folder, hint="Name the folder that holds your models.")
    from ..backbones.formats import FORMATS
    from ..models.catalogue import models_of_the_hub, models_under, published_models

    found = list(models_under(folder))
    if found:
        _print_table(MODEL_COLUMNS, [_row(model) for model in found])
    else:
        print(f"No model in {folder} or the folders in it.")
    tables = {
        HUB_COLUMNS: [_row(model) for model in models_of_the_hub()],
        FAIR_COLUMNS: [[name, str(file or "fetched when it is loaded")] for name, file in published_models()],
        FORMAT_COLUMNS: [[one.name, one.title] for one in FORMATS],
        RECIPE_COLUMNS: bundled_recipes(),
    }
    for columns, rows in tables.items():
        if rows:
            print()
            _print_table(columns, rows)


@models.command("describe", epilog="Example: processive models describe runs/chem")
def describe_model(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A folder, a file of weights, hf://owner/name, fair-esm's name, a recipe."
        ),
    ],
    *,
    size: Annotated[str | None, typer.Option(help="Of a recipe: tiny, published, or another that it has.")] = None,
) -> None:
    """Tell what a model is: architecture, parameters, context, memory per sequence, licence. No weight is read."""
    from .. import recipes
    from ..models.describe import describe

    is_recipe = model.suffix == ".toml" or (model.stem in recipes.names() and not model.exists())
    if size is not None and not is_recipe:
        raise InputError("A size is of a recipe.", path=model, hint="Leave out --size.")
    described = _recipe(str(model), size or "tiny") if is_recipe else describe(model)
    table = described.table()
    width = max(map(len, table))
    for label, text in table.items():
        print(f"{label.ljust(width)}  {text}")


def _recipe(name: str, size: str) -> Description:
    """Describe the model that a recipe trains."""
    from ..models.describe import Description
    from ..training import read_recipe

    recipe = read_recipe(name, size)
    if not recipe.backbone:
        settings = ", ".join(f"{key} {value}" for key, value in recipe.predictor.items())
        return Description(
            name=recipe.name,
            format=f"recipe, size {size}",
            architecture=f"property model: {settings}",
            parameters=None,
            context="",
            state=None,
            tokenizer="",
            source=recipe.source,
            description=recipe.description,
        )
    return _language_model(recipe, size)


def _language_model(recipe: Recipe, size: str) -> Description:
    from dataclasses import replace

    from ..models.describe import of_backbone
    from .inputs import domain_module

    tokenizer = None  # that of cells is made from the data, and that of a text model comes with its base
    if recipe.domain != "cells" and not (recipe.domain == "text" and set(recipe.tokenizer) <= {"name"}):
        tokenizer = domain_module(recipe.domain).make_tokenizer(recipe.tokenizer, [])
    config = recipe.backbone_config(1 if tokenizer is None else len(tokenizer.vocabulary))
    described = of_backbone(config, recipe.head, tokenizer, name=recipe.name, format=f"recipe, size {size}")
    longest = recipe.training.max_length if recipe.training else None
    trained = f"; trained on up to {longest:,} tokens" if longest else ""
    return replace(
        described,
        context=described.context + trained,
        source=recipe.source,
        description=recipe.description,
        licence="yours: a recipe has no weights",
    )


def bundled_recipes() -> list[list[str]]:
    """Name, domain and description of each recipe of the package."""
    from .. import recipes
    from ..training import read_recipe

    found = [read_recipe(name) for name in recipes.names()]
    return [[recipe.name, recipe.domain, recipe.description] for recipe in found]


def _row(model: Listed) -> list[str]:
    parameters = "-" if model.parameters is None else f"{model.parameters:,}"
    return [model.name, model.kind, model.family, parameters, model.tokenizer, model.place]


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

"""processive tokenize."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .inputs import OnErrorOption, domain_module, tokenize_options
from .report import Stopped, say

if TYPE_CHECKING:
    from ..sequences import Tokenizer, TokenStore


def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="SMILES, FASTA or text (plain, .gz or .zst), or .h5ad for cells."),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="STORE", help="Folder of the store, written whole or not at all.")],
    recipe: Annotated[str | None, typer.Option(help="Take the tokenizer of a recipe.")] = None,
    size: Annotated[str, typer.Option(help="Size of the recipe.")] = "tiny",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Or a tokenizer: its name (dna, protein, smiles), or the folder of a run."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that tokenize; the store is the same for any number.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a store that was begun.")] = False,
    check_molecules: Annotated[
        bool, typer.Option("--check-molecules", help="Ask RDKit too whether a SMILES is a molecule; much slower.")
    ] = False,
    spans: Annotated[
        Path | None, typer.Option(help="Spans of DNA or proteins (BED, GFF, GenBank) to be stored with the sequences.")
    ] = None,
    on_error: OnErrorOption = "raise",
) -> None:
    """Turn files larger than memory into a token store, which `train` takes in place of a file.

    A record that cannot be used is left out with --on-error skip, and listed in STORE/unusable.tsv.
    """
    from ..sequences import check_file, tokenize_files
    from ..training import describe_file, read_recipe

    paths = [check_file(path) for path in inputs]
    if len(set(paths)) < len(paths):
        raise ConfigError("A file is named twice.")
    made, domain = _find_tokenizer(recipe, size, tokenizer, paths)
    options: dict[str, Any] = {"sanitize": True} if check_molecules else {}
    if options and made.domain != "chem":
        raise ConfigError(f"--check-molecules is for SMILES; {made.name} reads {made.domain}.")
    plan = None if recipe is None else read_recipe(recipe, size)
    more = tokenize_options(plan, spans, made.domain)
    sources = {str(path): partial(domain.chunks, path, made, **options, **more) for path in paths}
    identity = {"inputs": [describe_file(path) for path in paths], "options": options}
    if plan is not None and plan.data:
        identity["data"] = dict(plan.data)
    if spans is not None:
        identity["span_file"] = describe_file(spans)
    try:
        store = tokenize_files(
            sources,
            made,
            out,
            workers=workers or os.cpu_count() or 1,
            on_error=on_error,
            resume=resume,
            identity=identity,
            progress=True,
        )
    except KeyboardInterrupt:
        raise Stopped("Tokenizing was interrupted. Run the same command with --resume to go on.") from None
    unusable = sum(counts["unusable"] for counts in store.meta["records"].values())
    if unusable:
        say(f"warning: {_first_unusable(store)}")
    print(f"{len(store):,} sequences, {len(store.tokens):,} tokens, {unusable:,} records left out: {out}.")
    print(f"Next: processive train {recipe or 'RECIPE'} {out} --out RUN")


def _find_tokenizer(
    recipe: str | None, size: str, tokenizer: str | None, paths: list[Path]
) -> tuple[Tokenizer, ModuleType]:
    """The tokenizer that was asked for, and the domain that reads its files."""
    from ..sequences import tokenizer_class, tokenizer_from_dict
    from ..training import read_recipe

    if (recipe is None) == (tokenizer is None):
        raise ConfigError("Name either a --recipe or a --tokenizer.")
    if tokenizer is not None and (Path(tokenizer) / "config.json").is_file():
        config = json.loads((Path(tokenizer) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config.get("tokenizer"), dict):
            raise ConfigError(f"{tokenizer} is no run of processive: its config.json has no tokenizer.")
        made: Tokenizer = tokenizer_from_dict(config["tokenizer"])
        return made, domain_module(made.domain)
    if recipe is not None:
        plan = read_recipe(recipe, size)
        settings, name = dict(plan.tokenizer), plan.domain
    else:
        settings, name = {"name": tokenizer}, tokenizer_class(str(tokenizer)).domain
    domain = domain_module(name)
    if name != "cells":
        made = domain.make_tokenizer(settings, [])
    elif "gene_table" not in settings and len(paths) > 1:
        raise ConfigError("Several files of cells need one vocabulary: a recipe with a gene_table, or --tokenizer RUN.")
    else:
        made = domain.make_tokenizer(settings, domain.read(paths[0], backed=True))
    return made, domain


def _first_unusable(store: TokenStore) -> str:
    """Say which records were left out, the first ones by number."""
    from ..sequences import read_unusable
    from ..sequences.tokenizing import UNUSABLE

    found = read_unusable(store)
    numbers = ", ".join(f"{file} record {record.number}" for file, record in found[:5])
    more = ", ..." if len(found) > 5 else ""
    reason = found[0][1].reason
    return f"{len(found)} records cannot be used ({numbers}{more}); first: {reason} All are in {store.path / UNUSABLE}."

"""What the verbs share on the way in: the domain of a model, its records, and the options that mean the same."""

from __future__ import annotations

import importlib
import os
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models import LanguageModel
    from ..sequences import Records, Tokenizer
    from ..training import Recipe

# The command line under way, for a verb that starts it again in other processes.
COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command")

DOMAINS = ("chem", "bio", "cells", "text")
OnError = Literal["raise", "skip"]  # as in sequences, which would import torch before --help is shown

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder that `processive train` wrote, or hf://owner/name.")
]
InputArgument = Annotated[
    Path, typer.Argument(metavar="INPUT", help="SMILES, FASTA or text (plain, .gz or .zst), or .h5ad for cells.")
]
OnErrorOption = Annotated[
    OnError,
    typer.Option(help="A record that cannot be used: stop there, or go on and report it; its row then holds NaN."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]


def load_model(folder: Path, device: str) -> LanguageModel:
    """Read a language model from its folder."""
    from .. import models

    check_device(device)
    return models.load(folder, device=device)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: with torch's own reason.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"The device {device!r} cannot be used here: {reason}.") from None


def process_number() -> int:
    """Return the number of this process among those that a launcher has started; 0 for one that is alone."""
    return int(os.environ.get("RANK", "0"))


def local_device(device: str) -> str:
    """Return the device of this process: of several on one machine each has the GPU of its number there."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def domain_module(name: str) -> ModuleType:
    """Return the room that owns the verbs of domain ``name``.

    Raises:
        ConfigError: no such domain.
    """
    if name not in DOMAINS:
        raise ConfigError(f"The domain {name!r} has no verbs here. Known: {', '.join(DOMAINS)}.")
    return importlib.import_module(f"..{name}", __package__)


def read_records(path: Path, tokenizer: Tokenizer, on_error: OnError) -> Records:
    """Read a text file for ``tokenizer``; records that cannot be used are refused or reported, as ``on_error`` says."""
    module = domain_module(tokenizer.domain)
    # What a letter means depends on the alphabet in bio alone: ACGT is DNA and a peptide.
    records: Records = module.read(path, tokenizer) if tokenizer.domain == "bio" else module.read(path)
    return records.checked(on_error)


def record_columns(records: Records, domain: str) -> dict[str, list[Any]]:
    """Columns that say which record a row is about, and whether it could be used ("ok", or why not)."""
    columns: dict[str, list[Any]] = {
        "record": [record.number for record in records],
        "name": [record.name for record in records],
    }
    if domain == "chem":
        columns["smiles"] = [record.text for record in records]
    columns["status"] = [record.problem.reason if record.problem else "ok" for record in records]
    return columns


def cell_columns(names: list[str], usable: list[bool]) -> dict[str, list[Any]]:
    """The same for cells."""
    status = ["ok" if fit else "The cell has no gene that the model knows." for fit in usable]
    return {"record": list(range(1, len(names) + 1)), "name": names, "status": status}


def tokenize_options(plan: Recipe | None, spans: Path | None, domain: str | None = None) -> dict[str, Any]:
    """What a domain's ``tokenize`` and ``chunks`` are told beside the tokenizer: settings of a recipe, and spans.

    Raises:
        ConfigError: the domain has no spans.
        InputError: the file of spans cannot be read.
    """
    options = {} if plan is None else dict(plan.data)
    if spans is None:
        return options
    domain = domain or (None if plan is None else plan.domain)
    if domain != "bio":
        raise ConfigError(f"--spans names bases and residues; {domain} has none.")
    return {**options, "spans": domain_module(domain).read_spans(spans)}

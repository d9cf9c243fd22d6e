"""What can be loaded here: models under a folder, in the hub's cache, and under fair-esm's names; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, ProcessiveError
from .files import CONFIG, WEIGHTS
from .foreign import foreign_parts
from .hub import MAIN, HubName, cached_models
from .published import FAIR_ESM, downloaded
from .weights import SAFETENSORS, TORCH, open_weights

ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Listed:
    """A model that was found.

    Attributes:
        name: what it is called.
        kind: "language-model" or another kind of ours, or the format of another package.
        family: of the backbone, "-" where there is none.
        parameters: how many; None where the weights are missing.
        tokenizer: its name, "-" where there is none.
        place: a folder or file, or what ``load`` takes.
    """

    name: str
    kind: str
    family: str
    parameters: int | None
    tokenizer: str
    place: str


def models_under(folder: Path) -> Iterator[Listed]:
    """Return every model in ``folder`` and two levels below: of our own, and of every format that is known."""
    for places in ([folder], folder.glob("*"), folder.glob("*/*")):
        for place in sorted(path for path in places if path.is_dir() and not path.name.startswith(".")):
            yield from models_in(place)


def models_in(folder: Path) -> list[Listed]:
    """Return the models of one folder: one, or one per file of weights where none is its only one."""
    own = _own(folder)
    if own is not None:
        return [own]
    try:
        files = sorted(file for file in folder.iterdir() if _readable(file))
    except OSError:
        return []  # a folder that may not be read holds nothing that could be loaded
    whole = _foreign(folder, folder.resolve().name) if files else None
    if whole is not None:
        return [whole]
    return [found for file in files if (found := _foreign(file, file.stem)) is not None] if len(files) > 1 else []


def models_of_the_hub() -> Iterator[Listed]:
    """Return the models in the hub's cache that can be loaded; none where huggingface_hub is not installed."""
    try:
        snapshots = list(cached_models())
    except MissingExtra:
        return
    for snapshot in snapshots:
        revision = next(iter(sorted(snapshot.references, key=lambda name: name != MAIN)), snapshot.name.revision)
        name = str(HubName(snapshot.name.repository, revision=revision))
        for found in models_in(snapshot.path):
            yield Listed(name, found.kind, found.family, found.parameters, found.tokenizer, name)


def published_models() -> Iterator[tuple[str, Path | None]]:
    """Return the names that fair-esm gives to ESM-2, and the file of those that it has downloaded."""
    for name in FAIR_ESM:
        yield name, downloaded(name)


def _own(folder: Path) -> Listed | None:
    """Return the model of ours that a folder holds."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # another program's file, or one that may not be read
    if not isinstance(config, dict) or not {"format", "kind"} <= config.keys():
        return None
    return Listed(
        name=str(config.get("name", folder.name)),
        kind=str(config["kind"]),
        family=_of(config, "backbone", "family"),
        parameters=_count(folder / WEIGHTS),
        tokenizer=_of(config, "tokenizer", "name"),
        place=str(folder),
    )


def _foreign(path: Path, name: str) -> Listed | None:
    """Return the model of another package that a folder or file holds."""
    try:
        chosen, parts, parameters = foreign_parts(path)
    except ProcessiveError:
        return None  # of no format that is known: it cannot be loaded
    family, tokenizer = _of(parts, "backbone", "family"), _of(parts, "tokenizer", "name")
    return Listed(name, chosen.name, family, parameters, tokenizer, str(path))


def _readable(file: Path) -> bool:
    """Whether a file may hold weights whose headers can be read by themselves."""
    if file.suffix == SAFETENSORS:
        return file.is_file()
    if file.suffix not in TORCH or not file.is_file():
        return False
    with file.open("rb") as handle:
        return handle.read(len(ZIP)) == ZIP


def _count(weights: Path) -> int | None:
    if not weights.is_file():
        return None
    try:
        with open_weights([weights]) as found:
            return sum(map(prod, found.shapes.values()))
    except ProcessiveError:
        return None


def _of(config: dict[str, Any], table: str, key: str) -> str:
    part = config.get(table)
    return str(part.get(key, "-")) if isinstance(part, dict) else "-"

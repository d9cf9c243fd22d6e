"""The model card: where a model comes from and how good it is, for people and for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

VERSIONED = ("processive", "torch", "numpy")


@dataclass
class ModelCard:
    """What a user should know before trusting a model. Every value is plain, for JSON.

    Attributes:
        description: what the model is for, in a sentence or two.
        licence: under which its weights may be used.
        source: where the weights were taken from, with the revision.
        data: what it was trained on: files, records, tokens, hashes.
        recipe: how it was trained: the recipe's name and every setting.
        metrics: what was measured, by name.
        run: when, where and from what it was trained; see ``training.record``.
        parameters: how many the model has; filled in when the model is saved.
        versions: of the packages it was made with; filled in when the model is saved, if empty.
    """

    description: str = ""
    licence: str = ""
    source: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    versions: dict[str, str] = field(default_factory=dict)


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a model depends on."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that was never installed
            found[package] = "unknown"
    return found


def card_text(name: str, card: ModelCard, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the card as the Markdown of a README; ``sections`` are further tables by title."""
    lines = [f"# {name}", ""]
    lines += [card.description, ""] if card.description else []
    lines += [f"{card.parameters:,} parameters." + (f" Licence: {card.licence}." if card.licence else ""), ""]
    lines += [f"Weights taken from {card.source}.", ""] if card.source else []
    lines += ["```python", "import processive as pv", "", 'model = pv.load("path/to/this/folder")', "```", ""]
    tables = {
        **{"Data": card.data, "Metrics": card.metrics, "Recipe": card.recipe, **sections},
        **{"Run": card.run, "Versions": card.versions},
    }
    for title, table in tables.items():
        if table:
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in _flat(table).items()]
            lines.append("")
    return "\n".join(lines)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")

"""What the formats of transformers' models have in common: settings refused by name, JSON files, positions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from .table import Parts

CONTEXT = 2048  # positions that are written down where nobody knows how many a model was trained with


def refuse(config: Mapping[str, Any], readable: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint with settings that we would not run alike; absent and null keys are fine.

    Raises:
        InputError: names the key, its value, and what can be read.
    """
    for key, values in readable.items():
        value = config.get(key)
        if value is not None and value not in values:
            able = f"only {', '.join(map(repr, values))} can be read" if values else "that cannot be read"
            raise InputError(f"The configuration's {key} is {value!r}; {able}.")


def trained_context(parts: Parts) -> int:
    """Return the positions that a model was trained with, as its card says."""
    recipe = parts.get("card", {}).get("recipe", {})
    return int(recipe.get("context", CONTEXT))


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, an empty one where there is no such file.

    Raises:
        InputError: it is not JSON, or no mapping.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"This is not JSON ({error}).", path=path) from None
    if not isinstance(found, dict):
        raise InputError("This is JSON, but no mapping.", path=path)
    return found

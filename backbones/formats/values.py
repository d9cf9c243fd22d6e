"""What the configurations of foreign checkpoints have in common: settings refused by name, in and out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError, InputError
from ..configuration import config_from_dict
from ..transformer import TransformerConfig
from .table import SAME, Entry, Join, Parts

SIZES = frozenset({"vocabulary_size", "width", "depth", "heads", "feed_forward_width", "norm_eps", "dropout"})


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


def transformer_of(parts: Parts) -> TransformerConfig:
    """Return the configuration of a transformer.

    Raises:
        ConfigError: the backbone is of another family.
    """
    config = config_from_dict(parts["backbone"])
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"This format holds transformers, and the backbone is of the family {config.family!r}.")
    return config


def must_hold(config: object, *, fixed: Mapping[str, Any], free: Collection[str]) -> None:
    """Refuse to write a configuration that a format cannot hold: what is not free is ``fixed``, or has its default.

    Raises:
        ConfigError: names the field, its value and the one that the format holds.
    """
    for field in fields(config):  # type: ignore[arg-type]
        if field.name in free:
            continue
        value = getattr(config, field.name)
        wanted = fixed.get(field.name, None if field.default is MISSING else field.default)
        if value != wanted:
            raise ConfigError(f"This format holds models with {field.name} {wanted!r}, and here it is {value!r}.")


def head_must_hold(head: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to write a head that a format cannot hold: ``wanted`` is said, and nothing else is set.

    Raises:
        ConfigError: names the setting, its value and the one that the format holds.
    """
    given = {**head}
    for name in ("tied", "bias"):
        given[name] = head["kind"] == "esm" if head.get(name) is None else head[name]
    for name, value in {"soft_cap": None, **wanted}.items():
        if given.get(name) != value:
            raise ConfigError(f"This format holds heads with {name} {value!r}, and here it is {given.get(name)!r}.")
    if head.get("conditions"):
        raise ConfigError("This format holds heads without conditions.")


def affine(own: str, theirs: str | tuple[str, ...], join: Join = SAME, *, bias: bool = True) -> list[Entry]:
    """Return the entries of a weight and, where there is one, its bias, made of theirs in the same way."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    suffixes = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{own}.{suffix}", tuple(f"{name}.{suffix}" for name in names), join) for suffix in suffixes]


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

"""What the configurations of foreign checkpoints have in common: values read, and refused, by the name of their key."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError, InputError
from ..configuration import config_from_dict
from ..transformer import TransformerConfig
from .table import Parts

REQUIRED = object()
SIZES = frozenset({"vocabulary_size", "width", "depth", "heads", "feed_forward_width", "norm_eps", "dropout"})


def value_of(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
    """Return ``config[key]``, or ``default`` where the key is absent or null.

    Raises:
        InputError: the key is absent and there is no default, or the value is of another type.
    """
    value = config.get(key)
    if value is None:
        if default is REQUIRED:
            raise InputError(f"The configuration has no {key!r}.")
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InputError(f"The configuration's {key!r} is {value!r}, which is no {kinds[0].__name__}.")
    return value


def refuse(config: Mapping[str, Any], readable: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint with settings that we would not run alike; absent and null keys are fine.

    Raises:
        InputError: names the key, its value, and what can be read.
    """
    for key, values in readable.items():
        value = config.get(key)
        if value is not None and value not in values:
            able = f"only {', '.join(map(repr, values))} can be read" if values else "that cannot be read"
            raise InputError(f"The configuration's {key!r} is {value!r}; {able}.")


def transformer_of(parts: Parts) -> TransformerConfig:
    """Return the configuration of a transformer.

    Raises:
        ConfigError: the backbone is of another family.
    """
    config = config_from_dict(parts["backbone"])
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"This format holds transformers, and the backbone is an {config.family}.")
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
        default = field.default if field.default is not MISSING else None
        wanted = fixed.get(field.name, default)
        if value != wanted:
            raise ConfigError(f"This format holds models with {field.name} {wanted!r}, and here it is {value!r}.")


def either(setting: bool | None, otherwise: bool) -> bool:
    """Return ``setting``, or ``otherwise`` where it is None."""
    return otherwise if setting is None else setting


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

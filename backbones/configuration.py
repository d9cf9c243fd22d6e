"""Configurations to and from plain values, and the network that each of them means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from types import NoneType, UnionType
from typing import Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from .backbone import Backbone, BackboneConfig
from .transformer import Transformer
from .transformer_config import TransformerConfig
from .xlstm import XLSTM
from .xlstm_config import XLSTMConfig

AnyConfig: TypeAlias = XLSTMConfig | TransformerConfig
Config = TypeVar("Config")

FAMILIES: dict[str, type[AnyConfig]] = {config.family: config for config in (XLSTMConfig, TransformerConfig)}


def build(config: AnyConfig) -> Backbone:
    """Return the network of a configuration, freshly initialised."""
    return XLSTM(config) if isinstance(config, XLSTMConfig) else Transformer(config)


def config_to_dict(config: BackboneConfig) -> dict[str, Any]:
    """Return plain values for JSON, ``family`` first."""
    return {"family": config.family, **to_plain(config)}


def config_from_dict(data: Mapping[str, Any]) -> AnyConfig:
    """Inverse of ``config_to_dict``; what is left out has its default.

    Raises:
        ConfigError: an unknown family, an unknown or missing key, a value of the wrong type or out of range.
    """
    family = data.get("family")
    if family not in FAMILIES:
        raise ConfigError(f"No backbone family is called {family!r}: {', '.join(FAMILIES)}.")
    return from_plain(FAMILIES[family], {key: value for key, value in data.items() if key != "family"}, what="backbone")


def from_plain(config: type[Config], data: Mapping[str, Any], *, what: str) -> Config:
    """Build a configuration dataclass of plain values from a mapping, checking names and types.

    A list becomes a tuple, and a mapping a tuple of pairs where a tuple is meant.

    Raises:
        ConfigError: as ``config_from_dict``; ``what`` names the table that is wrong.
    """
    known = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ConfigError(f"Unknown {what} key {', '.join(map(repr, unknown))}. Known: {', '.join(known)}.")
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise ConfigError(f"The {what} needs {', '.join(missing)}.")
    hints = get_type_hints(config)
    values = {key: _frozen(value, hints[key]) for key, value in data.items()}
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ConfigError(f"The {what}'s {key} is {data[key]!r}, which is not {known[key].type}.")
    return config(**values)


def to_plain(config: Any) -> dict[str, Any]:
    """Inverse of ``from_plain``: values for JSON."""
    return {name: _thawed(value) for name, value in asdict(config).items()}


def _frozen(value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping) and get_origin(hint) is tuple:
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return dict(value) if value and all(isinstance(part, tuple) for part in value) else list(value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; a bool is no int."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is NoneType:
        return value is None
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)

"""A foreign checkpoint as a table: which tensors of theirs make which of ours, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import ConfigError, InputError
from ..configuration import config_from_dict
from ..transformer_config import TransformerConfig

Value = TypeVar("Value", bool, int, float, str)


@dataclass(frozen=True)
class Join:
    """How tensors of theirs make one of ours, and back, without changing a bit.

    ``split`` runs on meta tensors too, so that the shapes of theirs follow from ours.
    """

    merge: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


SAME = Join(lambda theirs: theirs[0], lambda own: (own,))
STACKED = Join(lambda theirs: torch.stack(tuple(theirs)), lambda own: own.unbind())


def rows(*sizes: int) -> Join:
    """Join along the first axis: theirs have ``sizes`` rows."""
    return Join(lambda theirs: torch.cat(tuple(theirs)), lambda own: torch.split(own, list(sizes)))


def reshaped(own: Sequence[int], theirs: Sequence[int]) -> Join:
    """Return one tensor under two shapes."""
    return Join(lambda parts: parts[0].reshape(*own), lambda tensor: (tensor.reshape(*theirs),))


def entries(
    table: Mapping[str, str | tuple[str, ...]], *, depth: int = 0, joins: Mapping[str, Join] | None = None
) -> list[Entry]:
    """Spell out a table of ours -> theirs.

    ``{i}`` counts the blocks, and a name of ours that ends in ``*`` stands for a weight and a bias. ``joins`` has the
    join of a line by its name, where it is not one tensor for one.
    """
    found = []
    for line, theirs in table.items():
        for i in range(depth) if "{i}" in line else (0,):
            for kind in ("weight", "bias") if line.endswith("*") else ("",):
                own, *names = (
                    name.replace("{i}", str(i)).replace("*", kind)
                    for name in (line, *((theirs,) if isinstance(theirs, str) else theirs))
                )
                found.append(Entry(own, tuple(names), (joins or {}).get(line, SAME)))
    return found


@dataclass(frozen=True)
class Entry:
    """One tensor of ours.

    Attributes:
        own: its name in a ``LanguageModel``: ``backbone.blocks.3.out.weight``, ``head.bias``, ...
        foreign: the names of theirs that make it, in order.
        join: how.
    """

    own: str
    foreign: tuple[str, ...]
    join: Join = SAME


def _nothing(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class Checkpoint:
    """What a format may look at to tell what a foreign checkpoint is.

    Attributes:
        folder: where it lies, for the files of its tokenizer.
        config: its configuration, empty where the format has none.
        shapes: the shape of each tensor by name, as the format's ``canonical`` spells it.
        read: a tensor by name, for the few whose values decide something.
        tokenizer: the one to take in place of what lies in the folder, as in our ``config.json``.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor] = _nothing
    tokenizer: Mapping[str, Any] | None = None


Parts = dict[str, Any]  # "tokenizer", "backbone" and "head" as they stand in our own config.json, and "card" if known


def _hugging_face(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"config.json": config, "model.safetensors": tensors}


@dataclass(frozen=True)
class CheckpointFormat:
    """A format, in and out.

    Attributes:
        name: for ``save(format=...)`` and ``processive models``.
        title: the models that come in it, for people.
        recognise: whether a checkpoint is of this format.
        config_in: our configuration of a checkpoint. Raises InputError, naming the key, for what we cannot run alike.
        config_out: their configuration of ours. Raises ConfigError for a model that the format cannot hold.
        table: one entry for each of our tensors.
        constants: tensors of theirs that follow from the configuration, of int or float32: written in the dtype of the
            embedding if that changes none, and where they are read they must have these values.
        files_out: further files of theirs (tokenizer), by name: text, or bytes as they are.
        canonical: the name that ``table`` and ``constants`` use for a tensor: without a prefix that only some
            checkpoints have, or under its newer name.
        copies: tensors of theirs that repeat another (a tied head) -> that other. Where they are read they must be
            equal; they are written by ``torch.save`` alone, as safetensors holds nothing twice.
        unused: patterns (``fnmatch``) of tensors that their code does not use; passed over.
        files: the configuration and weights as files, by name: a dict of plain values for ``.json``, of tensors for
            ``.safetensors``, anything that ``torch.save`` takes for the rest.
    """

    name: str
    title: str
    recognise: Callable[[Mapping[str, Any], Collection[str]], bool]
    config_in: Callable[[Checkpoint], Parts]
    config_out: Callable[[Parts], dict[str, Any]]
    table: Callable[[Parts], list[Entry]]
    constants: Callable[[Parts], dict[str, Tensor]] = field(default=lambda parts: {})
    files_out: Callable[[Parts], Mapping[str, str | bytes]] = field(default=lambda parts: {})
    canonical: Callable[[str], str] = field(default=lambda name: name)
    copies: Callable[[Parts], dict[str, str]] = field(default=lambda parts: {})
    unused: tuple[str, ...] = ()
    files: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]] = field(default=_hugging_face)


def transformer_of(parts: Parts) -> TransformerConfig:
    """Return the configuration of the transformer in ``parts``.

    Raises:
        ConfigError: the backbone is another one.
    """
    config = config_from_dict(parts["backbone"])
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"The format holds transformers, and the backbone is of the family {config.family!r}.")
    return config


def setting(config: Mapping[str, Any], name: str, kind: type[Value], default: Value | None = None) -> Value:
    """Return one value of their configuration; left out or null it is ``default``.

    Raises:
        InputError: it is of another type, or left out and has no default.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"The configuration's {name} is {value!r}, and {kind.__name__} is needed.")
    return value


def shapes_of_theirs(entries: Sequence[Entry], own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a checkpoint must have to make ``own`` (meta tensors will do)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        parts = entry.join.split(own[entry.own])
        shapes.update({name: tuple(part.shape) for name, part in zip(entry.foreign, parts, strict=True)})
    return shapes


def to_theirs(entries: Sequence[Entry], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in the other format."""
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        parts = entry.join.split(own[entry.own])
        theirs.update({name: part.contiguous() for name, part in zip(entry.foreign, parts, strict=True)})
    return theirs


def to_ours(entries: Sequence[Entry], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return our tensors; ``read`` gives one of theirs by name."""
    return {entry.own: entry.join.merge([read(name) for name in entry.foreign]).contiguous() for entry in entries}


def fill(entry: Entry, own: Tensor, read: Callable[[str], Tensor], let_go: Callable[[Tensor], None]) -> None:
    """Copy theirs into one tensor of ours, one by one where they are parts of it; ``let_go`` gets each when copied."""
    places = entry.join.split(own)
    storage = own.untyped_storage().data_ptr()
    if all(place.untyped_storage().data_ptr() == storage for place in places) and _cover(places, own):
        for name, place in zip(entry.foreign, places, strict=True):
            part = read(name)
            place.copy_(part)
            let_go(part)
        return
    parts = [read(name) for name in entry.foreign]
    own.copy_(entry.join.merge(parts))
    for part in parts:
        let_go(part)


def _cover(places: Sequence[Tensor], own: Tensor) -> bool:
    return sum(place.numel() for place in places) == own.numel()

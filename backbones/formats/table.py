"""A foreign checkpoint as a table: which tensors of theirs make which of ours, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
    return Join(lambda theirs: torch.cat(tuple(theirs)), lambda own: own.split(sizes))


def reshaped(own: Sequence[int], theirs: Sequence[int]) -> Join:
    """Return one tensor under two shapes."""
    return Join(lambda parts: parts[0].reshape(*own), lambda tensor: (tensor.reshape(*theirs),))


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


@dataclass(frozen=True)
class Checkpoint:
    """What a format may look at to tell what a foreign checkpoint is.

    Attributes:
        folder: where it lies, for the files of its tokenizer.
        config: its configuration, empty where the format has none.
        shapes: the shape of each tensor by name.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


Parts = dict[str, Any]  # "tokenizer", "backbone" and "head" as they stand in our own config.json, and "card" if known


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
        constants: tensors of theirs that follow from the configuration: written, and passed over when read.
        files_out: further files of theirs (tokenizer), by name.
    """

    name: str
    title: str
    recognise: Callable[[Mapping[str, Any], Collection[str]], bool]
    config_in: Callable[[Checkpoint], Parts]
    config_out: Callable[[Parts], dict[str, Any]]
    table: Callable[[Parts], list[Entry]]
    constants: Callable[[Parts], dict[str, Tensor]] = field(default=lambda parts: {})
    files_out: Callable[[Parts], dict[str, str]] = field(default=lambda parts: {})


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

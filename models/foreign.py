"""Foreign checkpoints: which format one is, and our model of it.

Nothing is run that a checkpoint holds. Tensors are read one at a time, so that a model is loaded in little more memory
than its own size, and what does not fit is listed by both names, theirs and ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backbones.formats import FORMATS, Checkpoint, CheckpointFormat, Entry
from ..backbones.formats.table import Parts, fill, shapes_of_theirs
from ..errors import ConfigError, InputError, ProcessiveError, needs
from ..sequences import Tokenizer, tokenizer_from_dict, tokenizer_to_dict
from .build import build_model, wanted_dtypes
from .language_model import LanguageModel
from .weights import Weights, find_weights, open_weights

CONFIGS = ("config.json", "config.yaml", "model_config.json", "init_arguments.json")
CLOSE = 1e-5  # relative: constants are powers, whose last bits differ between machines

Model = TypeVar("Model", bound=LanguageModel)


@dataclass
class Found:
    """A checkpoint of whatever format: where it is, its configuration and its open weights."""

    path: Path
    config: dict[str, Any]
    weights: Weights


def load_foreign(
    path: Path,
    cls: type[Model],
    *,
    format: str | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    tokenizer: Tokenizer | None = None,
) -> Model:
    """Read a model from a folder or file of another package; ``tokenizer`` in place of the one that lies there.

    Raises:
        InputError: the format is not known or not certain, the model is one that we cannot run alike, a file is
            damaged, or tensors are missing, unknown or misshapen; all of these are named.
    """
    with _opened(path) as found:
        chosen = _format_of(found, format)
        read = Reading(chosen, found)
        try:
            parts = read.parts(None if tokenizer is None else tokenizer_to_dict(tokenizer))
            name = path.stem if path.is_file() else path.resolve().name
            config = {"name": name, "card": {}, **parts}
            model = build_model(tokenizer or tokenizer_from_dict(parts["tokenizer"]), config, cls)
            entries = chosen.table(parts)
        except ConfigError as error:
            raise InputError(f"As {chosen.name}: {error}", path=path) from None
        own = model.state_dict()
        read.check(parts, entries, own)
        tensors = {}
        for entry, wanted in zip(entries, wanted_dtypes(model, [entry.own for entry in entries], dtype), strict=True):
            stored = [read.tensor(name) for name in entry.foreign]
            kept = stored[0].dtype
            for tensor in stored[1:]:
                kept = torch.promote_types(kept, tensor.dtype)
            kind = wanted if wanted is not None and kept.is_floating_point else kept
            tensors[entry.own] = torch.empty(own[entry.own].shape, dtype=kind, device=device)
            fill(entry, tensors[entry.own], read.tensor, found.weights.let_go)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def foreign_parts(path: Path, format: str | None = None) -> tuple[CheckpointFormat, Parts, int]:
    """Return the format of another package's checkpoint, our configuration of it, and how many parameters it has.

    Of the files only headers are read, and the few tensors whose values decide something.

    Raises:
        InputError: as ``load_foreign``.
    """
    with _opened(path) as found:
        chosen = _format_of(found, format)
        read = Reading(chosen, found)
        parts = read.parts()
        try:
            names = {name for entry in chosen.table(parts) for name in entry.foreign if name in read.spelled}
        except ConfigError as error:
            raise InputError(f"As {chosen.name}: {error}", path=path) from None
        return chosen, parts, sum(prod(found.weights.shapes[read.spelled[name][0]]) for name in names)


class Reading:
    """A checkpoint as its format names things."""

    def __init__(self, chosen: CheckpointFormat, found: Found) -> None:
        self.format, self.found = chosen, found
        self.spelled: dict[str, list[str]] = {}  # as the format spells it -> as the files do
        for name in found.weights.shapes:
            self.spelled.setdefault(chosen.canonical(name), []).append(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, by the name that the format gives it."""
        return self.found.weights.read(self.spelled[name][0])

    def parts(self, tokenizer: Mapping[str, Any] | None = None) -> Parts:
        """Return our configuration of the checkpoint, with ``tokenizer`` where one is given."""
        folder = self.found.path if self.found.path.is_dir() else self.found.path.parent
        shapes = {name: self.found.weights.shapes[spelled[0]] for name, spelled in self.spelled.items()}
        try:
            parts = self.format.config_in(Checkpoint(folder, self.found.config, shapes, self.tensor, tokenizer))
            return parts if tokenizer is None else {**parts, "tokenizer": tokenizer}
        except KeyError as error:
            raise InputError(f"As {self.format.name}: {error.args[0]!r} is missing.", path=self.found.path) from None
        except InputError as error:
            if error.path is not None:
                raise
            raise InputError(f"As {self.format.name}: {error.reason}", path=self.found.path, hint=error.hint) from None

    def check(self, parts: Parts, entries: Sequence[Entry], own: Mapping[str, Tensor]) -> None:
        """Compare names, shapes, constants and copies with what the configuration means.

        Raises:
            InputError: something is missing, unknown, misshapen or of another value; all of it is named.
        """
        owner = {name: entry.own for entry in entries for name in entry.foreign}
        constants, copies = self.format.constants(parts), self.format.copies(parts)
        expected = shapes_of_theirs(entries, own)
        wrong = [f"{name} -> {owner[name]} is missing" for name in expected if name not in self.spelled]
        for name, spelled in self.spelled.items():
            shape = self.found.weights.shapes[spelled[0]]
            if name in expected:
                if len(spelled) > 1:
                    wrong.append(f"{' and '.join(spelled)} -> {owner[name]} stand for one")
                if shape != expected[name]:
                    text = f"{name} -> {owner[name]} has shape {list(shape)} in place of {list(expected[name])}"
                    wrong.append(text)
            elif name in constants:
                wrong += [
                    f"{raw} has other values than the model's" for raw in spelled if self._off(raw, constants[name])
                ]
            elif name in copies:
                wrong += [f"{raw} differs from {copies[name]}" for raw in spelled if self._differs(raw, copies[name])]
            elif not any(fnmatchcase(name, pattern) for pattern in self.format.unused):
                wrong.append(f"{name} is unknown")
        if wrong:
            raise InputError(
                f"The tensors do not fit the configuration (theirs -> ours): {'; '.join(wrong)}.", path=self.found.path
            )

    def _off(self, raw: str, constant: Tensor) -> bool:
        stored = self.found.weights.read(raw)
        if stored.shape != constant.shape:
            return True
        return not torch.allclose(stored.double(), constant.to(stored.dtype).double(), rtol=CLOSE, atol=0)

    def _differs(self, raw: str, other: str) -> bool:
        if other not in self.spelled:
            return False  # it is reported as missing
        one, two = self.found.weights.read(raw), self.tensor(other)
        same = one.shape == two.shape and torch.equal(one, two)
        self.found.weights.let_go(one)
        self.found.weights.let_go(two)
        return not same


def _format_of(found: Found, name: str | None) -> CheckpointFormat:
    if name is not None:
        return format_named(name)
    names = found.weights.shapes.keys()
    matching = [one for one in FORMATS if one.recognise(found.config, names)]
    if len(matching) == 1:
        return matching[0]
    known = "; ".join(f"{one.name} ({one.title})" for one in FORMATS)
    if matching:
        which = " or ".join(one.name for one in matching)
        raise InputError(f"This may be {which}.", path=found.path, hint="Say which: load(path, format=...).")
    nearest = _nearest(found)
    raise InputError(
        "This is not the configuration of a processive model, nor of a format that is known.",
        path=found.path,
        hint=f"Known: {known}."
        + (f" Nearest is {nearest}: format={nearest!r} tells what is wrong." if nearest else ""),
    )


def _nearest(found: Found) -> str | None:
    """The format whose tensors have most names in common with the checkpoint's."""
    shared: dict[str, int] = {}
    for one in FORMATS:
        reading = Reading(one, found)
        try:
            entries = one.table(reading.parts())
        except (ProcessiveError, KeyError, TypeError, ValueError):
            continue  # not this one
        shared[one.name] = sum(name in reading.spelled for entry in entries for name in entry.foreign)
    best = max(shared, key=shared.__getitem__, default=None)
    return best if best is not None and shared[best] else None


def format_named(name: str) -> CheckpointFormat:
    """Return a format.

    Raises:
        ConfigError: there is none of that name.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise ConfigError(f"No checkpoint format is called {name!r}. Known: {', '.join(one.name for one in FORMATS)}.")


@contextmanager
def _opened(path: Path) -> Iterator[Found]:
    files = find_weights(path)
    if not files:
        raise InputError("The folder holds no weights.", path=path)
    folder = path if path.is_dir() else path.parent
    with open_weights(files) as weights:
        config = read_settings(folder)
        # A file that brings its own settings is not explained by what happens to lie beside it.
        yield Found(
            path, weights.settings if weights.settings and path.is_file() else config or weights.settings, weights
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder, empty where there is none.

    Raises:
        InputError: it is no JSON or YAML, or no mapping.
    """
    for name in CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            config = _yaml(text) if path.suffix == ".yaml" else json.loads(text)
        except ValueError as error:
            raise InputError(f"This is not {path.suffix[1:].upper()} ({error}).", path=path) from None
        if not isinstance(config, dict):
            raise InputError("This is not the configuration of a model.", path=path)
        return config
    return {}


def _yaml(text: str) -> Any:
    with needs("hub"):
        import yaml  # comes with huggingface_hub
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None

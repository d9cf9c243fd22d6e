"""Tensors in files, one at a time: safetensors, and what ``torch.save`` wrote, neither unpickled nor read as a whole.

A file is mapped into memory. A page of it that was read counts as used until it is let go, so that whoever copies
tensors out of it gives back each one after the copy: then a model is loaded in little more than its own size.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..sequences import check_file

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth", ".ckpt", ".bin")
HARMLESS = (Namespace,)  # fair-esm's configurations; tensors and plain values are known to torch
STATES = ("state_dict", "model_state_dict", "model", "module")  # where a training checkpoint keeps the weights


@dataclass
class Weights:
    """Tensors of one or several files.

    Attributes:
        shapes: by name.
        read: one tensor by name, perhaps a view of a mapped file; not to be written to.
        settings: what else a file of ``torch.save`` held, as plain values.
        files: where they stand.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    settings: dict[str, Any]
    files: list[Path]
    _ranges: list[tuple[int, int]] = field(default_factory=list)

    def let_go(self, tensor: Tensor) -> None:
        """Give back the pages of a mapped tensor that was copied; they are read again where someone still looks."""
        if sys.platform != "linux" or tensor.device.type != "cpu":
            return
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not any(low <= start < high for low, high in self._ranges):
            self._ranges = _mapped(self.files)
        for low, high in self._ranges:
            if low <= start < high:  # never other memory than that of our files, which the kernel can read again
                first = max(low, start // mmap.PAGESIZE * mmap.PAGESIZE)
                last = min(high, -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE)
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED)
                )


def _mapped(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Where in memory the files are mapped."""
    names = {str(file.resolve()) for file in files}
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5] in names:
            low, high = parts[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


@contextmanager
def open_weights(files: Sequence[Path]) -> Iterator[Weights]:
    """Open files that together hold a model's tensors.

    Raises:
        InputError: a file is missing or damaged, holds more than tensors and plain values, or two hold one name.
    """
    weights = Weights({}, lambda name: readers[name](name), {}, list(files))
    readers: dict[str, Callable[[str], Tensor]] = {}
    with ExitStack() as stack:
        for file in files:
            check_file(file)
            one = _open_safetensors(file, stack) if file.suffix == SAFETENSORS else _open_torch(file)
            twice = sorted(set(one.shapes) & set(weights.shapes))
            if twice:
                raise InputError(f"{twice[0]} stands in another file too.", path=file)
            weights.shapes.update(one.shapes)
            weights.settings.update(one.settings)
            readers.update(dict.fromkeys(one.shapes, one.read))
        yield weights


def _open_safetensors(path: Path, stack: ExitStack) -> Weights:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"The weights are damaged ({error}).", path=path, hint="Copy or train them again.") from None
    return Weights(shapes, file.get_tensor, {}, [path])


def _open_torch(path: Path) -> Weights:
    found = load_torch(path)
    state, settings = _state(found)
    if not state:
        raise InputError("The file holds no tensors by name.", path=path)
    return Weights({name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__, settings, [path])


def load_torch(path: Path) -> Any:
    """Return what ``torch.save`` wrote, of tensors and plain values alone; nothing in it is run.

    Raises:
        InputError: the file is damaged, or holds something else, which is named.
    """
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            with path.open("rb") as file:  # before PyTorch 1.6 a file was no zip archive and could not be mapped
                zipped = file.read(4) == b"PK\x03\x04"
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of many types, none of which says whether the file is damaged or refused
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"The file holds more than tensors and plain values: {refused[1]} was refused, and nothing was run.",
                path=path,
                hint="Ask its authors for safetensors.",
            ) from None
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise InputError(f"This is not a file of weights, or it is damaged ({reason}).", path=path) from None


def _state(found: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the settings beside them."""
    if not isinstance(found, Mapping):
        return {}, {}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors, {}
    for key in STATES:
        if isinstance(found.get(key), Mapping):
            state = {name: value for name, value in found[key].items() if isinstance(value, Tensor)}
            return state, {name: plain(value) for name, value in found.items() if name != key}
    return {}, {}


def plain(value: Any) -> Any:
    """Namespaces as dicts, at any depth."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def find_weights(path: Path) -> list[Path]:
    """Return the files of weights that a path names: one, or the shards of a folder; empty where there are none.

    Raises:
        InputError: an index names a file outside its folder, or the folder holds several models.
    """
    if path.is_file():
        return [path, *_beside(path)]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path / whole).is_file():
            return [path / whole]
        if (path / f"{whole}.index.json").is_file():
            return _shards(path / f"{whole}.index.json")
        stem, _, suffix = whole.partition(".")
        pieces = sorted(file for sign in "-_" for file in path.glob(f"{stem}{sign}*.{suffix}"))
        if pieces:
            return pieces
    found = sorted(file for file in path.iterdir() if file.suffix in (SAFETENSORS, *TORCH) and file.is_file())
    models = [file for file in found if not file.name.endswith(CONTACTS)]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise InputError(f"The folder holds several models: {names}.", path=path, hint="Name one file.")
    return [models[0], *_beside(models[0])] if models else []


CONTACTS = "-contact-regression.pt"  # fair-esm keeps these two tensors in a file of their own


def _beside(path: Path) -> list[Path]:
    companion = path.with_name(f"{path.stem}{CONTACTS}")
    return [companion] if companion.is_file() else []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"This is no index of weights ({error}).", path=index) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"The index names {name!r}, which is no file of its own folder.", path=index)
    return [index.parent / name for name in names]

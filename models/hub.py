"""Models on the Hugging Face hub: ``hf://owner/name`` to a folder, over the network or out of the cache.

    hf://owner/name                      the branch main
    hf://owner/name@v1.0                 a branch, a tag or a commit
    hf://owner/name/folder@v1.0          a folder of the repository

Of a repository only what a model is made of is fetched: configuration, tokenizer, and weights in one format. The cache
is huggingface_hub's own, so what another library has fetched is not fetched again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InputError, needs
from .weights import find_weights

PREFIX = re.compile(r"hf:[/\\]{1,2}")  # a Path has joined the two slashes
NAME = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w./+-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN, CARD = "main", "README.md"
TIMEOUT = 10  # seconds for the hub to answer

SMALL = ("*.json", "*.yaml", "*.yml", "*.txt", "*.model")
WEIGHTS: tuple[tuple[str, ...], ...] = (  # the first of these that a folder has
    ("model*.safetensors",),
    ("*.safetensors",),
    ("pytorch_model*.bin",),
    ("*.bin", "*.pt", "*.pth", "*.ckpt"),
)
OF_TRAINING = ("training_args*", "optimizer*", "scheduler*", "rng_state*", "trainer_state*", "adapter_*")


@dataclass(frozen=True)
class HubName:
    """What ``hf://owner/name/folder@revision`` names.

    Attributes:
        repository: ``owner/name``; some old repositories have no owner.
        folder: a folder in it, "" for its top.
        revision: a branch, a tag or a commit.
    """

    repository: str
    folder: str = ""
    revision: str = MAIN

    def __str__(self) -> str:
        place = f"{self.repository}/{self.folder}" if self.folder else self.repository
        return f"hf://{place}" + ("" if self.revision == MAIN else f"@{self.revision}")

    def at(self, commit: str) -> HubName:
        """Return the same place at a commit."""
        return HubName(self.repository, self.folder, commit)


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit, in the cache.

    Attributes:
        name: repository and commit.
        references: the branches and tags that stood there when it was fetched.
        path: the folder with its files.
    """

    name: HubName
    references: tuple[str, ...]
    path: Path


def hub_name(path: str | Path) -> HubName | None:
    """Return what a path names on the hub; None for an ordinary path.

    Raises:
        InputError: it begins with ``hf://`` and names nothing.
    """
    text = str(path)
    start = PREFIX.match(text)
    if not start:
        return None
    match = NAME.fullmatch(text[start.end() :].replace("\\", "/").rstrip("/"))
    if not match:
        raise InputError(
            f"{text!r} names no model on the hub.", hint="Write hf://owner/name or hf://owner/name@revision."
        )
    folder = match["folder"].strip("/")
    if ".." in (match["repository"] + "/" + folder).split("/") or ".." in (match["revision"] or "").split("/"):
        raise InputError(f"{text!r} leaves the repository.", hint="Write hf://owner/name.")
    return HubName(match["repository"], folder, match["revision"] or MAIN)


def fetch(name: HubName) -> tuple[Path, HubName]:
    """Return the folder with a model's files, fetched where they are not in the cache, and the name with its commit.

    Without a network, or with ``HF_HUB_OFFLINE=1``, it is what the cache has.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        InputError: there is no such model, it may not be read, or it is not in the cache and there is no network.
    """
    with needs("hub"):
        import huggingface_hub

    snapshot = cached(name)
    usable = snapshot is not None and whole(snapshot.path / name.folder)
    if snapshot is not None and usable and COMMIT.fullmatch(name.revision):
        return snapshot.path / name.folder, name  # a commit does not change: there is nothing to ask
    try:
        # Not list_repo_files, which tries again for half a minute where there is no network.
        info = huggingface_hub.model_info(name.repository, revision=name.revision, timeout=TIMEOUT)
        wanted = needed([file.rfilename for file in info.siblings or ()], name.folder)
        path = Path(huggingface_hub.snapshot_download(name.repository, revision=name.revision, allow_patterns=wanted))
        return path / name.folder, name.at(path.name)
    except InputError as error:
        raise InputError(f"{name}: {error.reason}", hint=error.hint) from None
    except Exception as error:  # of the hub, the network, the disk: where their classes stand differs between versions
        refuse(name, error)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if snapshot is not None and usable:
            kept = name.at(snapshot.name.revision)
            if not huggingface_hub.constants.HF_HUB_OFFLINE:
                warnings.warn(f"The hub was not reached ({reason}); {kept} is taken from the cache.", stacklevel=4)
            return snapshot.path / name.folder, kept
        has = "no such model" if snapshot is None else "only part of it"
        raise InputError(
            f"{name} could not be fetched ({reason}), and the cache {cache_folder()} has {has}.",
            hint="Load it once with a network and without HF_HUB_OFFLINE, or give the folder of a copy.",
        ) from error


def refuse(name: HubName, error: Exception) -> None:
    """Say why the hub gives no files, where it is the hub that says so.

    Raises:
        InputError: there is no such model or revision, or it may not be read.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    hint = "Check the name; for a private model log in: hf auth login"
    if "RevisionNotFoundError" in kinds:
        raise InputError(f"{name}: the model has no revision {name.revision!r}.", hint="Name a branch, tag or commit.")
    if "GatedRepoError" in kinds:
        hint = f"Accept its terms at https://huggingface.co/{name.repository}, then log in: hf auth login"
        raise InputError(f"{name}: the model is gated.", hint=hint)
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        raise InputError(f"{name}: there is no such model on the hub, or it is private.", hint=hint)


def needed(files: Collection[str], folder: str = "") -> list[str]:
    """Return those files of a folder that a model is made of: safetensors where there are some, else other weights.

    ``folder`` may name one file of weights, where there are several.

    Raises:
        InputError: there are no weights among them.
    """
    one = folder.rpartition("/")[2] if folder in files else None
    folder = folder.rpartition("/")[0] if one else folder
    prefix = f"{folder}/" if folder else ""
    files = sorted(file for file in files if not _fits(file.rsplit("/", 1)[-1], OF_TRAINING))
    here = [file[len(prefix) :] for file in files if file.startswith(prefix)]
    here = [file for file in here if "/" not in file]
    kinds_in_turn = ((one, f"{one.rpartition('.')[0]}-*"),) if one else WEIGHTS  # with what fair-esm keeps beside it
    weights = next((found for kinds in kinds_in_turn if (found := [file for file in here if _fits(file, kinds)])), None)
    if weights is None:
        folders = sorted({file.rpartition("/")[0] for file in files if _fits(file, WEIGHTS[1] + WEIGHTS[3])} - {""})
        raise InputError(
            "The repository has no weights" + (f" in the folder {folder!r}." if folder else " at its top."),
            hint=f"There are some in {', '.join(folders[:8])}: hf://owner/name/folder" if folders else None,
        )
    found = [prefix + file for file in here if file in weights or _fits(file, SMALL)]
    return found + [CARD] * (CARD in files and CARD not in found)


def whole(path: Path) -> bool:
    """Tell whether all files of weights are there that a place in the cache should have."""
    if not path.exists():
        return False
    try:
        files = find_weights(path)
    except InputError:
        return True  # it is not for the cache to say what is wrong
    return bool(files) and all(file.is_file() for file in files)


def licence(folder: Path) -> str:
    """Return the licence that the model card of a folder declares, "" for none."""
    card = folder / CARD
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    named = [re.search(rf"^{key}:[ \t]*(\S.*)$", head, re.MULTILINE) for key in ("license_name", "license")]
    found = next((match[1].strip().strip("\"'") for match in named if match), "")
    return found if head.startswith("---") else ""


def cache_folder() -> Path:
    """Return where huggingface_hub keeps what it has fetched.

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    with needs("hub"):
        from huggingface_hub import constants
    return Path(constants.HF_HUB_CACHE)


def cached(name: HubName) -> Snapshot | None:
    """Return the snapshot of a name in the cache; a branch is where it stood when it was last fetched."""
    for snapshot in _snapshots(cache_folder() / f"models--{name.repository.replace('/', '--')}"):
        if name.revision == snapshot.name.revision or name.revision in snapshot.references:
            return snapshot
    return None


def cached_models() -> Iterator[Snapshot]:
    """Return every snapshot of a model in the cache, by name."""
    for folder in sorted(cache_folder().glob("models--*")):
        yield from _snapshots(folder)


def _snapshots(folder: Path) -> Iterator[Snapshot]:
    """Return the snapshots of a repository's folder in the cache."""
    repository = folder.name.removeprefix("models--").replace("--", "/")
    references: dict[str, list[str]] = {}
    for path in sorted((folder / "refs").rglob("*")):
        if path.is_file():
            commit = path.read_text(encoding="utf-8").strip()
            references.setdefault(commit, []).append(path.relative_to(folder / "refs").as_posix())
    for path in sorted((folder / "snapshots").glob("*")):
        yield Snapshot(HubName(repository, revision=path.name), tuple(references.get(path.name, ())), path)


def _fits(file: str, kinds: Collection[str]) -> bool:
    return any(fnmatch(file, kind) for kind in kinds)

"""The record of a run, ``record.json``: written when it starts, finished when it ends, and part of the model card.

It says what a run cannot be repeated without: settings, data, the weights it began with, versions, seed, and the state
of the code in git.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..models import ModelCard, Trainable, fingerprint, installed_versions, trainable_share
from ..sequences import replacing
from .config import TrainingConfig

FORMAT = 1
NAME = "record.json"
IN_CARD = ("started", "resumed", "finished", "seed", "start", "trainable_share", "git", "machine")


def begin_record(
    out: Path,
    model: Trainable,
    config: TrainingConfig,
    card: ModelCard,
    *,
    data: str,
    engine: dict[str, Any],
    resumed: bool,
) -> dict[str, Any]:
    """Write the record of a run that starts or goes on, and return it.

    ``data`` is the hash of the token sequences; the files that they came from are in ``card.data``. A run that goes on
    keeps when, and with which weights, it began. ``engine`` says with what, and in how many processes, it trains now.

    Raises:
        OutputError: the folder cannot be written.
    """
    known = read_record(out) if resumed else {}
    record = {
        "format": FORMAT,
        "status": "running",
        "started": known.get("started") or _now(),
        "resumed": [*known.get("resumed", []), *([_now()] if resumed else [])],
        "finished": None,
        "seed": config.seed,
        "start": known.get("start") if resumed else fingerprint(model.state_dict()),
        "trainable_share": trainable_share(model),
        "recipe": {**card.recipe, "training": asdict(config)},
        "data": {**card.data, "tokens_hash": data},
        "versions": installed_versions(),
        "git": {"processive": git_state(Path(__file__).parents[1]), "working_folder": git_state(Path.cwd())},
        "machine": {"system": platform.platform(), "device": str(model.device), "engine": engine},
        "metrics": {},
    }
    _write(out, record)
    return record


def finish_record(out: Path, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Write how the run ended, and return what the model card tells of it.

    Raises:
        OutputError: the folder cannot be written.
    """
    status = "interrupted" if metrics["interrupted"] else "finished"
    record = {**record, "status": status, "finished": _now(), "metrics": metrics}
    _write(out, record)
    return {name: record[name] for name in IN_CARD}


def read_record(out: str | Path) -> dict[str, Any]:
    """Return the record of a run; empty where there is none."""
    path = Path(out) / NAME
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def describe_file(path: str | Path, **counts: int) -> dict[str, Any]:
    """Return what a model card says of a training file or token store: its name, SHA-256 and ``counts``.

    A store says the same of the files that it was made of.
    """
    path = Path(path)
    if path.is_dir():
        made_of = json.loads((path / "store.json").read_text(encoding="utf-8")).get("inputs", [])
        return {"store": path.name, "inputs": made_of, **counts}
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return {"file": path.name, "sha256": digest.hexdigest(), **counts}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that ``folder`` is under, and whether its files differ from it.

    None where there is no git, no commit, or the folder holds no file that git tracks (an installed package).
    """
    try:
        if not _git(folder, "ls-files", "--", "."):
            return None
        return {"commit": _git(folder, "rev-parse", "HEAD"), "changed": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments],
        cwd=folder,
        capture_output=True,
        check=True,
        timeout=20,
        encoding="utf-8",
        errors="replace",
    )
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(out: Path, record: dict[str, Any]) -> None:
    with replacing(out / NAME) as new:
        new.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")

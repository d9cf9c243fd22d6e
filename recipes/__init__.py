"""Recipes: one small TOML file per published system, with a size for a laptop and the size that was published."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def sizes(name: str) -> list[str]:
    """Sizes of a bundled recipe, in the order of its file."""
    return list(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))["sizes"])

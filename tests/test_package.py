"""The package as a whole: every room is declared, imports are light, every verb shows an example."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "backbones",
    "bio",
    "cells",
    "chem",
    "cli",
    "graphs",
    "inference",
    "kernels",
    "models",
    "sequences",
    "text",
    "training",
)
NOT_PACKAGED = {"tests", "benchmarks", "tutorials", "examples", "build", "dist"}
VERBS = ("train", "embed", "generate", "score", "predict", "models")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folders_with_code() -> set[str]:
    """Dotted name of every folder under the root that holds Python files of the package."""
    found = set()
    for path in ROOT.rglob("*.py"):
        parts = path.parent.relative_to(ROOT).parts
        if any(part.startswith(".") or part in NOT_PACKAGED or part.endswith(".egg-info") for part in parts):
            continue
        found.add(".".join(("processive", *parts)))
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_every_room_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    listed = setup_cfg["options"]["packages"].split()
    assert sorted(listed) == sorted(folders_with_code())
    assert all((ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file() for name in listed)


def test_import_contract_names_every_room(setup_cfg: configparser.ConfigParser) -> None:
    layers = setup_cfg["importlinter:contract:floors"]["layers"]
    named = [name.strip() for line in layers.split("\n") for name in line.split("|") if name.strip()]
    assert set(ROOMS) <= set(named)
    assert all((ROOT / name).is_dir() for name in named)


def test_every_registered_tokenizer_loads_and_knows_its_name(setup_cfg: configparser.ConfigParser) -> None:
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group="processive.tokenizers") if point.value.startswith("processive.")]
    listed = setup_cfg["options.entry_points"]["processive.tokenizers"].strip().splitlines()
    assert sorted(f"{point.name} = {point.value}" for point in points) == sorted(listed)
    for point in points:
        tokenizer = point.load()
        # A published tokenizer of text lives on the ground floor, where the formats of checkpoints find it.
        domain = "text" if point.name == "text" else point.value.split(".")[1]
        assert (tokenizer.name, tokenizer.domain) == (point.name, domain)


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_public_names_resolve(room: str) -> None:
    module = importlib.import_module(f"processive.{room}".rstrip("."))
    assert module.__doc__
    names = module.__all__
    assert names
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(module, name, None) is not None, name


def test_import_is_light() -> None:
    heavy = ["torch", "numpy", "rdkit", "scanpy", "anndata", "torch_geometric", "Bio", "pandas"]
    done = run("-c", f"import processive, processive.cli, sys; print([n for n in {heavy} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_import_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import processive; print(time.perf_counter() - start)"
    assert min(float(run("-c", code).stdout) for _ in range(3)) < 0.3


def test_rooms_import_without_the_optional_packages() -> None:
    absent = [
        "rdkit",
        "scanpy",
        "anndata",
        "torch_geometric",
        "Bio",
        "esm",
        "pandas",
        "pyarrow",
        "sklearn",
        "matplotlib",
    ]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # None in sys.modules makes an import fail
        f"for room in {ROOMS}: importlib.import_module(f'processive.{{room}}')"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from processive.cli import main

    assert main([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: processive {verb} " in shown


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    from processive.cli import main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)

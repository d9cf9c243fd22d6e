"""Bad input and bad luck: one clear line, a non-zero exit, nothing lost, nothing left lying about."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processive import bio, cells, chem
from processive.cli import main
from processive.training import read_recipe

COMMAND = [sys.executable, "-c", "import sys; from processive.cli import main; sys.exit(main())"]
SMALL = {"backbone.width": 16, "backbone.depth": 1, "backbone.heads": 2}
SMALL_OPTIONS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
SUFFIX = {"chem-xlstm": ".smi", "protein-encoder": ".fasta", "dna-xlstm": ".fasta", "cell-encoder": ".h5ad"}

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail, and return its one line; ``capfd`` also sees what C code prints."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        assert status == 1, shown
        assert shown.out == ""
        assert "Traceback" not in shown.err
        (line,) = shown.err.splitlines()
        assert line.startswith("processive: ")
        return line.removeprefix("processive: ")

    return run


def write_adata(path: Path, values: np.ndarray, genes: str = "GENE") -> Path:
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(values.astype(np.float32))
    adata.var_names = [f"{genes}{i}" for i in range(values.shape[1])]
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(1.0, (20, 40))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, counts: np.ndarray) -> Path:
    """Untrained models of every domain, each in a folder named by its recipe."""
    folder = tmp_path_factory.mktemp("models")
    training_cells = cells.read(write_adata(folder / "train.h5ad", counts))
    makers = {"chem": chem.make_tokenizer, "bio": bio.make_tokenizer, "cells": cells.make_tokenizer}
    for name in SUFFIX:
        recipe = read_recipe(name, overrides=SMALL)
        tokenizer = makers[recipe.domain](recipe.tokenizer, training_cells if recipe.domain == "cells" else [])
        recipe.build(tokenizer).save(folder / name)
    return folder


def bad_file(kind: str, folder: Path, suffix: str) -> Path:
    path = folder / f"input{suffix}"
    content = b"CCO\n" if suffix == ".smi" else b">a\nACGTACGT\n"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "blank":
        path.write_bytes(b"\n\n \n")
    elif kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif kind == "truncated gz":
        path = folder / f"input{suffix}.gz"
        path.write_bytes(gzip.compress(content * 5000)[:-40])
    return path


SAID = {
    "empty": "The file is empty.",
    "blank": "holds no",
    "directory": "This is a directory, not a file.",
    "missing": "There is no such file.",
    "binary": "This is not a",
    "truncated gz": "cut short",
}


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("recipe", SUFFIX)
@pytest.mark.parametrize("verb", ["train", "embed"])
def test_file_that_cannot_be_read(
    verb: str, recipe: str, kind: str, models: Path, tmp_path: Path, refused: Refused
) -> None:
    path = bad_file(kind, tmp_path, SUFFIX[recipe])
    before = sorted(tmp_path.iterdir())
    if verb == "train":
        line = refused("train", recipe, path, "--out", tmp_path / "run")
    else:
        line = refused("embed", models / recipe, path, "-o", tmp_path / "out.npz")
    assert str(path) in line
    said = "This is not an .h5ad" if recipe == "cell-encoder" and kind in ("blank", "truncated gz") else SAID[kind]
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["embed", "score", "generate", "predict"])
@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "no weights", "cut weights", "other kind"])
def test_model_that_cannot_be_read(kind: str, verb: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "model"
    if kind == "file":
        folder.write_text("")
    elif kind == "empty folder":
        folder.mkdir()
    elif kind in ("no weights", "cut weights", "other kind"):
        folder.mkdir()
        config = json.loads((models / "chem-xlstm" / "config.json").read_text())
        config["kind"] = "something-else" if kind == "other kind" else config["kind"]
        (folder / "config.json").write_text(json.dumps(config))
        if kind == "cut weights":
            weights = (models / "chem-xlstm" / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "in.smi").write_text("CCO\n")
    given = ["-n", 1] if verb == "generate" else [tmp_path / "in.smi"]
    line = refused(verb, folder, *given, "-o", tmp_path / "out.csv")
    assert str(folder) in line
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (">a\nMKV\n>b\n>c\nMKL\n", "record 2 (b): The sequence is empty."),
        (">a\nMKV\n>b\n\n", "record 2 (b): The sequence is empty."),
        (">a\nMKV\n>b\nMK1L\n", "record 2 (b), position 3: '1' is not an amino acid."),
        (">a\nMKV\nJJ\n", "record 1 (a), position 4: 'J'"),
        ("MKV\n", "not FASTA"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "embed", "score"])
def test_fasta_with_a_bad_record(
    verb: str, records: str, said: str, models: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(records)
    model = models / "protein-encoder"
    given = {
        "train": ["train", "protein-encoder", path, "--out", tmp_path / "run"],
        "embed": ["embed", model, path, "-o", tmp_path / "out.npz"],
        "score": ["score", model, path, "-o", tmp_path / "out.csv"],
    }[verb]
    line = refused(*given)
    assert said in line
    assert str(path) in line
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


def broken_smiles(path: Path) -> list[int]:
    """Write 300 molecules, 1% of them broken; return the line numbers of these."""
    lines = [f"{'C' * (1 + i % 9)}O mol{i}" for i in range(300)]
    for index, text in ((99, "C1CC bad"), (199, "C(C bad"), (299, "c1cccc1 bad")):
        lines[index] = text
    path.write_text("\n".join(lines) + "\n")
    return [100, 200, 300]


@pytest.mark.parametrize("verb", ["train", "embed", "score"])
def test_smiles_with_broken_lines_stop_by_default(verb: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "in.smi"
    broken_smiles(path)
    output = ["--out", tmp_path / "run"] if verb == "train" else ["-o", tmp_path / "out.csv"]
    line = refused(verb, "chem-xlstm" if verb == "train" else models / "chem-xlstm", path, *output)
    assert f"{path}, record 100 (bad)" in line
    assert "2 more of 300 records cannot be used" in line
    assert "--on-error skip" in line
    assert [p.name for p in tmp_path.iterdir()] == ["in.smi"]


@pytest.mark.parametrize("verb", ["train", "embed", "score"])
def test_smiles_with_broken_lines_skipped(
    verb: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.smi"
    broken = broken_smiles(path)
    output = (
        ["--out", tmp_path / "run", "--steps", 2, *SMALL_OPTIONS] if verb == "train" else ["-o", tmp_path / "out.csv"]
    )
    given = [verb, "chem-xlstm" if verb == "train" else models / "chem-xlstm", path, *output, "--on-error", "skip"]
    assert main([str(argument) for argument in given]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("processive:")]
    assert "3 of 300 records cannot be used (records 100, 200, 300)" in line
    if verb == "train":
        card = json.loads((tmp_path / "run" / "config.json").read_text())["card"]
        assert (card["data"]["records"], card["data"]["unusable"]) == (300, 3)
    else:
        rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
        assert len(rows) == 300
        assert [number for number, row in enumerate(rows, 1) if row.endswith(",NaN")] == broken
        assert [number for number, row in enumerate(rows, 1) if ",ok," not in row] == broken


def test_nothing_usable(models: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "in.smi").write_text("not a molecule\nneither\n")
    arguments = ("embed", models / "chem-xlstm", tmp_path / "in.smi", "-o", tmp_path / "out.npz")
    assert "no usable record" in refused(*arguments, "--on-error", "skip")


@pytest.mark.parametrize("verb", ["train", "embed"])
def test_scaled_cells(verb: str, counts: np.ndarray, models: Path, tmp_path: Path, refused: Refused) -> None:
    scaled = (counts - counts.mean(0)) / (counts.std(0) + 1e-9)
    path = write_adata(tmp_path / "scaled.h5ad", scaled)
    arguments = {
        "train": ("train", "cell-encoder", path, "--out", tmp_path / "run"),
        "embed": ("embed", models / "cell-encoder", path, "-o", tmp_path / "out.h5ad"),
    }
    assert "scaled" in refused(*arguments[verb])
    assert [p.name for p in tmp_path.iterdir()] == ["scaled.h5ad"]


def test_unknown_genes(counts: np.ndarray, models: Path, tmp_path: Path, refused: Refused) -> None:
    path = write_adata(tmp_path / "other.h5ad", counts, genes="Unheard")
    line = refused("embed", models / "cell-encoder", path, "-o", tmp_path / "out.h5ad")
    assert "gene" in line
    assert [p.name for p in tmp_path.iterdir()] == ["other.h5ad"]


@pytest.mark.parametrize("verb", ["train", "embed", "score", "generate"])
def test_file_in_place_of_the_output_folder(verb: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "in.smi").write_text("CCO\n")
    given = {
        "train": ["train", "chem-xlstm", tmp_path / "in.smi", "--out", tmp_path / "taken" / "run"],
        "embed": ["embed", models / "chem-xlstm", tmp_path / "in.smi", "-o", tmp_path / "taken" / "out.npz"],
        "score": ["score", models / "chem-xlstm", tmp_path / "in.smi", "-o", tmp_path / "taken" / "out.csv"],
        "generate": ["generate", models / "chem-xlstm", "-n", 2, "-o", tmp_path / "taken" / "out.smi"],
    }[verb]
    assert "cannot be written" in refused(*given)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk with the given options; skipped where that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("verb", ["train", "embed", "generate"])
def test_read_only_output_folder(
    verb: str, models: Path, tmp_path: Path, small_disk: Callable[[str], Path], refused: Refused
) -> None:
    disk = small_disk("ro")
    (tmp_path / "in.smi").write_text("CCO\n")
    given = {
        "train": ["train", "chem-xlstm", tmp_path / "in.smi", "--out", disk / "run"],
        "embed": ["embed", models / "chem-xlstm", tmp_path / "in.smi", "-o", disk / "out.npz"],
        "generate": ["generate", models / "chem-xlstm", "-n", 2, "-o", disk / "out.smi"],
    }[verb]
    line = refused(*given)
    assert str(disk) in line
    assert "cannot be written" in line


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet", ".h5ad"])
def test_full_disk_keeps_the_earlier_output(
    suffix: str, models: Path, tmp_path: Path, small_disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=48k")
    out = disk / f"out{suffix}"
    out.write_text("the earlier result")
    (tmp_path / "in.smi").write_text("\n".join(f"{'C' * (1 + i % 30)}O{'C' * (i // 30)}" for i in range(1200)))
    assert main(["embed", str(models / "chem-xlstm"), str(tmp_path / "in.smi"), "-o", str(out)]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("processive:")]
    assert f"{out} cannot be written: the disk is full" in line
    assert out.read_text() == "the earlier result"
    assert [p.name for p in disk.iterdir()] == [out.name]


def test_full_disk_in_training_keeps_the_last_checkpoint(
    tmp_path: Path, small_disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=1000k")
    (tmp_path / "in.smi").write_text("\n".join(f"{'C' * (1 + i % 30)}O" for i in range(200)))
    small = ["--set", "backbone.width=48", "--set", "backbone.depth=1", "--set", "backbone.heads=2"]
    train = ["train", "chem-xlstm", str(tmp_path / "in.smi"), "--out", str(disk / "run"), "--steps", "6", *small]
    train += ["--set", "training.checkpoint_every=2", "--set", "training.log_every=1"]
    status = main(train)
    shown = capfd.readouterr().err
    assert status == 1, shown
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("processive:")]
    assert "disk is full" in line or "No space left" in line
    kept = json.loads((disk / "run" / "checkpoint" / "run.json").read_text())
    assert kept["standing"]["step"] == 2
    assert {p.name for p in (disk / "run").iterdir()} == {"checkpoint", "metrics.jsonl", "record.json"}
    subprocess.run(["mount", "-o", "remount,size=9000k", str(disk)], check=True)
    assert main([*train, "--resume"]) == 0
    assert (disk / "run" / "model.safetensors").is_file()


def interrupted(arguments: list[str], out: Path, *, after: int) -> str:
    """Start the command, press Ctrl-C when it has logged more than ``after`` steps, and return its stderr."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(900):
            logged = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").is_file() else 0
            if process.poll() is not None or logged > after:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    return stderr


def test_ctrl_c_in_training_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "in.smi").write_text("\n".join(f"{'C' * (1 + i % 30)}O" for i in range(500)))
    out = tmp_path / "run"
    train = ["train", "chem-xlstm", str(tmp_path / "in.smi"), "--out", str(out), *SMALL_OPTIONS, "--steps", "100000"]
    train += ["--set", "training.log_every=1", "--set", "training.batch_tokens=256"]
    stderr = interrupted(train, out, after=0)
    step = json.loads((out / "checkpoint" / "run.json").read_text())["standing"]["step"]
    (line,) = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("processive:")]
    assert line.startswith(f"processive: Training stopped at step {step}; ")
    assert "--resume" in line
    assert step >= 1
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "metrics.jsonl", "record.json"]
    interrupted([*train, "--resume"], out, after=step + 1)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > step


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "processive: Interrupted.\n"),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "processive: Unexpected ZeroDivisionError: by zero. Run again with --debug to see where it comes from.\n",
        ),
    ],
)
def test_what_nobody_foresaw_in_a_verb(
    error: BaseException,
    status: int,
    said: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def embed(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(chem, "embed", embed)
    (tmp_path / "in.smi").write_text("CCO\n")
    assert (
        main(["embed", str(models / "chem-xlstm"), str(tmp_path / "in.smi"), "-o", str(tmp_path / "o.npz")]) == status
    )
    assert capfd.readouterr().err == said
    assert [p.name for p in tmp_path.iterdir()] == ["in.smi"]


def test_wrong_suffix_is_refused_before_any_work(tmp_path: Path, refused: Refused) -> None:
    line = refused("embed", tmp_path / "no-model", tmp_path / "no-input", "-o", tmp_path / "out.xlsx")
    assert ".npz, .h5ad, .csv, .tsv, .parquet" in line

"""Tiny models of every domain, trained once by the command itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processive.cli import main

SMALL = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--steps", "3"]

MOLECULES = ["CCO ethanol", "c1ccccc1 benzene", "CC(=O)O acetic-acid", "CCN", "C1CCCCC1", "CC(C)C", "OCC=C", "N#CC"]
PROTEINS = {"P1": "MKTAYIAKQR", "P2": "GSHMLEDPVA", "P3": "MVLSPADKTNVKAAW"}
DNA = {"chr1": "ACGTACGTNNACGT", "chr2": "TTTTACAC"}


def fasta(records: dict[str, str]) -> str:
    return "".join(f">{name}\n{sequence}\n" for name, sequence in records.items())


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "molecules.smi").write_text("\n".join(MOLECULES) + "\n")
    (folder / "proteins.fasta").write_text(fasta(PROTEINS))
    (folder / "dna.fasta").write_text(fasta(DNA))
    return folder


@pytest.fixture(scope="session")
def cells(inputs: Path) -> Path:
    """Counts of 12 cells and 30 genes; the third cell expresses nothing."""
    anndata = pytest.importorskip("anndata")
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (12, 30)).astype(np.float32)
    counts[2] = 0
    adata = anndata.AnnData(counts)
    adata.var_names = [f"GENE{i}" for i in range(30)]
    adata.obs_names = [f"cell{i}" for i in range(12)]
    path = inputs / "cells.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def chem_model(inputs: Path, runs: Path) -> Path:
    assert main(["train", "chem-xlstm", str(inputs / "molecules.smi"), "--out", str(runs / "chem"), *SMALL]) == 0
    return runs / "chem"


@pytest.fixture(scope="session")
def protein_model(inputs: Path, runs: Path) -> Path:
    out = runs / "protein"
    assert main(["train", "protein-encoder", str(inputs / "proteins.fasta"), "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="session")
def prefix_model(inputs: Path, runs: Path) -> Path:
    assert main(["train", "xtrimopglm", str(inputs / "proteins.fasta"), "--out", str(runs / "glm"), *SMALL]) == 0
    return runs / "glm"


@pytest.fixture(scope="session")
def fill_in_model(inputs: Path, runs: Path) -> Path:
    assert main(["train", "prot-xlstm", str(inputs / "proteins.fasta"), "--out", str(runs / "fill-in"), *SMALL]) == 0
    return runs / "fill-in"


@pytest.fixture(scope="session")
def dna_model(inputs: Path, runs: Path) -> Path:
    assert main(["train", "dna-xlstm", str(inputs / "dna.fasta"), "--out", str(runs / "dna"), *SMALL]) == 0
    return runs / "dna"


@pytest.fixture(scope="session")
def cell_model(cells: Path, runs: Path) -> Path:
    assert main(["train", "cell-encoder", str(cells), "--out", str(runs / "cells"), *SMALL]) == 0
    return runs / "cells"

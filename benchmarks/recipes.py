"""Each recipe's tiny size, whole, through the command line: by torch in one process, and by DeepSpeed in two.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py [prot-xlstm geneformer ...] --data ../shared/data

The data are shared, or ship with RDKit. DeepSpeed's two processes take half a batch each, so that a step has as many
tokens. Told are the seconds of the whole command by the clock (but for those in which it was stopped from outside), the
seconds of processor that each of its processes took, the median speed, and the loss as the mean of the first and of the
last line of metrics (ten steps). The bar is 3 minutes by the clock on two free cores, and a loss that falls. Beside
other jobs the clock runs on: the processor's seconds are what two free cores need at least.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import IO

from machine import describe
from processive import bio
from processive.sequences import Record
from processive.training import read_recipe
from processive.training.metrics import read_metrics

MOST_SECONDS = 180
ENGINES = {"plain": [], "deepspeed": ["--engine", "deepspeed", "--processes", "2"]}
RECIPES = ("prot-xlstm", "dna-xlstm", "chem-xlstm", "generator", "xtrimopglm", "prollama", "geneformer")
FAMILIES = {  # superfamilies as InterPro names them, of which prollama's instructions ask
    "BLAT_ECOLX.a2m": "Beta-lactamase/transpeptidase-like superfamily",
    "1a3a_1_A.a3m": "Phosphotransferase/anion transporter superfamily",
}
HOMOLOGS = 500  # of each
SKIPPED = {"chem-xlstm": ["--on-error", "skip"]}  # eight records of NCI's are no molecules


def inputs(recipe: str, data: Path, work: Path) -> Path:
    """Return the file that a recipe is trained on."""
    if recipe == "chem-xlstm":
        from rdkit import RDConfig

        return Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    if recipe == "prollama":
        return instructions(data / "bio" / "msa", work / "instructions.jsonl")
    files = {
        "dna-xlstm": "bio/dna/phage_sft_genomes_phix174_variants.fna",
        "generator": "bio/dna/HighlyExpressedGenes.txt",
        "geneformer": "cells/pbmc68k_reduced.h5ad",
    }
    return data / files.get(recipe, "bio/protein/QUERY.fasta")


def instructions(alignments: Path, path: Path) -> Path:
    """Write the homologs of two superfamilies, without their gaps, as instructions."""
    records, of = [], {}
    for file, family in FAMILIES.items():
        for number, record in enumerate(bio.read(alignments / file, "protein").usable[:HOMOLOGS]):
            records.append(Record(record.text.replace("-", "").replace(".", "").upper(), f"{file}_{number}"))
            of[records[-1].name] = family
    bio.write_instructions(path, records, of)
    return path


def run(command: Sequence[str], said: IO[str]) -> tuple[int, float]:
    """Run a command; return its status and its seconds.

    Where a look that should come ten times a second comes late by more than a second, this process was stopped, and so
    was the command.
    """
    process, seconds, before = subprocess.Popen(command, stdout=said, stderr=said), 0.0, time.perf_counter()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.perf_counter()
        seconds += now - before if now - before < 1.1 else 0.1
        before = now
    return process.returncode, seconds


def processors() -> float:
    """Seconds of processor that the processes started here and waited for have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(recipe: str, engine: str, path: Path, out: Path) -> str:
    """Train; return a line of the table.

    Raises:
        SystemExit: the command failed; what it said is shown.
    """
    config = read_recipe(recipe).training
    assert config is not None
    halves = ["--set", "training.accumulation=2", "--set", f"training.batch_tokens={config.batch_tokens // 2}"]
    command = [sys.executable, "-m", "processive.cli", "train", recipe, str(path), "--out", str(out)]
    command += [*SKIPPED.get(recipe, []), *ENGINES[engine], *(halves if engine == "deepspeed" else [])]
    used = processors()
    with tempfile.TemporaryFile("w+") as said:
        status, took = run(command, said)
        if status:
            said.seek(0)
            raise SystemExit(f"{recipe} by {engine}: status {status}\n{said.read()[-4000:]}")
    used = (processors() - used) / (2 if engine == "deepspeed" else 1)
    lines = read_metrics(out)
    first, last = lines[0]["loss"], lines[-1]["loss"]
    met = "yes" if took <= MOST_SECONDS and last < first else "**no**"
    speed = median(line["tokens_per_second"] for line in lines)
    shown = (recipe, engine, lines[-1]["step"], f"{took:.0f}", f"{used:.0f}", f"{first:.3f}", f"{last:.3f}")
    return f"| {' | '.join(map(str, shown))} | {speed:,.0f} | {met} |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []], default=list(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    options = parser.parse_args(arguments)
    print(describe("deepspeed"))
    print("\n| recipe | engine | steps | clock, s | processor, s | first loss | last loss | tokens/s | met |")
    print("|---" * 9 + "|")
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            path = inputs(recipe, options.data, Path(folder))
            for engine in options.engines:
                print(measure(recipe, engine, path, Path(folder) / engine), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

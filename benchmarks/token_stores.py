"""Tokenizing files against the tokenizer's own speed.

    python benchmarks/token_stores.py [--workers 2] [--megabytes 50]

The tokenizer's own speed is that of ``encode`` on strings in memory, in one process; the file's is that of a whole
``processive tokenize``, measured twice: without and with the seconds in which worker processes start. It needs
a machine without other work. The target is 60% of own speed times workers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from machine import describe
from processive import bio, chem
from processive.sequences import tokenize_files, tokenizer_from_dict

LETTERS = {"protein": "ACDEFGHIKLMNPQRSTVWY", "dna": "ACGT"}
LENGTHS = {"protein": 350, "dna": 10_000}
SMILES = ["CC1(C)CCCN(C(=O)c2ncc(C#Cc3ccccc3)cn2)C1", "O=C(Oc1ccc2c(c1)C1CN(C(=O)C3CCCCC3)CC(=O)N1CC2)C1CCC2(CC1)OO"]


def texts(name: str, letters: int) -> list[str]:
    """Random sequences, or two molecules over and over, of about so many letters together."""
    if name == "smiles":
        return SMILES * (letters // sum(map(len, SMILES)))
    rng = np.random.default_rng(0)
    alphabet = np.frombuffer(LETTERS[name].encode(), np.uint8)
    length = LENGTHS[name]
    return [alphabet[rng.integers(0, len(alphabet), length)].tobytes().decode() for _ in range(letters // length)]


def write(path: Path, records: list[str], *, fasta: bool) -> None:
    """Write FASTA of 60 letters to a line, or a list of SMILES."""
    with path.open("w") as file:
        for number, text in enumerate(records):
            lines = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
            file.write(f">record_{number}\n{lines}\n" if fasta else f"{text}\tmolecule_{number}\n")


def main() -> None:
    """Print one line for each tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=50)
    options = parser.parse_args()
    print(describe())
    for name, domain in (("smiles", chem), ("protein", bio), ("dna", bio)):
        tokenizer = tokenizer_from_dict({"name": name})
        records = texts(name, options.megabytes * 10**6)
        some = records[: max(1, len(records) // 5)]
        before = time.process_time()
        for record in some:
            tokenizer.encode(record)
        own = sum(map(len, some)) / (time.process_time() - before) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            small, whole = Path(folder) / f"small.{name}.txt", Path(folder) / f"whole.{name}.txt"
            write(small, records[:1000], fasta=name != "smiles")
            write(whole, records, fasta=name != "smiles")
            spent = []
            for path in (small, whole):
                began = time.perf_counter()
                source = {path.name: partial(domain.chunks, path, tokenizer)}
                tokenize_files(source, tokenizer, path.with_suffix(".store"), workers=options.workers)
                spent.append(time.perf_counter() - began)
        letters = sum(map(len, records)) / 1e6
        wall, started = letters / spent[1], letters / (spent[1] - spent[0])
        print(
            f"{name}: encode {own:.1f} M letters/s; file with {options.workers} workers {wall:.1f}, without start "
            f"{started:.1f}: {started / own / options.workers:.0%} of own speed times workers"
        )


if __name__ == "__main__":
    main()

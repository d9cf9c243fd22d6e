"""Training from a token store larger than memory: resident memory, and the time that planning an epoch takes.

    OMP_NUM_THREADS=1 python benchmarks/streaming.py [--gigabytes 5] [--length 100] [--steps 100]

A store of random DNA, one byte a token, is written in pieces. Then two processes train the same small model for as many
steps: one on a few sequences in memory, for what the model and its batches need, one on the store, whose shuffled
batches come from all over the file. What the second has above the first is what the data costs; the bar is 1 GB.
``anonymous`` memory is what a process has for itself (``RssAnon``); pages of mapped files (``RssFile``) belong to the
system's cache, which takes them back when it needs to. Where ``/proc`` is absent only the peak is told.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FIELDS = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "files"}
STATUS = Path("/proc/self/status")
MOST_GIGABYTES = 1.0
WRITTEN = 10**7  # tokens made at a time


def memory() -> dict[str, float]:
    """Resident memory of this process in megabytes (10^6 bytes)."""
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 / 1e6 for field, name in FIELDS.items()}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Look at the memory fifty times a second; the mapping holds the most of each kind."""
    most, done = memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in memory().items():
                most[name] = max(most[name], value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def write(folder: Path, gigabytes: float, length: int) -> None:
    """Write a store of sequences of ``length`` random bases."""
    import numpy as np
    from processive.bio.tokenizer import DNATokenizer
    from processive.sequences.store import StoreWriter

    vocabulary = DNATokenizer().vocabulary
    bases = np.array([vocabulary.ids[base] for base in "ACGT"], np.uint8)
    rng = np.random.default_rng(0)
    folder.mkdir()
    at_once = max(WRITTEN // length, 1)
    with StoreWriter(folder, len(vocabulary)) as writer:
        while writer.tokens < gigabytes * 1e9:
            writer.append(bases[rng.integers(0, 4, at_once * length, np.uint8)], [length] * at_once)
        writer.finish({})


def train(store: str, options: argparse.Namespace) -> dict[str, float]:
    """Train in this process on a store, or without one on a few sequences."""
    import numpy as np
    import torch
    from processive.backbones import XLSTMConfig
    from processive.bio.tokenizer import DNATokenizer
    from processive.models import LanguageModel
    from processive.sequences import TokenStore
    from processive.training import TrainingConfig
    from processive.training import train as run
    from processive.training.data import Pieces

    torch.manual_seed(0)
    tokenizer = DNATokenizer()
    model = LanguageModel(tokenizer, XLSTMConfig(len(tokenizer.vocabulary), 64, 2, heads=2))
    config = TrainingConfig(steps=options.steps, batch_tokens=options.batch_tokens, checkpoint_every=options.steps)
    found: dict[str, float] = {}
    with watched() as most, tempfile.TemporaryDirectory() as out:
        sequences = TokenStore(store) if store else [np.full(options.length, 5)] * (options.batch_tokens // 20)
        before = time.perf_counter()
        pieces = Pieces(sequences)
        lengths = time.perf_counter()
        batches = pieces.batches(batch_tokens=config.batch_tokens, seed=0, epoch=0)
        found |= {"read lengths": lengths - before, "plan an epoch": time.perf_counter() - lengths}
        found["filled"] = float(pieces.lengths.sum(dtype=np.int64)) / (len(batches) * config.batch_tokens)
        before = time.perf_counter()
        pieces.fingerprint()
        found["fingerprint"] = time.perf_counter() - before
        batches = pieces.batches(batch_tokens=config.batch_tokens, seed=0, epoch=1)  # as where one epoch meets the next
        if store:
            some = range(0, len(batches), -(-len(batches) // 1000))
            before = time.perf_counter()
            for number in some:
                pieces.batch(batches[number], vocabulary_size=len(tokenizer.vocabulary))
            found["read a batch"] = (time.perf_counter() - before) / len(some)
        del pieces, batches
        before = time.perf_counter()
        run(model, sequences, config, out=out, progress=False)
        found["run"] = time.perf_counter() - before
    return found | most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--length", type=int, default=100, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where the store is written, and removed again")
    parser.add_argument("--one", metavar="STORE", help="one measurement; an empty name: without a store")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(train(options.one, options)))
        return
    from machine import describe

    print(describe())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Path(folder) / "store"
        before = time.perf_counter()
        write(store, options.gigabytes, options.length)
        print(
            f"{options.gigabytes:g} GB of sequences of {options.length}: {time.perf_counter() - before:.0f} s to write"
        )
        runs = []
        for name in ("", str(store)):
            settings = ["--length", str(options.length), "--steps", str(options.steps)]
            settings += ["--batch-tokens", str(options.batch_tokens)]
            command = [sys.executable, __file__, "--one", name, *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    few, many = runs
    print(
        f"planning: lengths {many['read lengths']:.1f} s, an epoch's order and batches {many['plan an epoch']:.1f} s "
        f"({many['filled']:.1%} filled), fingerprint {many['fingerprint']:.1f} s; "
        f"a batch from the file {many['read a batch'] * 1e3:.2f} ms; {options.steps} steps {many['run']:.0f} s"
    )
    print("| MB | a few sequences | the store | above |")
    print("|---|---|---|---|")
    for name in ("peak", "anonymous", "files"):
        if name in few:
            print(f"| {name} | {few[name]:.0f} | {many[name]:.0f} | {many[name] - few[name]:.0f} |")
    above = (many["peak"] - few["peak"]) / 1e3
    print(f"{above:.2f} GB above the model's, {'within' if above < MOST_GIGABYTES else 'SHORT OF'} the bar of 1 GB")


if __name__ == "__main__":
    main()

"""A DNA xLSTM over a chromosome's length: peak memory, and time per base against a shorter sequence.

    OMP_NUM_THREADS=2 python benchmarks/long_dna.py

Each measurement is a process of its own, so that its peak (VmHWM) is its own. The processes take turns, and of each
length the least time counts. What another program takes from the processor lengthens the wall-clock time alone, so the
processor's time is told too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (50_000, 1_000_000)
MOST_MEGABYTES, MOST_RATIO = 1500, 1.1
MODELS: dict[str, dict[str, Any]] = {  # of the recipe dna-xlstm, both at width 256
    "mLSTM, width 256, 4 blocks": {"size": "tiny", "overrides": {"backbone.width": 256}},
    "sLSTM, width 256, 4 blocks": {"size": "published", "overrides": {}},
}


def measure(model: str, length: int, pooling: str, batch_tokens: int) -> dict[str, float]:
    """Embed one random sequence in this process."""
    import numpy as np
    import torch
    from processive.bio.tokenizer import DNATokenizer
    from processive.inference import embed
    from processive.training import read_recipe

    network = read_recipe("dna-xlstm", **MODELS[model]).build(DNATokenizer())
    bases = np.array(list("ACGT"))[np.random.default_rng(0).integers(0, 4, length)]
    sequence = "".join(bases.tolist())
    del bases
    embed(network, [sequence[:2000]])  # what is done once
    before = memory("VmHWM")
    wall, processor = time.perf_counter(), time.process_time()
    rows = embed(network, [sequence], pooling=pooling, batch_tokens=batch_tokens)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = memory("VmHWM")
    assert all(np.isfinite(row).all() for row in np.asarray(rows[0]).reshape(-1, 256))
    return {
        "wall": wall,
        "processor": processor,
        "megabytes": peak,
        "before": before,
        "threads": torch.get_num_threads(),
    }


def memory(field: str) -> float:
    """Peak resident memory of this process in megabytes (10^6 bytes)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def long_dna(models: list[str], *, rounds: int = 3, pooling: str = "mean", batch_tokens: int = 8192) -> list[str]:
    """Measure in processes that take turns; return the lines of a Markdown table."""
    head = ["model", "pooling", "bases", "peak MB", "µs per base", "processor µs per base", "ratio to the shorter"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model in models:
        found: dict[int, list[dict[str, float]]] = {length: [] for length in LENGTHS}
        for _ in range(rounds):
            for length in LENGTHS:
                asked = ["--one", model, str(length), pooling, str(batch_tokens)]
                run = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True, check=True)
                found[length].append(json.loads(run.stdout.splitlines()[-1]))
        least = {
            length: [min(run[clock] for run in runs) / length * 1e6 for clock in ("wall", "processor")]
            for length, runs in found.items()
        }
        for length, runs in found.items():
            peak = max(run["megabytes"] for run in runs)
            wall, processor = least[length]
            ratios = " / ".join(f"{a / b:.3f}" for a, b in zip(least[length], least[LENGTHS[0]], strict=True))
            lines.append(f"| {model} | {pooling} | {length:,} | {peak:.0f} | {wall:.2f} | {processor:.2f} | {ratios} |")
            if peak > MOST_MEGABYTES or wall / least[LENGTHS[0]][0] > MOST_RATIO:
                lines[-1] += " **short of the aim**"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pooling", default="mean", choices=("mean", "last", "tokens"))
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--one", nargs=4, metavar=("MODEL", "LENGTH", "POOLING", "BATCH_TOKENS"), help="one measurement"
    )
    options = parser.parse_args()
    if options.one:
        model, length, pooling, batch_tokens = options.one
        print(json.dumps(measure(model, int(length), pooling, int(batch_tokens))))
    else:
        lines = long_dna(
            options.models, rounds=options.rounds, pooling=options.pooling, batch_tokens=options.batch_tokens
        )
        print("\n".join(lines))


if __name__ == "__main__":
    main()

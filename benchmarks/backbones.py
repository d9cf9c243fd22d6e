"""Our backbones beside their peers on a CPU: the same weights, one process, the same threads, taken in turn.

    python benchmarks/backbones.py proteins.fasta                   # everything, some ten minutes
    python benchmarks/backbones.py proteins.fasta esm llama xlstm   # some of it
    python benchmarks/backbones.py proteins.fasta esm --share 0.1   # a tenth of the proteins' batches

Peers: fair-esm with its own batching, and transformers. Prints a Markdown table for benchmarks/results.md, and says on
stderr what it is doing. A ratio is the peer's time by ours, so more is better, except where the bar says "at most". The
outputs of each peer are compared with ours before it is timed.

Beside a ratio stands our floor: what the machine, as measured in the same run, could do at most. Decoding reads every
weight and every sequence's cache or memory once per token; the rest is bound by floating-point operations. The share is
what we reach of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from backbone_esm import esm_rows
from backbone_llama import llama_rows
from backbone_race import measure
from backbone_xlstm import xlstm_rows
from machine import describe
from processive.kernels import chosen_backend, keep_freed_memory

GROUPS = {"esm": esm_rows, "llama": llama_rows, "xlstm": xlstm_rows}
PARTS = ("prefill", "decode1", "decode16", "flat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proteins", type=Path, help="a FASTA file")
    parser.add_argument("groups", nargs="*", metavar="group", help=f"any of {', '.join(GROUPS)}; all if not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of llama and xlstm")
    parser.add_argument("--share", type=float, default=1, help="of the proteins' batches")
    parser.add_argument("--limit", type=float, default=30, help="seconds after which a race begins no other round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(describe("fair-esm", "transformers", "xlstm", "numpy"))
    machine = measure()
    peaks = ", ".join(
        f"{str(dtype).split('.')[1]} {flop / 1e9:.0f} GFLOP/s" for dtype, flop in machine.products.items()
    )
    print(f"Measured: reading {machine.reading / 1e9:.1f} GB/s, products {peaks}.")
    backends = [f"{kernel} {chosen_backend(kernel)}" for kernel in ("mlstm", "attention", "linear", "decoding")]
    print(f"Backends in float32: {', '.join(backends)}.\n")
    print("| what | ours | peer | ratio | bar | met | floor | share |\n|---|---|---|---|---|---|---|---|", flush=True)
    for group in arguments.groups or GROUPS:
        print(f"{group} ...", file=sys.stderr)
        for line in GROUPS[group](machine, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()

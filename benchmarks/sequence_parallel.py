"""One long sequence in one process and shared by several: memory of each process, and time, of a step of training.

    OMP_NUM_THREADS=1 python benchmarks/sequence_parallel.py --tokens 16384 --processes 1 2

Every measurement is processes of their own. On CPUs they talk over gloo, and memory is what the resident set grows by
at its peak (VmHWM, Linux); where there are as many GPUs, over NCCL, and it is what torch has allocated at the peak.
Forward and backward of the sum of the hidden states; of several passes the least time counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ("mlstm", "mlstm-7b", "slstm", "transformer")
MEGABYTE = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # model, rank, processes, file to meet at
    options = parser.parse_args()
    if options.one:
        model, rank, processes, meeting = options.one
        print(json.dumps(measure(options, model, int(rank), int(processes), meeting)))
        return
    import torch
    from machine import describe

    print(describe(), torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    print(
        f"{options.tokens} tokens in one sequence, width {options.width}, depth {options.depth}, {options.heads} heads"
    )
    print(f"{'model':12} {'processes':>9} {'MB each':>9} {'share':>6} {'seconds':>8} {'times as fast':>14}")
    for model in options.models:
        first: dict[str, float] = {}
        for processes in options.processes:
            found = run(model, processes)
            first = first or found
            share, speed = found["megabytes"] / first["megabytes"], first["seconds"] / found["seconds"]
            row = f"{found['megabytes']:9.1f} {share:6.2f} {found['seconds']:8.3f} {speed:14.2f}"
            print(f"{model:12} {processes:9} {row}", flush=True)


def run(model: str, processes: int) -> dict[str, float]:
    """Measure in so many processes; the largest memory, and the longest time."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, __file__, *sys.argv[1:], "--one", model]
        commands = [[*call, str(rank), str(processes), f"{folder}/meeting"] for rank in range(processes)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("A process failed; what it said stands above.")
    rows: list[dict[str, float]] = [json.loads(text.splitlines()[-1]) for text in said]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def measure(options: argparse.Namespace, name: str, rank: int, processes: int, meeting: str) -> dict[str, float]:
    """Forward and backward in this process, which is number ``rank``."""
    import torch
    import torch.distributed as dist
    from processive.backbones import TransformerConfig, XLSTMConfig, build
    from processive.sequences import PackedBatch, share_batch

    gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    store = dist.FileStore(meeting, processes)
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=processes)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocabulary_size": 32, "width": options.width, "depth": options.depth}
    if name == "transformer":
        network = build(TransformerConfig(**sizes, heads=options.heads))
    else:
        network = build(XLSTMConfig(**sizes, heads=options.heads, blocks=name))
    network = network.to(device)
    whole = PackedBatch.from_sequences([torch.randint(32, (options.tokens,))]).to(device)
    small = PackedBatch.from_sequences([torch.randint(32, (64,))]).to(device)

    def step(batch: PackedBatch) -> None:
        network(batch)[0].sum().backward()
        if gpus:
            torch.cuda.synchronize()

    step(share_batch(small))  # what is done once
    before = memory(gpus, "VmRSS")
    batch, seconds = share_batch(whole), []
    for _ in range(options.passes):
        dist.barrier()
        begin = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - begin)
    peak = memory(gpus, "VmHWM")
    dist.destroy_process_group()
    return {"megabytes": peak - before, "seconds": min(seconds)}


def memory(gpus: bool, field: str) -> float:
    """Memory of this process in megabytes (10^6 bytes): now, VmRSS, or at its peak, VmHWM."""
    import torch

    if gpus:
        found = torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
        return found / MEGABYTE
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / MEGABYTE


if __name__ == "__main__":
    main()

"""The processes of a run: who this one is, how it meets the others, and how local ones are started.

``torchrun``, ``deepspeed`` and ``launch`` tell each process who it is by environment variables (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A process without them, such as a notebook's, is alone.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from types import FrameType
from typing import IO, Any

import torch
import torch.distributed as dist

from ...errors import ConfigError

NEEDED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GRACE = 10.0
INTERRUPTED = 130  # the status of a process that was asked to stop, as all are then
PATIENCE = timedelta(hours=2)  # for rank 0, which writes a large checkpoint alone


def launched() -> bool:
    """Whether a launcher has started this process as one of several, or told it that it is alone."""
    return "RANK" in os.environ


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Meet the other processes, once in the life of this one: over gloo on CPUs, NCCL on GPUs.

    Raises:
        ConfigError: the launcher's variables are incomplete, or the model of this process is on another's GPU.
    """
    if launched():
        absent = [name for name in NEEDED if name not in os.environ]
        if absent:
            raise ConfigError(
                f"RANK is set and {absent[0]} is not. Start the processes with torchrun, or unset RANK to train in one."
            )
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed reads it
    if device.type == "cuda":
        if launched() and device.index != local:
            raise ConfigError(f"The model of local rank {local} is on {device}; move it: model.to('cuda:{local}').")
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launched():
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command line with ``arguments`` in ``processes`` local processes; return the first status that is not 0.

    What the first one says is shown, and what another one says if it is the first to fail. Ctrl-C and SIGTERM are
    handed on to each of them once, and they have all the time they need to write a checkpoint then; after a failure
    the others have ``GRACE`` seconds.
    """
    command = [sys.executable, "-m", "processive.cli", *arguments]
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        children: list[subprocess.Popen[bytes]] = []

        def hand_on(number: int, frame: FrameType | None) -> None:
            for child in children:
                child.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for environment in environments(processes):
                shown: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said[len(children) - 1]}
                children.append(
                    subprocess.Popen(command, env=environment, start_new_session=True, **(shown if children else {}))
                )
            return _wait(children, said)
        finally:
            for child in children:
                child.kill()
                child.wait()
            for number, old in before.items():
                signal.signal(number, signal.SIG_DFL if old is None else old)


def environments(processes: int) -> list[dict[str, str]]:
    """Environment variables of ``processes`` local processes that are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        {**shared, "WORLD_SIZE": str(processes), "RANK": str(number), "LOCAL_RANK": str(number)}
        for number in range(processes)
    ]


def _wait(children: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[bytes]]) -> int:
    """Wait for all, after the first that fails not long; show what it said."""
    while not any(child.poll() for child in children):
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(0.05)
    first = next(number for number, child in enumerate(children) if child.poll())
    status = children[first].poll() or 1
    until = float("inf") if status == INTERRUPTED else time.monotonic() + GRACE
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(0.05)
    if first > 0 and status != INTERRUPTED:
        said[first - 1].seek(0)
        text = said[first - 1].read().decode(errors="replace")
        sys.stderr.write(f"processive: process {first + 1} of {len(children)} failed. {text[-4000:]}\n")
    return status if status > 0 else 128 - status

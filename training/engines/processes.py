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
from typing import IO

import torch
import torch.distributed as dist

from ...errors import ConfigError

NEEDED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command line with ``arguments`` in ``processes`` local processes; return the first status that is not 0.

    What rank 0 says is shown, and what another one says if it is the first to fail; the others are stopped then. Ctrl-C
    reaches all of them from the terminal; SIGTERM is handed on.
    """
    command = [sys.executable, "-m", "processive.cli", *arguments]
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        children = _start(command, said, processes)

        def hand_on(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGTERM:
                for child in children:
                    child.terminate()

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _wait(children, said)
        finally:
            for child in children:
                child.kill()
                child.wait()
            for number, old in before.items():
                signal.signal(number, signal.SIG_DFL if old is None else old)


def _start(command: Sequence[str], said: Sequence[IO[bytes]], processes: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    children = []
    for number in range(processes):
        own = {**shared, "RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": threads}
        quiet = {} if number == 0 else {"stdout": subprocess.DEVNULL, "stderr": said[number - 1]}
        children.append(subprocess.Popen(command, env={**os.environ, **own}, **quiet))  # type: ignore[call-overload]
    return children


def _wait(children: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[bytes]]) -> int:
    """Wait for all, or for the first that fails; show what it said."""
    while True:
        statuses = [child.poll() for child in children]
        failed = [number for number, status in enumerate(statuses) if status]
        if failed:
            break
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.1)
    if 0 not in failed:
        time.sleep(1)  # an error that all have in common is rank 0's to tell
        if not children[0].poll():
            said[failed[0] - 1].seek(0)
            text = said[failed[0] - 1].read().decode(errors="replace")
            sys.stderr.write(f"processive: process {failed[0]} of {len(children)} failed: {text[-2000:]}\n")
    status = statuses[failed[0]] or 1
    return status if status > 0 else 128 - status

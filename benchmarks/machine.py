"""What a benchmark ran on: printed by each, so that a number is never without its machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe(*packages: str) -> str:
    """Return processor, cores, threads and the versions of Python, torch and ``packages`` in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            cpu,
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("processive", "torch", *packages))
    hardware = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{hardware}; Python {platform.python_version()}, {versions}"

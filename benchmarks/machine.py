"""What a benchmark ran on, so that no number is without its machine, and means with their spread."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
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


def report(columns: Mapping[str, Sequence[float]]) -> None:
    """Print mean and standard deviation of each column."""
    for name, values in columns.items():
        print(f"{name:45} {summary(values)}")


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f}" + (f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

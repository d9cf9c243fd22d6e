"""A run killed at any moment leaves a readable checkpoint or none, and goes on to the same weights, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
@pytest.mark.parametrize("long", ["cut", "carry"])
def test_killed_and_resumed_equals_uninterrupted(long, tmp_path):
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, tmp_path, "15", long], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "save_file" in done.stdout and "rename" in done.stdout  # the moments of writing were among them
    assert int(done.stdout.split()[0]) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("long", ["cut", "carry"])
@pytest.mark.skipif(
    "PROCESSIVE_ALL_TESTS" not in os.environ, reason="takes two minutes each: set PROCESSIVE_ALL_TESTS=1"
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_killed_and_resumed_under_deepspeed(long, tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, tmp_path, "1", long, "deepspeed", "3"]  # 20 moments: 11 in place of 1
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "save_file" in done.stdout and "rename" in done.stdout

"""Print how much memory loading a model takes at its peak, as a share of the weights; run by test_foreign.py."""

import re
import sys
from pathlib import Path

import torch


def peak() -> int:
    """Most memory that the process has had so far, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    folder, small, dtype = sys.argv[1], sys.argv[2], None if sys.argv[3] == "None" else getattr(torch, sys.argv[3])
    import processive as pv

    pv.load(small, dtype=dtype)  # imports and allocations that are not the weights'
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    model = pv.load(folder, dtype=dtype)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    sys.stdout.write(f"{size} {(peak() - before) / size}\n")

"""``import processive`` is quick and pulls in nothing heavy; every room is within reach."""

import subprocess
import sys

import processive as pv
import pytest

TIMED = """
import sys, time
start = time.perf_counter()
import processive
print(time.perf_counter() - start)
loaded = set(sys.modules)
print(sorted(loaded & {"torch", "numpy", "rdkit", "scanpy", "torch_geometric", "Bio", "pandas"}))
print(sorted(name for name in loaded if name.startswith("processive.")))
"""


def test_import_is_light():
    times = []
    for _ in range(5):
        lines = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        times.append(float(lines[0]))
        assert lines[1] == "[]"
        assert lines[2] == "[]"
    assert min(times) < 0.3


@pytest.mark.parametrize("name", ["backbones", "errors", "inference", "kernels", "models", "sequences", "training"])
def test_rooms_are_attributes(name):
    assert getattr(pv, name).__name__ == f"processive.{name}"
    assert name in dir(pv)


def test_version_and_unknown_names():
    assert pv.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pv.nothing

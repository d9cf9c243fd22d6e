"""What the tests of the formats share: weights that count, records of unequal length, files read back."""

import json
from pathlib import Path

import pytest
import torch
from processive.sequences import PackedBatch

LENGTHS = (1, 17, 30, 8)


def perturbed(module):
    """Every parameter moved, so that what is initialised to zero or one counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


@pytest.fixture
def perturb():
    return perturbed


@pytest.fixture
def batch():
    """Sequences of tokens 5 to 39, of unequal length."""
    return PackedBatch.from_sequences([torch.randint(5, 40, (n,)) for n in LENGTHS])


def pattern(name, shape):
    """Values that follow from a tensor's name and shape: recorded outputs need no file of weights beside them."""
    start = sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 997
    size = torch.Size(shape).numel()
    return (0.2 * torch.sin(0.7 * torch.arange(size, dtype=torch.float64) + start)).reshape(shape)


@pytest.fixture
def golden():
    """Read what the authors' own code gave for weights that are a ``pattern`` of their names."""
    folder = Path(__file__).parents[1] / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def patterned():
    """Return weights of these shapes by name."""
    return lambda shapes: {name: pattern(name, shape).float() for name, shape in shapes.items()}


@pytest.fixture
def same():
    """Assert that two state dicts are equal, bit by bit."""

    def check(one, two):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name

    return check

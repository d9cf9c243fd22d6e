"""What the tests of the formats share: weights that count, records of unequal length, files read back."""

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


@pytest.fixture
def same():
    """Assert that two state dicts are equal, bit by bit."""

    def check(one, two):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name

    return check

"""Asking which implementation runs, and the checks that every kernel makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processive.errors import ConfigError, ShapeError
from processive.kernels import available_backends, chosen_backend, native
from processive.kernels.packing import collect, expect_shape, rounds, running_positions, sequence_lengths, spread


@pytest.mark.parametrize(
    "kernel", ["mlstm", "slstm", "attention", "causal_conv1d", "rotary", "linear", "block_linear", "gated_norm"]
)
def test_the_choice_can_be_asked(kernel):
    assert chosen_backend(kernel, device="cpu", dtype=torch.bfloat16) in available_backends(kernel)


def test_an_unknown_kernel_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"no kernel 'gru'.*mlstm, slstm"):
        chosen_backend("gru")


def test_shapes_are_named():
    with pytest.raises(ShapeError, match=r"k: got shape \(2, 3\), expected \(2, 4\)"):
        expect_shape("k", torch.zeros(2, 3), (2, 4))


@pytest.mark.parametrize("edges", [[1, 4], [0, 3], [0, 5, 4], []], ids=str)
def test_boundaries_must_rise_from_zero_to_the_end(edges):
    with pytest.raises(ShapeError, match="cu_seqlens"):
        sequence_lengths(torch.tensor(edges, dtype=torch.int64), 4)


def test_rounds_are_prefixes_of_each_other():
    lengths = sequence_lengths(torch.tensor([0, 2, 2, 5]), 5)
    plan = rounds(lengths)
    assert (plan.order.tolist(), plan.counts, plan.starts.tolist()) == ([2, 0, 1], [2, 2, 1], [0, 2, 4])
    assert running_positions(lengths, reverse=True).tolist() == [1, 0, 2, 1, 0]


def test_spread_and_collect_are_adjoint():
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    slot = torch.tensor([4, 0, 2])
    torch.testing.assert_close((spread(x, slot, 5) * y).sum(), (x * collect(y, slot)).sum())
    assert torch.autograd.gradcheck(lambda x: spread(x, slot, 5), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda y: collect(y, slot), y.requires_grad_())


def test_the_native_variant_can_be_named(monkeypatch):
    """The choice is kept once made; here it is made anew."""
    monkeypatch.setenv("PROCESSIVE_NATIVE", "off")
    assert native.variant.__wrapped__() is None
    monkeypatch.setenv("PROCESSIVE_NATIVE", "sse")
    with pytest.raises(ConfigError, match=r"PROCESSIVE_NATIVE is 'sse'; here it can be .*off"):
        native.variant.__wrapped__()
    if native.variant() is not None:
        monkeypatch.setenv("PROCESSIVE_NATIVE", "baseline")
        assert native.variant.__wrapped__() == "baseline"


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    folder = Path(native.__file__).parent
    if not sorted(folder.glob("_native*.so")) or not sorted(folder.glob("*.c")):
        pytest.skip("there is no library, or no sources beside it")
    for path in (*folder.glob("*.[ch]"), *folder.glob("_native*.so")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert native._library.__wrapped__() is not None
    with (tmp_path / "rows.h").open("a") as file:
        file.write("/* changed */\n")
    with pytest.raises(ConfigError, match="built from other sources"):
        native._library.__wrapped__()

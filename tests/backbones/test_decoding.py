"""Decoding natively: equal to the ordinary way and to float64, with states that stay values, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig, backbone, build, decoding
from processive.backbones.layers import Linear
from processive.errors import ConfigError
from processive.kernels import chosen_backend
from processive.sequences import PackedBatch
from torch import nn

V = 19
CONFIGS = {
    "plain": XLSTMConfig(V, 32, 2, heads=2),
    "one head, odd width, bias": XLSTMConfig(V, 20, 2, heads=1, bias=True, convolution=3, post_blocks_norm=False),
    "one tap, blocks of 3": XLSTMConfig(V, 64, 2, heads=3, bias=True, convolution=1, projection_block=3, expansion=3),
    "blocks of 8, eps": XLSTMConfig(V, 24, 1, heads=8, projection_block=8, convolution=5, norm_eps=1e-2),
    "blocks of 1, heads of 4": XLSTMConfig(V, 33, 2, heads=16, projection_block=1, expansion=1.5),
    "7b": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b"),
    "7b, odd sizes, bias, no cap": XLSTMConfig(
        V,
        21,
        2,
        heads=3,
        blocks="mlstm-7b",
        bias=True,
        gate_cap=None,
        qk_factor=1.0,
        feed_forward_width=37,
        norm_eps=1e-3,
    ),
    "norms stored minus one": XLSTMConfig(V, 32, 2, heads=2, norm_offset=True),
    "rotary over the width": XLSTMConfig(V, 32, 2, heads=4, rotary="width", norm_offset=True),
    "rotary of each head": XLSTMConfig(V, 24, 2, heads=2, rotary="head", rotary_base=9.0, bias=True),
    "rotary, one head": XLSTMConfig(V, 24, 2, heads=1, rotary="head", projection_block=1),
    "layer-wise": XLSTMConfig(V, 24, 3, heads=2, expansion=(1, 5, 2)),
    "mixed": XLSTMConfig(V, 32, 3, heads=4, blocks=("mlstm", "slstm", "mlstm")),
}
NARROW = [
    XLSTMConfig(V, 64, 3, heads=4),
    XLSTMConfig(V, 64, 3, heads=4, blocks="mlstm-7b"),
    XLSTMConfig(V, 63, 3, heads=3, blocks="mlstm-7b", qk_factor=1.0, feed_forward_width=101),  # no pairs in a row
]
needs_native = pytest.mark.skipif(chosen_backend("decoding") == "torch", reason="the native kernels are not there")


def lively(config):
    """A network with no parameter at a value that hides a mistake."""
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def narrowed(network):
    """A copy with the matrices of its linear maps in bfloat16, as ``models.load`` makes it."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.bfloat16()
    return network


def widened(network):
    """The same numbers in float64."""
    return copy.deepcopy(network).double()


def start(network, sequences, length=3):
    tokens = torch.randint(V, (sequences * length,), generator=torch.Generator().manual_seed(1))
    return network(PackedBatch.from_lengths(tokens, torch.full((sequences,), length)), return_state=True)[1]


def steps(network, state, count, **options):
    """Hidden states of ``count`` steps, and the last state."""
    generator, found = torch.Generator().manual_seed(2), []
    for _ in range(count):
        tokens = torch.randint(V, (len(state),), generator=generator)
        batch = PackedBatch.one_each(tokens, positions=state.lengths)
        hidden, state = network(batch, state, return_state=True, **options)
        found.append(hidden)
    return torch.stack(found), state


def assert_near(got, want, ratio):
    error, size = (got.double() - want.double()).square().mean().sqrt(), want.double().square().mean().sqrt()
    assert got.isfinite().all() and error <= ratio * size, f"RMS ratio {error / size:.1e}"


def true_memory(state):
    """Every tensor of a state with C and n free of their stabiliser, whose choice is free."""
    tensors = state.tensors()
    for name in [name for name in tensors if name.endswith(".C")]:
        m = tensors.pop(name[:-1] + "m").double()
        tensors[name] = tensors[name].double() * m.exp()[..., None, None]
        tensors[name[:-1] + "n"] = tensors[name[:-1] + "n"].double() * m.exp()[..., None]
    return tensors


@pytest.fixture
def calls(monkeypatch):
    """Whether each block of each later call was decoded natively."""
    seen, decode = [], decoding.decode

    def watched(*arguments, **options):
        found = decode(*arguments, **options)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(backbone, "decode", watched)
    return seen


@needs_native
@pytest.mark.parametrize("sequences", [1, 3, 20, 64])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_the_ordinary_way_and_float64(name, sequences, monkeypatch, calls):
    network = lively(CONFIGS[name])
    exact = widened(network)
    for count in (1, 2) if sequences > 3 else (1, 2, 50):
        calls.clear()
        got, last = steps(network, start(network, sequences), count)
        assert calls == [kind != "slstm" for kind in network.config.kinds] * count
        want, want_last = steps(exact, start(exact, sequences), count)
        assert_near(got, want, 1e-5)
        for key, tensor in true_memory(want_last).items():
            if tensor.numel():
                assert_near(true_memory(last)[key], tensor, 1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(backbone, "decodes", lambda *_: False)
            ordinary, ordinary_last = steps(network, start(network, sequences), count)
        assert_near(got, ordinary, 1e-5)
        assert torch.equal(last.lengths, ordinary_last.lengths)


@needs_native
@pytest.mark.parametrize("sequences", [1, 7])
@torch.no_grad()
def test_a_state_stays_as_it_is_unless_it_is_given_away(sequences):
    network = lively(CONFIGS["plain"])
    state = start(network, sequences)
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    kept, _ = steps(network, state, 5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())
    given, last = steps(network, state, 5, reuse_state=True)
    assert torch.equal(kept, given)
    assert not torch.equal(state.tensors()["blocks.0.cell.C"], before["blocks.0.cell.C"])
    assert last.blocks[0].cell.C.data_ptr() == state.blocks[0].cell.C.data_ptr()


@pytest.mark.parametrize("config", [CONFIGS["mixed"], TransformerConfig(V, 32, 1, heads=2)], ids=["xlstm", "decoder"])
def test_giving_a_state_away_needs_no_gradients(config):
    network = lively(config)
    state = start(network, 2)
    with pytest.raises(ConfigError, match="reuse_state"):
        steps(network, state, 1, reuse_state=True)
    with torch.no_grad():
        want = steps(network, state, 3)[0]
        torch.testing.assert_close(steps(network, state, 3, reuse_state=True)[0], want)


@torch.no_grad()
def test_an_empty_batch_and_sequences_without_a_token():
    network = lively(CONFIGS["plain"])
    state = start(network, 0)
    hidden, after = network(PackedBatch.from_sequences([]), state, return_state=True, reuse_state=True)
    assert hidden.shape == (0, 32) and len(after) == 0
    state = start(network, 2)
    batch = PackedBatch.from_lengths(torch.tensor([1, 2]), torch.tensor([0, 2]), offsets=state.lengths)
    hidden, after = network(batch, state, return_state=True)  # two tokens, two sequences, but not one of each
    assert torch.equal(after.blocks[1].cell.C[0], state.blocks[1].cell.C[0])


@needs_native
def test_gradients_go_the_ordinary_way(calls):
    network = lively(CONFIGS["plain"])
    hidden, _ = steps(network, start(network, 2), 1)
    hidden.sum().backward()
    assert not calls and all(p.grad is not None for p in network.blocks.parameters())


@needs_native
@torch.no_grad()
def test_what_is_not_plain_goes_the_ordinary_way(calls):
    network = lively(CONFIGS["plain"])
    state = start(network, 2)
    want = steps(network, state, 1)[0]
    assert calls == [True, True]
    handle = network.blocks[0].up.register_forward_hook(lambda module, given, out: out + 1)
    assert not torch.allclose(steps(network, state, 1)[0], want)
    handle.remove()
    up = network.blocks[1].up
    network.blocks[1].up = nn.Sequential(up, nn.Identity())
    torch.testing.assert_close(steps(network, state, 1)[0], want)
    network.blocks[1].up = up
    network.train()
    torch.testing.assert_close(steps(network, state, 1)[0], want)
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        steps(network, state, 1)
    assert calls == [True, True, False, True, True, False, False, False]
    with torch.inference_mode():
        assert torch.equal(steps(network, state, 1)[0], want)
    network.bfloat16()
    assert steps(network, state.map(lambda x: x), 1)[0].dtype == torch.bfloat16


@needs_native
@torch.no_grad()
def test_a_7b_block_that_is_not_plain_goes_the_ordinary_way(calls):
    network = lively(CONFIGS["7b"])
    state = start(network, 2)
    want = steps(network, state, 1)[0]
    for name in ("out", "feed_forward", "feed_forward.down"):
        handle = network.blocks[0].get_submodule(name).register_forward_hook(lambda module, given, out: out + 1)
        assert not torch.allclose(steps(network, state, 1)[0], want)
        handle.remove()
    feed_forward = network.blocks[1].feed_forward
    feed_forward.up = nn.Sequential(feed_forward.up)
    torch.testing.assert_close(steps(network, state, 1)[0], want)
    assert calls == [True, True, *[False, True] * 3, True, False]


@needs_native
@pytest.mark.parametrize("name", ["plain", "7b"])
@torch.no_grad()
def test_weights_that_changed_or_moved_are_read_anew(name, calls):
    network = lively(CONFIGS[name])
    state = start(network, 3)
    steps(network, state, 1)
    twin = copy.deepcopy(network)
    for how in ("in place", "data", "parameter", "load"):
        other = lively(CONFIGS[name])
        for parameter in other.parameters():
            parameter.mul_(1.5)
        if how == "load":
            network.load_state_dict(other.state_dict(), assign=True)
        for module, source in zip(network.modules(), other.modules(), strict=True):
            for key, value in source._parameters.items():
                if value is None:
                    continue
                if how == "in place":
                    module._parameters[key].copy_(value)
                elif how == "data":
                    module._parameters[key].data = value.clone()
                elif how == "parameter":
                    setattr(module, key, nn.Parameter(value.clone()))
        torch.testing.assert_close(steps(network, state, 1)[0], steps(other, state, 1)[0], rtol=0, atol=0)
        network = copy.deepcopy(twin)
    assert all(calls)


@needs_native
@pytest.mark.parametrize("sequences", [1, 20, 40])
@pytest.mark.parametrize("config", NARROW, ids=["plain", "7b", "7b, odd sizes"])
@torch.no_grad()
def test_narrow_weights_err_no_more_than_torch(config, sequences, calls):
    """Torch's own bfloat16 network, all of it rounded, is what the error is measured by; so is reading a prompt."""
    network = lively(config)
    narrow, low = narrowed(network), copy.deepcopy(network).bfloat16()
    want, _ = steps(network, start(network, sequences), 4)
    calls.clear()
    got, last = steps(narrow, start(narrow, sequences), 4)
    assert all(calls)
    theirs, _ = steps(low, start(low, sequences), 4)
    assert got.dtype == torch.float32 and all(t.dtype in (torch.float32, torch.int64) for t in last.tensors().values())
    error = (got - want).square().mean().sqrt()
    assert 0 < error < (theirs.float() - want).square().mean().sqrt()


def test_the_choice_can_be_asked():
    assert chosen_backend("decoding", dtype=torch.float64) == "torch"
    assert chosen_backend("decoding") in ("native", "torch")

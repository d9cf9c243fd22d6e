"""What is special to one xLSTM configuration: rotary positions, norms stored minus one, both directions of a block."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from processive.backbones import XLSTMConfig, build
from processive.sequences import PackedBatch
from torch import nn

V = 19


def lively(config, seed=0):
    """A network with no parameter at a value that hides a mistake."""
    torch.manual_seed(seed)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def random_batch(lengths, seed=0):
    tokens = torch.randint(V, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return PackedBatch.from_lengths(tokens, torch.tensor(lengths))


def block_reference(block, x, positions, rotary, base):
    """One sequence through an mLSTM block, as the papers write it, token by token, in float64 [tokens, width]."""
    w = {name: value.detach().double() for name, value in block.state_dict().items()}
    inner, gate = F.linear(F.layer_norm(x, x.shape[1:], w["norm.weight"]), w["up.weight"]).chunk(2, -1)
    taps = w["convolution.weight"].shape[1]
    padded = torch.cat((inner.new_zeros(taps - 1, inner.shape[1]), inner))
    convolved = F.silu(
        torch.stack([(padded[t : t + taps].T * w["convolution.weight"]).sum(1) for t in range(len(x))])
        + w["convolution.bias"]
    )
    q, k = (convolved @ torch.block_diag(*part).T for part in w["query_key.weight"])
    v = inner @ torch.block_diag(*w["value.weight"][0]).T

    def turned(x):
        at = torch.outer(positions.double(), base ** (-torch.arange(0, x.shape[1], 2).double() / x.shape[1]))
        pairs = torch.view_as_complex(x.unflatten(1, (-1, 2))) * torch.polar(torch.ones_like(at), at)
        return torch.view_as_real(pairs).flatten(1)

    if rotary == "width":
        q, k = turned(q), turned(k)
    gates = F.linear(torch.cat((q, k, v), 1), w["gates.weight"], w["gates.bias"])
    heads, out = block.heads, []
    log_input, log_forget = gates[:, :heads], F.logsigmoid(gates[:, heads:])
    for h in range(heads):
        qh, kh, vh = (part.chunk(heads, 1)[h] for part in (q, k, v))
        if rotary == "head":
            qh, kh = turned(qh), turned(kh)
        decay = log_forget[:, h].cumsum(0)
        weights = (decay[:, None] - decay + log_input[:, h]).exp().tril()
        scores = weights * (qh @ kh.T) / qh.shape[1] ** 0.5
        mixed = scores @ vh / scores.sum(1, keepdim=True).abs().clamp(min=1)
        out.append(F.layer_norm(mixed, mixed.shape[1:], w["head_norm.weight"][h]))
    mixed = (torch.cat(out, 1) + w["skip"] * convolved) * F.silu(gate)
    return x + F.linear(mixed, w["down.weight"])


@pytest.mark.parametrize("rotary", [None, "width", "head"])
def test_rotary_positions_are_those_of_the_formula(rotary):
    """At positions that begin anew in the middle of a sequence, as with homologs, and in float64."""
    network = lively(XLSTMConfig(V, 24, 1, heads=2, rotary=rotary, rotary_base=50.0, post_blocks_norm=False)).double()
    batch = random_batch([9, 1, 6])
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 5, 0, 1, 2, 3, 700_000, 700_001])
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, positions)
    with torch.no_grad():
        got = network(batch)[0]
        parts = zip(batch.split(network.embed(batch)), batch.split(positions), strict=True)
        want = torch.cat([block_reference(network.blocks[0], x, at, rotary, 50.0) for x, at in parts])
        moved = network(PackedBatch(batch.tokens, batch.cu_seqlens, positions * 2))[0]
    assert (got - want).abs().max() <= 1e-9
    assert (moved - got).abs().max() > 1e-3 if rotary else torch.equal(moved, got)


@pytest.mark.parametrize("rotary", ["width", "head"])
def test_positions_that_begin_anew_can_be_streamed(rotary):
    network = lively(XLSTMConfig(V, 24, 2, heads=2, rotary=rotary))
    batch = random_batch([12, 12])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2] * 2)
    with torch.no_grad():
        whole = network(PackedBatch(batch.tokens, batch.cu_seqlens, positions))[0].view(2, 12, -1)
        state = None
        for start, stop in ((0, 1), (1, 7), (7, 8), (8, 12)):
            rows, at = (part.view(2, 12)[:, start:stop].flatten() for part in (batch.tokens, positions))
            piece = PackedBatch(rows, torch.arange(3) * (stop - start), at)
            hidden, state = network(piece, state, return_state=True)
            assert (hidden.view(2, stop - start, -1) - whole[:, start:stop]).abs().max() <= 1e-4


@pytest.mark.parametrize("blocks", ["mlstm", "slstm", "mlstm-7b", ("mlstm", "slstm", "mlstm-7b")], ids=str)
@pytest.mark.parametrize("sequences", [1, 40])
def test_norm_weights_stored_minus_one(blocks, sequences):
    """The same network with all norm weights one less; read whole, and decoded token by token."""
    plain = lively(XLSTMConfig(V, 24, 3, heads=2, blocks=blocks))
    offset = build(replace(plain.config, norm_offset=True)).eval()
    assert all(not value.any() for name, value in offset.state_dict().items() if name.endswith("norm.weight"))
    state = plain.state_dict()
    norms = [name for name in state if name.endswith("norm.weight")]
    assert "norm.weight" in norms and "blocks.2.head_norm.weight" in norms
    offset.load_state_dict({name: value - 1 if name in norms else value for name, value in state.items()})
    batch = random_batch([5] * sequences)
    with torch.no_grad():
        assert (plain(batch)[0] - offset(batch)[0]).abs().max() <= 1e-5
        for again in range(2):
            states = [network(batch, return_state=True)[1] for network in (plain, offset)]
            for step in range(3):
                one = PackedBatch.one_each(batch.tokens[step::5], positions=states[0].lengths)
                plainly, states[0] = plain(one, states[0], return_state=True)
                hidden, states[1] = offset(one, states[1], return_state=True)
                assert (plainly - hidden).abs().max() <= 1e-5
            if not again:
                for name, parameter in plain.named_parameters():  # what is kept for decoding must follow
                    if name in norms:
                        parameter.mul_(1.5)
                        offset.get_parameter(name).copy_(parameter - 1)


@pytest.mark.parametrize("kind", ["mlstm", "slstm", "mlstm-7b"])
@pytest.mark.parametrize("rotary", [None, "width", "head"])
def test_a_tied_block_is_the_block_both_ways(kind, rotary):
    """``y = B(x) + flip(B(flip x))``, with the causal block as B, its residual and biases included."""
    causal = lively(XLSTMConfig(V, 24, 2, heads=2, blocks=kind, bias=True, rotary=rotary, post_blocks_norm=False))
    tied = build(replace(causal.config, direction="tied")).eval()
    tied.load_state_dict(causal.state_dict())
    batch = random_batch([11])
    with torch.no_grad():
        x, context = causal.embed(batch), causal.context(batch, None)
        for block in causal.blocks:
            x = block(x, context, None, False)[0] + block(x.flip(0), context, None, False)[0].flip(0)
        assert (tied(batch)[0] - x).abs().max() <= 1e-4


def test_alternating_blocks_count_positions_as_they_read():
    causal = lively(XLSTMConfig(V, 24, 2, heads=2, rotary="width", post_blocks_norm=False))
    alternating = build(replace(causal.config, direction="alternating")).eval()
    alternating.load_state_dict(causal.state_dict())
    batch = random_batch([11])
    with torch.no_grad():
        x, context = causal.embed(batch), causal.context(batch, None)
        x = causal.blocks[0](x, context, None, False)[0]
        x = causal.blocks[1](x.flip(0), context, None, False)[0].flip(0)
        assert (alternating(batch)[0] - x).abs().max() <= 1e-4


def test_blocks_of_any_kind_in_any_order_and_width():
    network = build(
        XLSTMConfig(V, 24, 4, heads=2, blocks=("slstm", "mlstm", "mlstm-7b", "mlstm"), expansion=(1, 5, 1, 2))
    )
    kinds = [type(block).__name__ for block in network.blocks]
    assert kinds == ["SLSTMBlock", "MLSTMBlock", "CappedMLSTMBlock", "MLSTMBlock"]
    assert [len(network.blocks[i].skip) for i in (1, 3)] == [128, 64]
    assert [block.norm.eps for block in network.blocks] == [1e-5, 1e-5, 1e-6, 1e-5]
    assert isinstance(network.norm, nn.LayerNorm) and network.norm.eps == 1e-5
    last = build(XLSTMConfig(V, 24, 2, heads=2, blocks="mlstm-7b")).norm
    assert isinstance(last, nn.RMSNorm) and last.eps == 1e-6


def test_what_is_kept_for_decoding_is_not_shared_with_a_copy():
    network = lively(XLSTMConfig(V, 24, 1, heads=2, norm_offset=True))
    batch = random_batch([5])
    with torch.no_grad():
        state = network(batch, return_state=True)[1]
        one = PackedBatch.one_each(batch.tokens[:1], positions=state.lengths)
        want = network(one, state, return_state=True)[0]
        other = copy.deepcopy(network)
        other.blocks[0].head_norm.weight.add_(1)
        assert not torch.equal(other(one, state, return_state=True)[0], want)
        assert torch.equal(network(one, state, return_state=True)[0], want)

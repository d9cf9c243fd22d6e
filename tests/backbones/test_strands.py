"""Reverse-complement parameter sharing: both strands through one network, exactly equivariant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig, build
from processive.errors import ConfigError
from processive.models.head import Head, HeadConfig
from processive.sequences import PackedBatch

# 12 tokens of single bases (A 7, C 8, G 9, T 10), padded to 16 rows
COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15)
V, TOLERANCE = len(COMPLEMENT), 1e-5
LENGTHS = [1, 2, 7, 70, 64, 33]

CONFIGS = {
    f"{'+'.join(blocks)}, {direction}": XLSTMConfig(
        V, 24, 2, heads=4, blocks=blocks, direction=direction, complement=COMPLEMENT
    )
    for blocks in (("mlstm",) * 2, ("slstm",) * 2, ("mlstm-7b",) * 2, ("slstm", "mlstm"))
    for direction in ("causal", "alternating", "bidirectional", "tied")
} | {
    "rotary head": XLSTMConfig(V, 24, 2, heads=4, direction="tied", rotary="head", complement=COMPLEMENT),
    "rotary width": XLSTMConfig(V, 24, 2, direction="alternating", rotary="width", complement=COMPLEMENT),
    "decoder": TransformerConfig(V, 24, 2, heads=4, complement=COMPLEMENT),
    "encoder": TransformerConfig(
        V, 24, 2, heads=4, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=3,
        complement=COMPLEMENT,
    ),
}  # fmt: skip
HEADS = {
    "linear": HeadConfig(bias=True),
    "tied": HeadConfig(tied=True, soft_cap=3.0),
    "esm": HeadConfig("esm", activation="relu", conditions=(("species", 3),)),
}


def lively(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def random_batch(lengths=LENGTHS):
    tokens = torch.randint(V, (sum(lengths),))
    batch = PackedBatch.from_lengths(tokens, torch.tensor(lengths))
    return replace(batch, conditions={"species": torch.arange(len(lengths)) % 4})


def reverse_complement(batch):
    complement = torch.tensor(COMPLEMENT)
    return replace(batch, tokens=torch.cat([complement[part.flip(0)] for part in batch.split(batch.tokens)]))


def flipped(batch, values):
    """Each sequence's values in reverse order."""
    return torch.cat([part.flip(0) for part in batch.split(values)])


def difference(network, batch):
    """Of all hidden layers of the reverse complement and those of the sequence, tokens and channels reversed."""
    with torch.no_grad():
        there, back = network.hidden_layers(batch), network.hidden_layers(reverse_complement(batch))
    return max(float((flipped(batch, a).flip(-1) - b).abs().max()) for a, b in zip(there, back, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_of_the_other_strand(name):
    network, batch = lively(build(CONFIGS[name])), random_batch()
    with torch.no_grad():
        hidden = network(batch)[0]
    assert hidden.shape == (sum(LENGTHS), 48) and network.config.hidden_width == 48
    assert difference(network, batch) <= TOLERANCE
    assert hidden.std() > 0.1 and (hidden[:, :24] - hidden[:, 24:].flip(-1)).abs().max() > 0.1
    assert not network.config.causal and not network.config.streams


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["mlstm+mlstm, tied", "slstm+slstm, causal", "encoder"])
def test_logits_of_the_other_strand(name, head):
    network, batch = lively(build(CONFIGS[name])), random_batch()
    reader = lively(Head(HEADS[head], width=24, vocabulary_size=V, complement=COMPLEMENT))

    def logits(batch):
        with torch.no_grad():
            return reader(network(batch)[0], network.embedding.weight, reader.condition_ids(batch))

    want = flipped(batch, logits(batch))[:, list(COMPLEMENT)]
    assert (logits(reverse_complement(batch)) - want).abs().max() <= TOLERANCE
    assert want.std() > 0.1 and (want[:, 7] - want[:, 10]).abs().max() > 0.1


def test_the_logits_are_those_of_the_published_head():
    """h_forward W^T + flip_channels(h_reverse) W[complement]^T, by hand."""
    head = lively(Head(HeadConfig(), width=24, vocabulary_size=V, complement=COMPLEMENT))
    hidden = torch.randn(5, 48)
    want = hidden[:, :24] @ head.weight.T + hidden[:, 24:].flip(1) @ head.weight[list(COMPLEMENT)].T
    torch.testing.assert_close(head(hidden, torch.empty(V, 24)), want)


@pytest.mark.parametrize("name", ["slstm+mlstm, tied", "mlstm-7b+mlstm-7b, causal", "encoder"])
def test_it_is_the_same_network_on_either_strand(name):
    config = CONFIGS[name]
    network, batch = lively(build(config)), random_batch()
    single = build(replace(config, complement=None)).eval()
    single.load_state_dict(network.state_dict())
    with torch.no_grad():
        both = network(batch)[0]
        own, other = single(batch)[0], single(reverse_complement(batch))[0]
    assert (both[:, :24] - own).abs().max() <= TOLERANCE
    assert (both[:, 24:] - flipped(batch, other).flip(-1)).abs().max() <= TOLERANCE


def legacy(blocks, direction="tied", heads=4):
    return XLSTMConfig(
        V, 24, 2, heads=heads, blocks=blocks, direction=direction, complement=COMPLEMENT, legacy_head_flip=True
    )


@pytest.mark.parametrize("direction", ["causal", "tied"])
def test_the_legacy_head_flip_is_not_equivariant(direction):
    """Guards the tests above, and pins the quirk: on the other strand heads change places before their norm."""
    config, batch = legacy("slstm", direction), random_batch()
    network = lively(build(config))
    assert difference(network, batch) > 0.1
    single = build(replace(config, complement=None, legacy_head_flip=False)).eval()
    single.load_state_dict(network.state_dict())
    with torch.no_grad():
        own = single(batch)[0]
        for block in single.blocks:
            block.head_norm.register_forward_pre_hook(lambda module, given: given[0].flip(1))
        other = single(reverse_complement(batch))[0]
        both = network(batch)[0]
    assert (both[:, :24] - own).abs().max() <= TOLERANCE
    assert (both[:, 24:] - flipped(batch, other).flip(-1)).abs().max() <= TOLERANCE


def test_the_legacy_head_flip_of_one_head_is_none():
    assert difference(lively(build(legacy("slstm", heads=1))), random_batch()) <= TOLERANCE


def test_gradients_reach_every_parameter_from_either_strand():
    network, batch = lively(build(CONFIGS["slstm+mlstm, tied"])), random_batch([5, 8])
    for half in (slice(0, 24), slice(24, 48)):
        network.zero_grad()
        network(batch)[0][:, half].square().mean(1).cumsum(0).sum().backward()
        assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"complement": (1, 0)}, "complement has 2 ids; the vocabulary_size is 16"),
        ({"complement": (1, *range(1, 16))}, "token 0"),
        ({"complement": (*range(15), 16)}, "token 15"),
        ({"legacy_head_flip": True}, "legacy_head_flip"),
        ({"complement": COMPLEMENT, "legacy_head_flip": True}, "legacy_head_flip"),
    ],
)
def test_a_bad_complement_says_what_is_wrong(config, words):
    with pytest.raises(ConfigError, match=words):
        XLSTMConfig(16, 24, 1, heads=2, **config)
    if "legacy_head_flip" not in config:
        with pytest.raises(ConfigError, match=words):
            TransformerConfig(16, 24, 1, heads=2, **config)


def test_such_a_network_has_no_state():
    network = build(CONFIGS["decoder"])
    with pytest.raises(ConfigError, match="whole sequence"):
        network(random_batch(), return_state=True)

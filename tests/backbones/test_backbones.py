"""What holds for every backbone: packed = alone, whole = streamed, nothing sees the future, state is a value."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processive.backbones import BackboneState, TransformerConfig, XLSTMConfig, build
from processive.errors import ConfigError, InputError, ShapeError
from processive.sequences import PackedBatch

V, TOLERANCE = 19, 1e-4

CAUSAL = {
    "mlstm": XLSTMConfig(V, 32, 2, heads=2),
    "mlstm-bias-odd": XLSTMConfig(V, 20, 2, heads=1, bias=True, convolution=3, post_blocks_norm=False),
    "slstm": XLSTMConfig(V, 24, 2, heads=4, blocks="slstm"),
    "mixed": XLSTMConfig(V, 32, 3, heads=4, blocks=("mlstm", "slstm", "mlstm")),
    "7b": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b"),
    "7b-mixed": XLSTMConfig(V, 24, 2, heads=2, blocks=("mlstm-7b", "slstm"), gate_cap=None),
    "mlstm-rotary-width": XLSTMConfig(V, 24, 2, heads=4, rotary="width", norm_offset=True),
    "mlstm-rotary-head": XLSTMConfig(V, 32, 2, heads=2, rotary="head", rotary_base=100.0, bias=True),
    "layer-wise": XLSTMConfig(
        V, 24, 3, heads=2, blocks=("mlstm-7b", "mlstm", "slstm"), expansion=(1, 4.5, 1), norm_offset=True
    ),
    "sinusoidal": XLSTMConfig(V, 24, 2, heads=2, blocks="slstm", positions="sinusoidal"),
    "decoder": TransformerConfig(V, 32, 2, heads=4, key_value_heads=2),
    "decoder-window": TransformerConfig(V, 32, 2, heads=2, window=3),
    "decoder-window-1": TransformerConfig(V, 32, 1, heads=2, window=1),
    "decoder-plain": TransformerConfig(V, 24, 2, heads=3, norm="layer", activation="gelu", bias=True, positions="none"),
}
WHOLE = {
    "mlstm-alternating": XLSTMConfig(V, 32, 3, heads=2, direction="alternating"),
    "mlstm-bidirectional": XLSTMConfig(V, 32, 2, heads=2, direction="bidirectional"),
    "mixed-alternating": XLSTMConfig(V, 32, 3, heads=2, blocks=("mlstm", "slstm", "mlstm"), direction="alternating"),
    "mixed-bidirectional": XLSTMConfig(
        V, 32, 3, heads=2, blocks=("mlstm", "slstm", "mlstm"), direction="bidirectional"
    ),
    "alternating-first": XLSTMConfig(
        V, 32, 3, heads=2, blocks=("mlstm", "slstm", "mlstm"), direction="alternating-first"
    ),
    "sinusoidal-tied": XLSTMConfig(V, 24, 2, heads=2, direction="tied", positions="sinusoidal"),
    "7b-alternating": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b", direction="alternating"),
    "7b-bidirectional": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b", direction="bidirectional"),
    "mixed-tied": XLSTMConfig(
        V, 24, 3, heads=2, blocks=("mlstm", "slstm", "mlstm-7b"), direction="tied", rotary="head", bias=True
    ),
    "rotary-width-tied": XLSTMConfig(V, 24, 2, heads=2, direction="tied", rotary="width"),
    "rotary-width-alternating": XLSTMConfig(V, 24, 2, heads=2, direction="alternating", rotary="width"),
    "encoder": TransformerConfig(
        V, 32, 2, heads=2, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=3
    ),
    "encoder-window": TransformerConfig(V, 32, 2, heads=2, direction="bidirectional", window=4, activation="geglu"),
}
COMPLEMENT = (0, 1, 2, 3, 4, *range(10, 15), *range(5, 10), 16, 15, 17, 18)
STRANDS = {
    f"{name}-strands": replace(config, complement=COMPLEMENT)
    for name, config in (CAUSAL | WHOLE).items()
    if name in ("mixed", "7b", "decoder", "mixed-bidirectional", "mixed-tied", "rotary-width-alternating", "encoder")
}
WHOLE |= STRANDS
EVERY = CAUSAL | WHOLE


def lively(config, seed=0):
    """A network with no parameter at a value that hides a mistake (zero gates, unit norms, zero recurrence)."""
    torch.manual_seed(seed)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def random_batch(lengths, seed=0, offsets=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (sum(lengths),), generator=generator)
    return PackedBatch.from_lengths(tokens, torch.tensor(lengths, dtype=torch.int64), offsets=offsets)


def alone(batch):
    return [PackedBatch.from_lengths(part, torch.tensor([len(part)])) for part in batch.split(batch.tokens)]


NETWORKS = {name: lively(config) for name, config in EVERY.items()}
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
DRAWS = settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@pytest.mark.parametrize("name", EVERY)
@DRAWS
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_equals_alone(name, lengths, seed):
    network, batch = NETWORKS[name], random_batch([1, *lengths, 70], seed)
    with torch.no_grad():
        packed = network(batch)[0]
        single = torch.cat([network(one)[0] for one in alone(batch)])
    assert packed.isfinite().all()
    assert (packed - single).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_packed_equals_alone_to_the_last_digits(name):
    network, batch = lively(EVERY[name]).double(), random_batch([1, 2, 33, 70, 5])
    with torch.no_grad():
        packed = network(batch)[0]
        single = torch.cat([network(one)[0] for one in alone(batch)])
    assert packed.dtype == torch.float64
    assert (packed - single).abs().max() <= 1e-11


@pytest.mark.parametrize("name", EVERY)
def test_order_and_context_matter(name):
    """Guards the tests above: a network blind to its neighbours would pass them."""
    if name == "decoder-window-1":
        pytest.skip("sees one token")
    network, batch = NETWORKS[name], random_batch([9])
    first = batch.tokens.clone()
    first[-3] = (first[-3] + 1) % V
    with torch.no_grad():
        change = (network(batch)[0] - network(PackedBatch(first, batch.cu_seqlens, batch.positions))[0]).abs().amax(1)
    assert change[-1] > 1e-3
    assert (change[-4] > 1e-3) == (name in WHOLE)


def pieces_of(lengths, generator):
    """Cut every sequence at random; in each round every sequence has a piece, perhaps an empty one."""
    rounds, left = [], torch.tensor(lengths)
    while left.any():
        take = torch.minimum((torch.rand(len(lengths), generator=generator) * 12).long(), left)
        rounds.append(take)
        left = left - take
    return rounds


@pytest.mark.parametrize("name", CAUSAL)
@DRAWS
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_whole_equals_streamed_in_random_pieces(name, lengths, seed):
    network, batch = NETWORKS[name], random_batch(lengths, seed)
    with torch.no_grad():
        whole, last = network(batch, return_state=True)
        want = batch.split(whole)
        done = torch.zeros(len(lengths), dtype=torch.int64)
        state, got = None, [[] for _ in lengths]
        parts = batch.split(batch.tokens)
        for take in pieces_of(lengths, torch.Generator().manual_seed(seed)):
            tokens = torch.cat([part[a : a + n] for part, a, n in zip(parts, done, take, strict=True)])
            hidden, state = network(PackedBatch.from_lengths(tokens, take, offsets=done), state, return_state=True)
            for row, piece in zip(got, hidden.split(take.tolist()), strict=True):
                row.append(piece)
            done = done + take
            assert torch.equal(state.lengths, done)
    for row, expected in zip(got, want, strict=True):
        assert (torch.cat(row) - expected).abs().max() <= TOLERANCE
    for key, tensor in last.tensors().items():
        if not key.endswith((".m", ".C", ".n", ".c")):  # those are free up to their common scale
            assert (state.tensors()[key] - tensor).abs().max() <= TOLERANCE if tensor.numel() else True


@pytest.mark.parametrize("name", CAUSAL)
def test_whole_equals_token_by_token(name):
    network, batch = NETWORKS[name], random_batch([11, 11, 11])
    with torch.no_grad():
        whole = network(batch)[0].view(3, 11, -1)
        state = None
        for step in range(11):
            tokens, ones = batch.tokens.view(3, 11)[:, step], torch.ones(3, dtype=torch.int64)
            hidden, state = network(
                PackedBatch.from_lengths(tokens, ones, offsets=ones * step), state, return_state=True
            )
            assert (hidden - whole[:, step]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_is_not_seen(name):
    """The gradient of an output with respect to every later embedding, and to other sequences, is exactly zero."""
    network, batch = lively(CAUSAL[name]), random_batch([6, 13, 4])
    kept = []
    network.embedding.register_forward_hook(lambda *call: kept.append(call[2]) or call[2].retain_grad())
    hidden = network(batch)[0]
    hidden[6 + 7].sum().backward()
    seen = kept[0].grad.abs().amax(1) > 0
    assert seen[6 + 7]
    assert not kept[0].grad[:6].any()
    assert not kept[0].grad[6 + 8 :].any()
    reach = {"decoder-window": 4, "decoder-window-1": 0}.get(name, 7)  # two windows of 3 reach back 4 tokens
    assert seen[6 + 7 - reach : 6 + 8].all()
    assert not seen[: 6 + 7 - reach].any()


@pytest.mark.parametrize("name", ["mixed", "7b", "decoder", "decoder-window"])
def test_state_can_be_selected_and_repeated(name):
    network = NETWORKS[name]
    start, go_on = random_batch([5, 1, 9], seed=1), random_batch([3, 2, 4], seed=2)
    with torch.no_grad():
        _, state = network(start, return_state=True)
        rows = [2, 0, 2]
        parts = [go_on.split(go_on.tokens)[row] for row in rows]
        offset = state.lengths[torch.tensor(rows)]
        picked = PackedBatch.from_lengths(torch.cat(parts), torch.tensor([len(p) for p in parts]), offsets=offset)
        chosen = network(picked, state.select(torch.tensor(rows)))[0]
        twice = state.repeat(2)
        assert twice.lengths.tolist() == [5, 5, 1, 1, 9, 9]
        all_rows = network(
            PackedBatch.from_lengths(go_on.tokens, go_on.lengths, offsets=state.lengths), state, return_state=True
        )
        want = torch.cat([all_rows[0].split([3, 2, 4])[row] for row in rows])
        assert (chosen - want).abs().max() <= TOLERANCE
        tokens = torch.tensor([4, 4, 4, 4, 4, 4])
        step = PackedBatch.from_lengths(tokens, torch.ones_like(tokens), offsets=twice.lengths)
        doubled = network(step, twice)[0].view(3, 2, -1)
        assert torch.equal(doubled[:, 0], doubled[:, 1])


def test_state_lists_its_tensors_and_maps_them():
    for name in ("mixed", "7b", "decoder"):
        _, state = NETWORKS[name](random_batch([3, 4]), return_state=True)
        tensors = state.tensors()
        assert tensors["lengths"].tolist() == [3, 4]
        assert all(torch.is_tensor(tensor) for tensor in tensors.values())
        doubled = state.map(lambda tensor: tensor * 2).tensors()
        assert doubled.keys() == tensors.keys()
        assert all(torch.equal(doubled[key], tensors[key] * 2) for key in tensors)
    assert {"blocks.0.cell.C", "blocks.0.convolution", "blocks.1.cell.y"} <= set(
        NETWORKS["mixed"](random_batch([2]), return_state=True)[1].tensors()
    )


def test_xlstm_state_does_not_grow_and_a_window_bounds_the_cache():
    for name in ("mixed", "7b"):
        sizes = {
            sum(tensor.numel() for tensor in NETWORKS[name](random_batch([n]), return_state=True)[1].tensors().values())
            for n in (1, 8, 64)
        }
        assert len(sizes) == 1
    _, state = NETWORKS["decoder-window"](random_batch([50, 1]), return_state=True)
    assert state.tensors()["blocks.0.cu_seqlens"].tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", WHOLE)
def test_bidirectional_networks_have_no_state(name):
    batch = random_batch([3])
    with pytest.raises(ConfigError, match="whole sequence"):
        NETWORKS[name](batch, return_state=True)
    with pytest.raises(ConfigError, match="whole sequence"):
        NETWORKS[name](batch, BackboneState(torch.tensor([0]), ()))


def test_a_state_of_other_sequences_is_refused():
    _, state = NETWORKS["mlstm"](random_batch([3, 4]), return_state=True)
    with pytest.raises(ShapeError, match="2 sequences"):
        NETWORKS["mlstm"](random_batch([3]), state)


def test_a_decoder_whose_positions_do_not_go_on_says_so():
    _, state = NETWORKS["decoder"](random_batch([3, 4]), return_state=True)
    with pytest.raises(InputError, match=r"offsets=state\.lengths"):
        NETWORKS["decoder"](random_batch([1, 1]), state)


@pytest.mark.parametrize("name", EVERY)
def test_hidden_layers(name):
    network, batch = NETWORKS[name], random_batch([4, 7])
    with torch.no_grad():
        layers = network.hidden_layers(batch)
        assert len(layers) == network.config.depth + 1
        assert all(layer.shape == (11, network.config.hidden_width) for layer in layers)
        assert torch.equal(layers[-1], network(batch)[0])
        if name in STRANDS:
            return
        assert torch.equal(layers[0], network.embed(batch))
        if network.config.depth > 1:
            again = network.norm(network.blocks[-1](layers[-2], network.context(batch, None), None, False)[0])
            assert torch.equal(again, layers[-1])


@pytest.mark.parametrize("name", ["mixed", "7b-bidirectional", "decoder", "encoder"])
def test_gradient_checkpointing_changes_no_gradient(name):
    network, batch = lively(EVERY[name]).train(), random_batch([5, 17])
    gradients = []
    for on in (False, True):
        network.gradient_checkpointing = on
        network.zero_grad()
        network(batch)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("name", ["mixed", "7b", "decoder"])
def test_every_block_learns_from_fresh_weights(name):
    torch.manual_seed(0)
    network = build(EVERY[name])
    network(random_batch([9, 12]))[0].square().mean(1).cumsum(0).sum().backward()
    still = {n for n, parameter in network.named_parameters() if not parameter.grad.any()}
    assert not still


@pytest.mark.parametrize("name", ["mixed", "7b", "decoder", "encoder"])
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(0)
    network, batch = build(replace(EVERY[name], dropout=0.5)), random_batch([9])
    assert not torch.equal(network(batch)[0], network(batch)[0])
    network.eval()
    assert torch.equal(network(batch)[0], network(batch)[0])


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_follows_float32(name):
    network, batch = lively(EVERY[name]), random_batch([5, 30])
    with torch.no_grad():
        exact = network(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            near = network(batch)[0].float()
        low = network.bfloat16()(batch)[0].float()
    for got in (near, low):
        assert ((got - exact).square().mean() / exact.square().mean()).sqrt() < 0.12


def test_an_empty_batch():
    batch = PackedBatch.from_sequences([])
    for name in ("mixed", "7b", "decoder"):
        hidden, state = NETWORKS[name](batch, return_state=True)
        assert hidden.shape == (0, EVERY[name].width)
        assert len(state) == 0


def test_alternating_reads_odd_blocks_right_to_left():
    """One causal block then one anti-causal block: the reverse of the sequence gives what swapping them would."""
    config = XLSTMConfig(V, 32, 2, heads=2, direction="alternating")
    network, batch = lively(config), random_batch([8])
    swapped = lively(config)
    swapped.load_state_dict(network.state_dict())
    for block, reverses in zip(swapped.blocks, ((True,), (False,)), strict=True):
        block.reverses = reverses
    backwards = PackedBatch.from_lengths(batch.tokens.flip(0), batch.lengths)
    with torch.no_grad():
        assert (network(batch)[0] - swapped(backwards)[0].flip(0)).abs().max() < 1e-5


def test_bidirectional_is_symmetric_under_reversal():
    for name in ("mlstm-bidirectional", "mixed-bidirectional", "7b-bidirectional", "mixed-tied", "rotary-width-tied"):
        batch = random_batch([12])
        backwards = PackedBatch.from_lengths(batch.tokens.flip(0), batch.lengths)
        with torch.no_grad():
            there, back = NETWORKS[name](batch)[0], NETWORKS[name](backwards)[0].flip(0)
        assert (there - back).abs().max() <= TOLERANCE

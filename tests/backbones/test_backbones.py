"""What holds for every backbone of the table in conftest.py: packed = alone, whole = streamed, nothing sees the future,
state is a value."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processive.backbones import BackboneState, XLSTMConfig, build
from processive.backbones.transformer_config import CHOICES
from processive.errors import ConfigError, InputError, ShapeError
from processive.sequences import PackedBatch

TOLERANCE = 1e-4
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
DRAWS = settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def test_the_table(cases):
    """Printed with ``-s``: what each configuration has that the defaults have not."""
    for name, case in cases.items():
        plain = type(case.config)(*(case.config.vocabulary_size, case.config.width, case.config.depth))
        own = {key: value for key, value in vars(case.config).items() if getattr(plain, key) != value}
        print(f"{name:25} {case.config.family:12} {'streams' if case.config.streams else 'whole':8}", own)  # noqa: T201
    transformers = [case.config for case in cases.values() if case.config.family == "transformer"]
    for key, values in CHOICES.items():
        assert {getattr(config, key) for config in transformers} == set(values)
    others = {"skip_scale", "residual_scale", "bias", "attention_bias", "feed_forward_bias", "norm_bias", "rotary_base"}
    others |= {"token_dropout", "post_blocks_norm", "embedding_norm", "token_types", "cross_width", "window"}
    others |= {"post_blocks_norm_bias"}
    for key in others | {"key_value_heads", "head_width", "max_positions", "position_offset", "feed_forward_width"}:
        assert len({getattr(config, key) for config in transformers}) > 1, f"the table has one {key} only"


@DRAWS
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_equals_alone(case, lengths, seed):
    inputs = case.inputs([1, *lengths, 70], seed)
    with torch.no_grad():
        packed = inputs.run(case.network)[0]
        single = torch.cat([inputs.select([row]).run(case.network)[0] for row in range(len(lengths) + 2)])
    assert packed.isfinite().all()
    assert (packed - single).abs().max() <= TOLERANCE


def test_packed_equals_alone_to_the_last_digits(case):
    network, inputs = case.fresh().double(), case.inputs([1, 2, 33, 70, 5])
    with torch.no_grad():
        packed = inputs.run(network)[0]
        single = torch.cat([inputs.select([row]).run(network)[0] for row in range(5)])
    assert packed.dtype == torch.float64
    assert (packed - single).abs().max() <= 1e-11


def test_order_and_context_matter(case):
    """Guards the tests above: a network blind to its neighbours would pass them."""
    inputs = case.inputs([9])
    other = inputs.tokens[0].clone()
    other[-3] = (other[-3] + 1) % case.config.vocabulary_size
    with torch.no_grad():
        change = inputs.run(case.network)[0] - replace(inputs, tokens=[other]).run(case.network)[0]
    changed = change.abs().amax(1) > 1e-3
    seen = case.reach(9, 0 if inputs.prefix is None else int(inputs.prefix))[:, -3]
    assert changed[-3] and torch.equal(changed[[-4, -1]], seen[[-4, -1]])


def pieces_of(lengths, generator, prefix=None):
    """Cut every sequence at random; in each round every sequence has a piece, perhaps an empty one.

    The first piece that is not empty holds the prefix.
    """
    done = torch.zeros_like(lengths)
    while (done < lengths).any():
        take = (torch.rand(len(lengths), generator=generator) * 12).long() * (torch.rand(len(lengths)) < 0.8)
        if prefix is not None:
            take = torch.where((done == 0) & (take > 0), torch.maximum(take, prefix), take)
        end = torch.minimum(done + take, lengths)
        yield done, end
        done = end


@DRAWS
@given(lengths=LENGTHS, seed=st.integers(0, 99), reuse=st.booleans())
def test_whole_equals_streamed_in_random_pieces(streaming, lengths, seed, reuse):
    network, inputs = streaming.network, streaming.inputs(lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        whole, last = inputs.run(network, return_state=True)
        state, got = None, [[] for _ in lengths]
        for begin, end in pieces_of(inputs.lengths, generator, inputs.prefix):
            options = {"return_state": True, "reuse_state": reuse and state is not None}
            hidden, state = inputs.run(network, state, begin=begin, end=end, **options)
            for row, piece in zip(got, hidden.split((end - begin).tolist()), strict=True):
                row.append(piece)
            assert torch.equal(state.lengths, end)
    assert (torch.cat([torch.cat(row) for row in got]) - whole).abs().max() <= TOLERANCE
    if reuse and streaming.config.family == "transformer" and streaming.config.window is not None:
        return  # more may be left in the room than the window
    for key, tensor in last.tensors().items():
        if not key.endswith((".m", ".C", ".n", ".c")):  # those are free up to their common scale
            assert (state.tensors()[key] - tensor).abs().max() <= TOLERANCE if tensor.numel() else True


@pytest.mark.parametrize("reuse", [False, True])
def test_whole_equals_token_by_token(streaming, reuse):
    network, inputs = streaming.network, streaming.inputs([11, 11, 11])
    at = torch.ones(3, dtype=torch.int64)
    first = 1 if inputs.prefix is None else max(1, int(inputs.prefix.max()))
    with torch.no_grad():
        whole = inputs.run(network)[0].view(3, 11, -1)
        hidden, state = inputs.run(network, end=at * first, return_state=True)
        assert (hidden.view(3, first, -1) - whole[:, :first]).abs().max() <= TOLERANCE
        for step in range(first, 11):
            options = {"return_state": True, "reuse_state": reuse}
            hidden, state = inputs.run(network, state, begin=at * step, end=at * (step + 1), **options)
            assert (hidden - whole[:, step]).abs().max() <= TOLERANCE


def test_the_future_is_not_seen(streaming):
    """The gradient of an output with respect to every embedding that it may not see is exactly zero."""
    network, inputs = streaming.fresh(), streaming.inputs([6, 13, 4])
    reach = torch.block_diag(*(
        streaming.reach(n, 0 if inputs.prefix is None else int(inputs.prefix[row])) for row, n in enumerate([6, 13, 4])
    ))  # fmt: skip
    kept = []
    network.embedding.register_forward_hook(lambda *call: kept.append(call[2]))
    hidden = inputs.run(network)[0]
    for token in (0, 5, 6, 9, 13, 18, 19, 22):
        (gradient,) = torch.autograd.grad(hidden[token].sum(), kept[0], retain_graph=True)
        assert torch.equal((gradient != 0).any(1), reach[token])


def test_beams_and_early_stop_change_no_results(streaming):
    """Repeat a state, go on differently, keep some, reorder them, go on: each is what it is alone."""
    network, inputs = streaming.network, streaming.inputs([5, 1, 9], seed=1)
    generator = torch.Generator().manual_seed(2)

    def go_on(inputs, state, tokens):
        more = torch.randint(streaming.config.vocabulary_size, (len(inputs.tokens), tokens), generator=generator)
        longer = replace(inputs, tokens=[torch.cat(pair) for pair in zip(inputs.tokens, more, strict=True)])
        for step in range(tokens):
            end = state.lengths + 1
            hidden, state = longer.run(
                network, state, begin=state.lengths, end=end, return_state=True, reuse_state=step > 0
            )
        alone = [longer.select([row]).run(network)[0][-1] for row in range(len(more))]
        assert (hidden - torch.stack(alone)).abs().max() <= TOLERANCE
        return longer, state

    with torch.no_grad():
        _, state = inputs.run(network, return_state=True)
        before = {key: tensor.clone() for key, tensor in state.tensors().items()}
        beams = inputs.select([0, 0, 1, 1, 2, 2]), state.repeat(2)
        assert beams[1].lengths.tolist() == [5, 5, 1, 1, 9, 9]
        beams = go_on(*beams, 3)
        for rows in ([5, 0, 0, 2], [1], [0, 0]):
            beams = go_on(beams[0].select(rows), beams[1].select(torch.tensor(rows)), 2)
        go_on(inputs, state, 1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())


def test_state_lists_its_tensors_and_maps_them(cases):
    for name in ("mixed", "7b", "decoder"):
        _, state = cases[name].inputs([3, 4]).run(cases[name].network, return_state=True)
        tensors = state.tensors()
        assert tensors["lengths"].tolist() == [3, 4]
        assert all(torch.is_tensor(tensor) for tensor in tensors.values())
        doubled = state.map(lambda tensor: tensor * 2).tensors()
        assert doubled.keys() == tensors.keys()
        assert all(torch.equal(doubled[key], tensors[key] * 2) for key in tensors)
    assert {"blocks.0.cell.C", "blocks.0.convolution", "blocks.1.cell.y"} <= set(
        cases["mixed"].inputs([2]).run(cases["mixed"].network, return_state=True)[1].tensors()
    )


def test_xlstm_state_does_not_grow_and_a_window_bounds_the_cache(cases):
    for name in ("mixed", "7b"):
        states = [cases[name].inputs([n]).run(cases[name].network, return_state=True)[1] for n in (1, 8, 64)]
        assert len({sum(tensor.numel() for tensor in state.tensors().values()) for state in states}) == 1
    _, state = cases["decoder-window"].inputs([50, 1]).run(cases["decoder-window"].network, return_state=True)
    assert state.tensors()["blocks.0.cu_seqlens"].tolist() == [0, 2, 3]


def test_bidirectional_networks_have_no_state(whole):
    inputs = whole.inputs([3])
    with pytest.raises(ConfigError, match="whole sequence"):
        inputs.run(whole.network, return_state=True)
    with pytest.raises(ConfigError, match="whole sequence"):
        inputs.run(whole.network, BackboneState(torch.tensor([0]), ()))


def test_a_state_of_other_sequences_is_refused(streaming):
    _, state = streaming.inputs([3, 4]).run(streaming.network, return_state=True)
    with pytest.raises(ShapeError, match="2 sequences"):
        streaming.inputs([3]).run(streaming.network, state)


def test_a_decoder_whose_positions_do_not_go_on_says_so(streaming):
    if streaming.config.family == "xlstm" or streaming.config.positions == "none":
        pytest.skip("knows no absolute positions")
    _, state = streaming.inputs([3, 4]).run(streaming.network, return_state=True)
    with pytest.raises(InputError, match=r"offsets=state\.lengths"):
        streaming.inputs([1, 1]).run(streaming.network, state)


def test_hidden_layers(case):
    network, inputs = case.network, case.inputs([4, 7])
    batch, memory = inputs.batch(), inputs.memory()
    with torch.no_grad():
        layers = network.hidden_layers(batch, memory=memory)
        assert len(layers) == case.config.depth + 1
        assert all(layer.shape == (11, case.config.hidden_width) for layer in layers)
        assert torch.equal(layers[-1], inputs.run(network)[0])
        if case.config.complement is not None:
            return
        assert torch.equal(layers[0], network.embed(batch))
        if case.config.depth > 1:
            context = network.context(batch, None)
            context = context if memory is None else network.with_memory(context, memory)
            assert torch.equal(network.norm(network.blocks[-1](layers[-2], context, None, False)[0]), layers[-1])


@pytest.mark.parametrize("name", ["mixed", "7b-bidirectional", "decoder", "encoder", "decoder-cross"])
def test_gradient_checkpointing_changes_no_gradient(name, cases):
    network, inputs = cases[name].fresh().train(), cases[name].inputs([5, 17])
    gradients = []
    for on in (False, True):
        network.gradient_checkpointing = on
        network.zero_grad()
        inputs.run(network)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("name", ["mixed", "7b", "decoder", "encoder-scaled", "decoder-qk-norm", "decoder-cross"])
def test_every_block_learns_from_fresh_weights(name, cases):
    torch.manual_seed(0)
    network = build(cases[name].config)
    cases[name].inputs([9, 12]).run(network)[0].square().mean(1).cumsum(0).sum().backward()
    still = {n for n, parameter in network.named_parameters() if not parameter.grad.any()}
    assert not still


@pytest.mark.parametrize("name", ["mixed", "7b", "decoder", "encoder", "encoder-bert"])
def test_dropout_acts_in_training_only(name, cases):
    torch.manual_seed(0)
    network, batch = build(replace(cases[name].config, dropout=0.5)), cases[name].inputs([9]).batch()
    assert not torch.equal(network(batch)[0], network(batch)[0])
    network.eval()
    assert torch.equal(network(batch)[0], network(batch)[0])


def test_bfloat16_follows_float32(case):
    network, inputs = case.fresh(), case.inputs([5, 30])
    with torch.no_grad():
        exact = inputs.run(network)[0]
        with torch.autocast("cpu", torch.bfloat16):
            near = inputs.run(network)[0].float()
        low = inputs.run(network.bfloat16())[0].float()
    for got in (near, low):
        assert ((got - exact).square().mean() / exact.square().mean()).sqrt() < 0.12


def test_an_empty_batch(streaming):
    if streaming.inputs([1]).memories is not None:
        pytest.skip("a memory of no sequence has no width")
    hidden, state = streaming.inputs([]).run(streaming.network, return_state=True)
    assert hidden.shape == (0, streaming.config.width)
    assert len(state) == 0
    with torch.no_grad():
        again, state = streaming.inputs([]).run(streaming.network, state, return_state=True, reuse_state=True)
    assert again.shape == hidden.shape and len(state) == 0


def test_alternating_reads_odd_blocks_right_to_left(cases):
    """One causal block then one anti-causal block: the reverse of the sequence gives what swapping them would."""
    config = XLSTMConfig(19, 32, 2, heads=2, direction="alternating")
    alternating = replace(cases["mlstm-alternating"], config=config)
    network, swapped, batch = alternating.fresh(), alternating.fresh(), alternating.inputs([8]).batch()
    swapped.load_state_dict(network.state_dict())
    for block, reverses in zip(swapped.blocks, ((True,), (False,)), strict=True):
        block.reverses = reverses
    backwards = PackedBatch.from_lengths(batch.tokens.flip(0), batch.lengths)
    with torch.no_grad():
        assert (network(batch)[0] - swapped(backwards)[0].flip(0)).abs().max() < 1e-5


def test_bidirectional_is_symmetric_under_reversal(cases):
    for name in ("mlstm-bidirectional", "mixed-bidirectional", "7b-bidirectional", "mixed-tied", "rotary-width-tied"):
        batch = cases[name].inputs([12]).batch()
        backwards = PackedBatch.from_lengths(batch.tokens.flip(0), batch.lengths)
        with torch.no_grad():
            there, back = cases[name].network(batch)[0], cases[name].network(backwards)[0].flip(0)
        assert (there - back).abs().max() <= TOLERANCE

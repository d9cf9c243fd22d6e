"""The key-value cache as a value, and as memory that is given away: room, moves, windows."""

import pytest
import torch
from processive.backbones import BackboneState
from processive.backbones.state import ROOM, KeyValueCache, Layout, cumulative


def random_cache(lengths, room=None, dtype=torch.float32):
    """A cache, with NaN where it has room."""
    rows = torch.tensor(lengths) + (0 if room is None else torch.tensor(room))
    edges = cumulative(rows)
    keys, values = torch.full((2, int(edges[-1]), 2, 3), torch.nan, dtype=dtype)
    for start, n in zip(edges, lengths, strict=False):
        keys[start : start + n] = torch.randn(n, 2, 3, dtype=dtype)
        values[start : start + n] = torch.randn(n, 2, 4, dtype=dtype)[..., :3]
    return KeyValueCache(keys, values, edges, None if room is None else torch.tensor(lengths))


def rows_of(cache):
    """Keys and values of each sequence."""
    starts = zip(cache.cu_seqlens[:-1].tolist(), cache.filled.tolist(), strict=True)
    return [torch.stack((cache.keys[a : a + n], cache.values[a : a + n])) for a, n in starts]


def append(cache, new, reuse, window=None):
    keys, values = torch.randn(2, sum(new), 2, 3)
    edges = cumulative(torch.tensor(new))
    layout = Layout.behind(cache, edges, reuse=reuse, window=window)
    want = [
        torch.cat((old, torch.stack((k, v))), 1)
        for old, k, v in zip(rows_of(cache), keys.split(new), values.split(new), strict=True)
    ]
    return cache.append(keys, values, layout), want


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("room", [None, [0, 3, 40], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("new", [[1, 1, 1], [0, 4, 2], [0, 0, 0], [50, 0, 1]], ids=str)
@torch.no_grad()
def test_new_tokens_stand_behind_the_old_ones(new, room, reuse):
    cache = random_cache([5, 1, 9], room)
    before = cache.keys.clone(), cache.values.clone()
    after, want = append(cache, new, reuse)
    for got, expected in zip(rows_of(after), want, strict=True):
        assert torch.equal(got, expected)
    fits = reuse and all(n <= r for n, r in zip(new, room or [0, 0, 0], strict=True))
    assert (after.keys.data_ptr() == cache.keys.data_ptr()) == fits
    if not fits:
        for tensor, old in zip((cache.keys, cache.values), before, strict=True):
            assert torch.equal(tensor.nan_to_num(9.0), old.nan_to_num(9.0))
    assert (after.lengths is None) == (not reuse)
    if after.lengths is None:
        assert len(after.keys) == int(after.filled.sum())


@torch.no_grad()
def test_a_cache_that_grows_token_by_token_moves_rarely():
    cache, moves = random_cache([100, 1, 9]), 0
    for step in range(400):
        after, want = append(cache, [1, 1, step % 2], True)
        for got, expected in zip(rows_of(after), want, strict=True):
            assert torch.equal(got, expected)
        moves += after.keys.data_ptr() != cache.keys.data_ptr()
        assert len(after.keys) <= (after.filled * 1.25 + ROOM).sum()
        cache = after
    assert cache.filled.tolist() == [500, 401, 209]
    assert moves <= 8  # the shortest has room for ROOM tokens, and then for more and more


@pytest.mark.parametrize("window", [1, 4, 30])
@torch.no_grad()
def test_a_window_bounds_the_memory(window):
    cache = random_cache([50, 1, 9])
    for _ in range(300):
        after, want = append(cache, [1, 1, 1], True, window)
        for got, expected in zip(rows_of(after), want, strict=True):
            seen = min(window, expected.shape[1])
            assert torch.equal(got[:, -seen:], expected[:, -seen:])
        cache = after
    assert len(cache.keys) <= 3 * (window * 1.25 + ROOM)


@pytest.mark.parametrize("room", [None, [2, 3, 0]], ids=str)
def test_parts_of_a_cache_have_no_room(room):
    cache = random_cache([5, 1, 9], room)
    rows = rows_of(cache)
    for part, want in (
        (cache.without_room(), rows),
        (cache.last(2), [row[:, -2:] for row in rows]),
        (cache.last(0), [row[:, :0] for row in rows]),
        (cache.select(torch.tensor([2, 0, 0])), [rows[2], rows[0], rows[0]]),
        (cache.select(torch.tensor([], dtype=torch.int64)), []),
    ):
        assert part.lengths is None and len(part.keys) == int(part.cu_seqlens[-1])
        assert len(part.filled) == len(want)
        for got, expected in zip(rows_of(part), want, strict=True):
            assert torch.equal(got, expected)


def test_a_state_lists_and_maps_what_is_there_and_no_room():
    state = BackboneState(torch.tensor([5, 1]), (random_cache([5, 1], [2, 30]),))
    tensors = state.tensors()
    assert tensors.keys() == {"lengths", "blocks.0.keys", "blocks.0.values", "blocks.0.cu_seqlens"}
    assert tensors["blocks.0.cu_seqlens"].tolist() == [0, 5, 6]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    copied = state.map(torch.clone)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in copied.tensors().items())


@pytest.mark.parametrize("name", ["decoder", "decoder-window"])
@torch.no_grad()
def test_a_state_given_away_takes_tokens_in_place_in_every_block(name, cases):
    case, memory = cases[name], []
    inputs = case.inputs([9, 4, 6])
    _, state = inputs.run(case.network, end=inputs.lengths - 4, return_state=True)
    for _ in range(3):
        options = {"return_state": True, "reuse_state": True}
        _, state = inputs.run(case.network, state, begin=state.lengths, end=state.lengths + 1, **options)
        memory.append([block.keys.data_ptr() for block in state.blocks])
    assert memory[0] == memory[1] == memory[2]
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    last = {"begin": state.lengths, "end": state.lengths + 1}
    kept = inputs.run(case.network, state, **last)[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())
    assert torch.equal(inputs.run(case.network, state, reuse_state=True, **last)[0], kept)


def test_states_of_inference_mode_and_of_other_types_go_on(cases):
    case = cases["decoder"]
    inputs = case.inputs([9, 4])
    with torch.no_grad():
        want = inputs.run(case.network)[0].split([9, 4])
    with torch.inference_mode():
        _, state = inputs.run(case.network, end=inputs.lengths - 3, return_state=True)
        options = {"return_state": True, "reuse_state": True}
        _, state = inputs.run(case.network, state, begin=state.lengths, end=inputs.lengths - 2, **options)
    with torch.no_grad():
        hidden, state = inputs.run(case.network, state, begin=state.lengths, end=inputs.lengths - 1, **options)
        assert (hidden - torch.stack([row[-2] for row in want])).abs().max() < 1e-5
        double = case.fresh().double()
        hidden, state = inputs.run(double, state, begin=state.lengths, end=inputs.lengths, **options)
    assert hidden.dtype == state.blocks[0].keys.dtype == torch.float64
    assert (hidden - torch.stack([row[-1] for row in want])).abs().max() < 1e-5


def test_gradients_go_through_a_state(cases):
    """A sequence in two pieces has the gradients of the whole, keys and values in the state among them."""
    case = cases["decoder"]
    inputs = case.inputs([9, 4])
    cut = torch.tensor([5, 2])
    gradients = []
    for pieces in (1, 2):
        network = case.fresh()
        if pieces == 1:
            hidden = inputs.run(network)[0]
        else:
            first, state = inputs.run(network, end=cut, return_state=True)
            second, _ = inputs.run(network, state, begin=cut, return_state=True)
            parts = zip(first.split([5, 2]), second.split([4, 2]), strict=True)
            hidden = torch.cat([torch.cat(pair) for pair in parts])
        hidden.square().mean(1).cumsum(0).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

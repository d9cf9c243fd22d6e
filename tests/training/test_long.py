"""Sequences longer than a piece: exact gradients piece by piece, whatever is cut where."""

from __future__ import annotations

import pytest
import torch
from processive.backbones import BackboneState, TransformerConfig, XLSTMConfig
from processive.errors import ConfigError
from processive.models import HeadConfig, LanguageModel
from processive.sequences import PackedBatch
from processive.training.long import backward_in_pieces, loss_in_pieces, piece_loss, pieces_of
from processive.training.objectives import Objective
from processive.training.passes import Direct
from processive.training.step import loss_sum

SIZE = 12  # of the letters' vocabulary
NETWORKS = {
    "mlstm and slstm": XLSTMConfig(SIZE, 16, 3, heads=2, blocks=("mlstm", "slstm", "mlstm")),
    "7b": XLSTMConfig(SIZE, 16, 2, heads=2, blocks="mlstm-7b"),
    "rotary xlstm": XLSTMConfig(SIZE, 16, 2, heads=2, rotary="width", positions="sinusoidal"),
    "transformer": TransformerConfig(SIZE, 16, 2, heads=2, direction="causal"),
    "window": TransformerConfig(SIZE, 16, 2, heads=2, direction="causal", window=5),
}


def make(tokenizer, config, *, head=None, dtype=torch.float64):
    torch.manual_seed(1)
    model = LanguageModel(tokenizer, config, head).to(dtype)
    for parameter in model.parameters():  # gates start at 0, and so would much of what is to be found
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_objective(rng, lengths):
    generator = torch.Generator().manual_seed(int(rng.integers(1000)))
    total = sum(lengths)
    batch = PackedBatch.from_lengths(
        torch.randint(SIZE, (total,), generator=generator), torch.tensor(lengths, dtype=torch.int64)
    )
    weights = torch.rand(total, generator=generator) * (torch.rand(total, generator=generator) < 0.7)
    return Objective(batch, torch.randint(SIZE, (total,), generator=generator), weights)


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(found, wanted, tolerance=1e-10):
    assert found.keys() == wanted.keys() and any(g is not None and g.norm() > 1e-3 for g in wanted.values())
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
            continue
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error <= tolerance or (found[name] - gradient).norm() < 1e-14, (name, float(error))


def test_pieces_by_hand():
    batch = PackedBatch.from_lengths(torch.arange(8), torch.tensor([3, 0, 5]))
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, batch.positions, {"species": torch.tensor([7, 8, 9])})
    pieces = pieces_of(Objective(batch, torch.arange(8) + 1, torch.ones(8)), 3)
    assert [(p.continues, p.goes_on) for p in pieces] == [(False, False), (False, True), (True, False)]
    assert [p.objective.batch.tokens.tolist() for p in pieces] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [p.objective.batch.positions.tolist() for p in pieces] == [[0, 1, 2], [0, 1, 2], [3, 4]]
    assert [p.objective.batch.cu_seqlens.tolist() for p in pieces] == [[0, 3], [0, 3], [0, 2]]
    assert [p.objective.batch.conditions["species"].tolist() for p in pieces] == [[7], [9], [9]]
    assert [p.objective.targets.tolist() for p in pieces] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    (whole,) = pieces_of(Objective(batch, torch.arange(8), torch.ones(8)), 8)
    assert not whole.continues and not whole.goes_on


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tokens", [1, 4, 7, 100])
def test_gradients_are_those_of_the_whole(name, tokens, tokenizer, rng):
    model = make(tokenizer, NETWORKS[name])
    cases = [[7], [1, 3, 0, 2]] if tokens == 1 else [[21], [1, 9, 0, 12, *rng.integers(1, 9, 3).tolist()]]
    for lengths in cases:
        objective = random_objective(rng, lengths)
        wanted_loss = piece_loss(model, objective)[0] * 0.25
        wanted_loss.backward()
        wanted = gradients(model)
        loss = backward_in_pieces(Direct(model), objective, tokens=tokens, scale=0.25)
        assert not loss.requires_grad and torch.allclose(loss, wanted_loss.detach(), rtol=1e-10)
        assert_equal_gradients(gradients(model), wanted)
        assert torch.allclose(loss_in_pieces(Direct(model), objective, tokens=tokens) * 0.25, wanted_loss, rtol=1e-10)


class InStep(Direct):
    """Passes as those of one of several processes, of which another has two pieces more."""

    def __init__(self, model):
        super().__init__(model)
        one = PackedBatch.from_lengths(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
        with torch.no_grad():
            self.empty = model.backbone(one, return_state=True)[1].select(torch.arange(0))
        self.lasts = []

    def backward(self, loss, *, last=True):
        self.lasts.append(last)
        super().backward(loss, last=last)

    def most(self, passes):
        return passes + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_pieces_in_step_with_those_of_other_processes(name, tokenizer, rng):
    model = make(tokenizer, NETWORKS[name])
    objective = random_objective(rng, [1, 9, 0, 5, 12])  # 15 tokens: one piece ends with its sequence
    wanted_loss = piece_loss(model, objective)[0]
    wanted_loss.backward()
    wanted = gradients(model)
    passes = InStep(model)
    assert torch.allclose(backward_in_pieces(passes, objective, tokens=5), wanted_loss, rtol=1e-10)
    assert passes.lasts == [False] * 7 + [True]
    assert_equal_gradients(gradients(model), wanted)
    assert torch.allclose(loss_in_pieces(passes, objective, tokens=5), wanted_loss, rtol=1e-10)
    assert backward_in_pieces(passes, random_objective(rng, []), tokens=4, last=False) == 0
    assert passes.lasts[8:] == [False] * 2


def test_tied_head_conditions_and_checkpointed_blocks(tokenizer, rng):
    model = make(tokenizer, NETWORKS["mlstm and slstm"], head=HeadConfig(tied=True, conditions=(("species", 3),)))
    model.backbone.gradient_checkpointing = True
    objective = random_objective(rng, [9, 4, 8])
    batch = objective.batch
    batch = PackedBatch(batch.tokens, batch.cu_seqlens, batch.positions, {"species": torch.tensor([1, 0, 3])})
    objective = Objective(batch, objective.targets, objective.weights)
    piece_loss(model, objective)[0].backward()
    wanted = gradients(model)
    backward_in_pieces(Direct(model), objective, tokens=5)
    assert_equal_gradients(gradients(model), wanted)


def test_frozen_backbone_and_weights_of_zero(tokenizer, rng):
    model = make(tokenizer, NETWORKS["mlstm and slstm"])
    objective = random_objective(rng, [12])
    weights = objective.weights.clone()
    weights[:8] = 0  # the first pieces teach only through their state
    late = Objective(objective.batch, objective.targets, weights)
    piece_loss(model, late)[0].backward()
    wanted = gradients(model)
    backward_in_pieces(Direct(model), late, tokens=4)
    assert_equal_gradients(gradients(model), wanted)
    silent = Objective(objective.batch, objective.targets, torch.zeros(12))
    assert backward_in_pieces(Direct(model), silent, tokens=4) == 0
    assert all(g is None or not g.any() for g in gradients(model).values())
    model.backbone.requires_grad_(False)
    piece_loss(model, objective)[0].backward()
    wanted = gradients(model)
    backward_in_pieces(Direct(model), objective, tokens=4)
    assert_equal_gradients(gradients(model), wanted)
    assert backward_in_pieces(Direct(model), random_objective(rng, []), tokens=4) == 0


@pytest.mark.parametrize("name", ["mlstm and slstm", "7b", "transformer"])
def test_dropout_draws_the_same_in_both_passes(name, tokenizer, rng):
    config = NETWORKS[name]
    model = make(tokenizer, type(config)(**{**vars(config), "dropout": 0.4}))
    objective = random_objective(rng, [13])
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (3,)).tolist()
    state, total = None, 0
    for piece, seed in zip(pieces_of(objective, 5), seeds, strict=True):  # with one graph through all pieces
        torch.manual_seed(seed)
        loss, state = piece_loss(model, piece.objective, state, return_state=True)
        total = total + loss
    total.backward()
    wanted = gradients(model)
    torch.manual_seed(5)
    assert torch.allclose(backward_in_pieces(Direct(model), objective, tokens=5), total, rtol=1e-10)
    assert_equal_gradients(gradients(model), wanted)
    torch.manual_seed(6)
    backward_in_pieces(Direct(model), objective, tokens=5)
    other = gradients(model)
    assert not torch.allclose(other["head.weight"], wanted["head.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", ["mlstm and slstm", "7b"])
def test_memory_is_that_of_one_piece(name, tokenizer, rng):
    model = make(tokenizer, NETWORKS[name], dtype=torch.float32)

    def most_held(read):
        """The most bytes that a graph holds at one time, counted by the storages that it saves."""
        held, most = {}, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal most
                self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
                size, count = held.get(self.key, (tensor.untyped_storage().nbytes(), 0))
                held[self.key] = (size, count + 1)
                most = max(most, sum(size for size, _ in held.values()))

            def __del__(self):
                size, count = held.pop(self.key)
                if count > 1:
                    held[self.key] = (size, count - 1)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            read()
        model.zero_grad()
        return most

    short, long = random_objective(rng, [128]), random_objective(rng, [1024])
    plain = [most_held(lambda o=o: piece_loss(model, o)[0].backward()) for o in (short, long)]
    cut = most_held(lambda: backward_in_pieces(Direct(model), long, tokens=128))
    assert plain[1] > 4 * plain[0]  # the count is one of activations
    assert cut < 1.5 * plain[0], (cut, plain)


def test_caches_of_a_transformer_stand_in_one_memory(tokenizer, rng, monkeypatch):
    from processive.training import long

    model = make(tokenizer, NETWORKS["transformer"])
    pieces = pieces_of(random_objective(rng, [3, 20, 2]), 5)
    states = long._read_ahead(Direct(model), pieces, [0] * len(pieces))
    assert [None if state is None else int(state.lengths[0]) for state in states] == [None, 2, 7, 12, 17]
    storages = {state.blocks[0].keys.untyped_storage().data_ptr() for state in states[1:]}
    assert len(storages) == 1


def test_the_loss_is_that_of_the_loop(tokenizer, rng):
    model = make(tokenizer, NETWORKS["7b"], dtype=torch.float32)
    objective = random_objective(rng, [9, 30])
    assert torch.equal(piece_loss(model, objective)[0], loss_sum(model, objective))


def test_bidirectional_backbones_are_refused(make_model, rng):
    model = make_model("masked")
    for read in (backward_in_pieces, loss_in_pieces):
        with pytest.raises(ConfigError, match=r'causal backbones.*long="cut"'):
            read(Direct(model), random_objective(rng, [9]), tokens=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_states_side_by_side(name, tokenizer, rng):
    """Spread, concatenated and read back from named tensors, a state is that of the same sequences."""
    model = make(tokenizer, NETWORKS[name])
    batch = random_objective(rng, [3, 8, 5]).batch
    state = model.backbone(batch, return_state=True)[1]
    parts = BackboneState.concatenate([state.select(torch.tensor([i])) for i in range(3)])
    for one, other in (
        (state, parts),
        (state, parts.with_tensors(state.tensors())),
        (state, state.spread(torch.tensor([1, 3, 4]), 6).select(torch.tensor([1, 3, 4]))),
    ):
        named = other.tensors()
        assert one.tensors().keys() == named.keys()
        assert all(torch.equal(tensor, named[name]) for name, tensor in one.tensors().items())
    fresh = state.spread(torch.tensor([1, 3, 4]), 6)
    more = PackedBatch.from_lengths(torch.arange(12), torch.full((6,), 2), offsets=fresh.lengths)
    hidden = more.split(model.backbone(more, fresh)[0])
    alone = PackedBatch.from_lengths(torch.arange(4, 6), torch.tensor([2]))
    assert torch.allclose(hidden[2], model.backbone(alone)[0], atol=1e-12)  # the third has seen nothing
    with pytest.raises(KeyError):
        state.with_tensors({"lengths": state.lengths})

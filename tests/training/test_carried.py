"""Sequences read step after step: lanes, what is carried, and resuming in the middle of a sequence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel
from processive.sequences import TokenStore
from processive.training import Mixture, TrainingConfig, lanes, read_metrics, train
from processive.training.batches import even_share
from processive.training.carried import Carried, backward_carried
from processive.training.data import Pieces
from processive.training.lanes import GOES_ON, Lanes, deal
from processive.training.long import piece_loss
from processive.training.objectives import causal
from processive.training.passes import Direct
from safetensors.torch import load_file, save_file

SIZE = 12


def make(tokenizer, **settings):
    torch.manual_seed(1)
    config = XLSTMConfig(SIZE, 16, 2, heads=2, **{"blocks": ("mlstm", "slstm"), **settings})
    model = LanguageModel(tokenizer, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def texts(rng):
    """Long and short, among them some without anything to predict."""
    return [rng.integers(4, SIZE, n) for n in (40, 3, 1, 17, 2, 0, 25, 9, 4, 31, 5, 2)]


def test_lanes_by_hand():
    order = np.array([2, 0, 1])
    steps = Lanes(np.array([8, 3, 4]), order, tokens=3, lanes=2)  # to read: 7, 2 and 3 tokens
    assert [lane.tolist() for lane in deal(np.array([8, 3, 4]), order, 2)] == [[0], [2, 1]]
    found = [
        [(s.sequences.tolist(), s.starts.tolist(), s.lengths.tolist(), s.goes_on.tolist()) for s in step]
        for step in steps
    ]
    assert found == [
        [([0, 2], [0, 0], [3, 3], [True, False])],
        [([0, 1], [3, 0], [3, 2], [True, False])],
        [([0], [6], [1], [False])],
    ]
    pieces = Pieces([np.arange(8), np.arange(8, 11), np.arange(4)])
    batch = steps[1][0].batch(pieces, vocabulary_size=SIZE)
    assert batch.tokens.tolist() == [3, 4, 5, 6, 8, 9, 10] and batch.positions.tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert batch.conditions[GOES_ON].tolist() == [True, False]
    with pytest.raises(InputError, match="Token id 10 is not"):
        steps[1][0].batch(pieces, vocabulary_size=10)


@pytest.mark.parametrize(("greedy", "stride"), [(2**16, 2**10), (3, 2), (1, 1)])
@pytest.mark.parametrize(("count", "tokens", "batches"), [(1, 5, 1), (3, 4, 1), (2, 7, 2), (20, 3, 1)])
def test_each_token_is_read_once_and_in_order(count, tokens, batches, greedy, stride, texts, rng, monkeypatch):
    monkeypatch.setattr(lanes, "GREEDY", greedy)
    monkeypatch.setattr(lanes, "STRIDE", stride)
    monkeypatch.setattr(lanes, "BLOCK", 4 * stride)
    lengths = np.array([len(text) for text in texts])
    steps = Lanes(lengths, rng.permutation(len(texts)), tokens=tokens, lanes=count, batches=batches)
    reached = np.zeros(len(texts), int)
    open_before = []
    for groups in steps:
        assert len(groups) == batches
        step = [spans for spans in groups if spans is not None]
        assert step
        continued, open_after = [], []
        for spans in step:
            assert spans.lengths.sum() <= tokens * count
            for sequence, start, length, goes_on in zip(*spans, strict=True):
                assert start == reached[sequence] and length > 0
                reached[sequence] += length
                assert goes_on == (reached[sequence] < lengths[sequence] - 1)
                continued += [sequence] if start else []
                open_after += [sequence] if goes_on else []
        assert continued == open_before  # so that the rows of the state need no names
        open_before = open_after
    assert not open_before and reached.tolist() == np.maximum(lengths - 1, 0).tolist()
    first, other = ([part and len(part.sequences) for part in steps[at]] for at in (-1, len(steps) - 1))
    assert first == other
    with pytest.raises(IndexError):
        steps[len(steps)]


def test_lanes_end_together(rng):
    lengths = np.maximum(rng.lognormal(6, 1.5, 3000), 2).astype(np.int32)
    for order in (np.arange(3000), rng.permutation(3000)):
        steps = Lanes(lengths, order, tokens=256, lanes=16)
        assert (lengths - 1).sum() > 0.97 * len(steps) * 256 * 16
    equal_ones = deal(np.full(10**5, 7), rng.permutation(10**5), 8)  # more than are dealt one by one, none longer
    assert {len(lane) for lane in equal_ones} == {12500}


def test_an_order_is_kept_within_a_lane(texts, rng):
    order = rng.permutation(len(texts))
    place = np.argsort(order)
    for lane in deal(np.array([len(text) for text in texts]), order, 3):
        assert (np.diff(place[lane]) > 0).all()


@pytest.mark.parametrize("blocks", [("mlstm", "slstm"), ("mlstm-7b", "mlstm-7b"), None])
def test_carried_losses_are_those_of_whole_sequences(blocks, tokenizer, texts):
    """Each step's gradient is that of its own tokens behind a state that is given."""
    if blocks is None:
        window = TransformerConfig(SIZE, 16, 2, heads=2, direction="causal", window=6)
        model = LanguageModel(tokenizer, window).double()
    else:
        model = make(tokenizer, blocks=blocks, rotary="width").double()
    pieces = Pieces(texts)
    steps = Lanes(pieces.lengths, pieces.order(seed=0, epoch=0), tokens=5, lanes=2, batches=2)
    carried, total = Carried(), 0.0
    for number, step in enumerate(steps):
        model.zero_grad()
        for n, spans, counted in even_share(step, rank=0, world_size=1):
            batch = spans.batch(pieces, vocabulary_size=SIZE)
            objective = causal(batch, model.vocabulary, torch.Generator())
            assert objective.weights.sum() == spans.lengths.sum()  # no target is lost at a cut
            total += float(backward_carried(Direct(model), objective, carried, number=n, counted=counted))
        carried.end_step()
        if number == 3:
            found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
            model.zero_grad()
            for spans in step:
                for sequence, start, length, _ in zip(*spans, strict=True):
                    given = causal(
                        Pieces([pieces[int(sequence)][: start + 1]]).batch([0], vocabulary_size=SIZE),
                        model.vocabulary,
                        torch.Generator(),
                    )
                    state = None
                    if start:
                        with torch.no_grad():
                            state = model.backbone(given.batch, return_state=True)[1]
                    part = Pieces([pieces[int(sequence)][start : start + length + 1]]).batch([0], vocabulary_size=SIZE)
                    part = type(part)(part.tokens, part.cu_seqlens, part.positions + int(start))
                    piece_loss(model, causal(part, model.vocabulary, torch.Generator()), state)[0].backward()
            wanted = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            for one, other in zip(found, wanted, strict=True):
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    assert not carried.states
    whole = causal(pieces.batch(range(len(pieces)), vocabulary_size=SIZE), model.vocabulary, torch.Generator())
    assert total == pytest.approx(float(piece_loss(model, whole)[0].detach()), rel=1e-10)


SETTINGS = {"long": "carry", "max_length": 4, "batch_tokens": 12, "log_every": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stopped_in_the_middle_of_sequences_and_resumed(accumulation, tokenizer, texts, tmp_path, signal_in_step):
    config = TrainingConfig(steps=14, accumulation=accumulation, **SETTINGS)
    whole = make(tokenizer, dropout=0.2)
    train(whole, texts, config, out=tmp_path / "whole", progress=False)
    stopped = make(tokenizer, dropout=0.2)
    out = tmp_path / "stopped"
    signal_in_step(5)
    assert train(stopped, texts, config, out=out, progress=False)["interrupted"]
    state = load_file(out / "checkpoint" / "state.safetensors")
    assert len(state["lengths"]) > 1 and int(state["lengths"].min()) > 0
    again = make(tokenizer, dropout=0.2)
    train(again, texts, config, out=out, resume=True, progress=False)
    assert equal(weights(again), weights(whole))
    lines = [
        [(line["step"], line["loss"], line["tokens"]) for line in read_metrics(tmp_path / f)]
        for f in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]


def test_resuming_without_the_state_is_refused(tokenizer, texts, tmp_path):
    config = TrainingConfig(steps=9, **SETTINGS)
    train(make(tokenizer), texts, TrainingConfig(steps=9, checkpoint_every=3, **SETTINGS), out=tmp_path, progress=False)
    file = tmp_path / "checkpoint" / "state.safetensors"
    run = tmp_path / "checkpoint" / "run.json"
    standing = json.loads(run.read_text())
    standing["standing"]["step"] = 8  # one step is left, which goes on with sequences
    run.write_text(json.dumps(standing))
    state = load_file(file)
    model = make(tokenizer)
    file.write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        train(model, texts, config, out=tmp_path, resume=True, progress=False)
    save_file({"lengths": state["lengths"]}, file)
    with pytest.raises(InputError, match="damaged"):
        train(model, texts, config, out=tmp_path, resume=True, progress=False)
    file.unlink()
    with pytest.raises(InputError, match="state of 0"):
        train(model, texts, config, out=tmp_path, resume=True, progress=False)


def test_an_epoch_is_read_whole_from_lists_stores_and_mixtures(tokenizer, texts, tmp_path):
    store = TokenStore.write(tmp_path / "store", texts, vocabulary_size=SIZE)
    models = []
    for name, data in (("list", texts), ("store", store), ("mixture", Mixture((store, texts[3:5]), (1, 0.5)))):
        models.append(make(tokenizer))
        metrics = train(models[-1], data, TrainingConfig(epochs=2, **SETTINGS), out=tmp_path / name, progress=False)
        assert metrics["epoch"] == 2
        if name != "mixture":
            assert metrics["tokens"] == 2 * sum(len(text) for text in texts if len(text) > 1)
        assert not (tmp_path / name / "checkpoint" / "state.safetensors").exists()  # at the end of an epoch
    assert equal(weights(models[0]), weights(models[1])) and not equal(weights(models[0]), weights(models[2]))


def test_whole_gives_the_weights_of_uncut_training(tokenizer, texts, tmp_path):
    found, losses = [], []
    for settings in ({}, {"long": "whole", "max_length": 7}, {"max_length": 7}):
        model = make(tokenizer)
        config = TrainingConfig(steps=6, batch_tokens=30, learning_rate=1e-3, **settings)
        out = tmp_path / str(len(found))
        losses.append(train(model, texts, config, out=out, validation=texts, progress=False)["validation_loss"])
        found.append(torch.cat([tensor.flatten() for tensor in weights(model).values()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    other = (found[0] - found[2]).norm()  # a gradient of rounding alone moves AdamW as far as any other
    assert (found[0] - found[1]).norm() < 0.02 * other and other > 1e-2


def test_validation_of_carried_training_is_that_of_whole_sequences(tokenizer, texts, tmp_path):
    model = make(tokenizer)
    config = TrainingConfig(steps=3, **SETTINGS)
    metrics = train(model, texts, config, out=tmp_path, validation=texts, progress=False)
    pieces = Pieces(texts)
    objective = causal(pieces.batch(range(len(pieces)), vocabulary_size=SIZE), model.vocabulary, torch.Generator())
    with torch.no_grad():
        wanted = float(piece_loss(model.eval(), objective)[0]) / objective.weight
    assert metrics["validation_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_store_reads_no_more_than_the_part(tmp_path, monkeypatch):
    store = TokenStore.write(tmp_path / "store", [np.arange(10), np.arange(100) % 12], vocabulary_size=SIZE)
    assert store.part(1, 5, 9).tolist() == [5, 6, 7, 8] and store.part(0, 8, 30).tolist() == [8, 9]
    assert store.part(0, 5, 2).tolist() == [] and store.part(1, -2, 100).tolist() == [2, 3]
    with pytest.raises(IndexError):
        store.part(2, 0, 1)
    asked = []
    read = TokenStore._read
    monkeypatch.setattr(TokenStore, "_read", lambda *given: asked.append(given[1:]) or read(*given))
    assert Pieces(store, max_length=30)[2].tolist() == (np.arange(30, 60) % 12).tolist()
    assert asked[-1] == (1, 40, 70)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"long": "piecewise"}, "cut, carry, whole"),
        ({"long": "whole"}, "needs max_length"),
        ({"long": "carry"}, "needs max_length"),
        ({"long": "whole", "max_length": 9, "objective": "masked"}, "causal objectives"),
        ({"long": "carry", "max_length": 9, "objective": "fill-in"}, 'Use long="whole"'),
        ({"long": "carry", "max_length": 9, "batch_tokens": 8}, "less than one lane"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(ConfigError, match=said):
        TrainingConfig(steps=1, **settings)


def test_a_cache_that_grows_is_not_carried(tokenizer, texts, tmp_path):
    model = LanguageModel(tokenizer, TransformerConfig(SIZE, 16, 1, heads=2, direction="causal"))
    with pytest.raises(ConfigError, match=r'does not grow.*"whole"'):
        train(model, texts, TrainingConfig(steps=1, **SETTINGS), out=tmp_path, progress=False)
    whole = TrainingConfig(steps=2, long="whole", max_length=6, batch_tokens=20)
    assert train(model, texts, whole, out=tmp_path, progress=False)["step"] == 2
    with pytest.raises(InputError, match="two tokens"):
        train(make(tokenizer), [[4], [5]], TrainingConfig(steps=1, **SETTINGS), out=tmp_path / "one", progress=False)

"""Labels, preferences and views through the loop: losses by hand, batches, resuming, files, and what is refused."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processive.errors import ConfigError, InputError
from processive.inference import predict
from processive.models import AdapterConfig, add_adapter, add_task, load, load_adapter
from processive.sequences import PackedBatch
from processive.sequences import tokenizer as tokenizers
from processive.training import Labelled, Mixture, Preferences, TrainingConfig, add_detector, step, train
from processive.training.carried import Carried
from processive.training.data import Pieces
from processive.training.optimizer import make_optimizer
from processive.training.passes import Direct
from safetensors.torch import load_file

NAN = math.nan
WORDS = ["abc", "d", "hgfeab", "aa", "cd"]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def one_step(model, data, **settings):
    """Loss and gradients of one step of the loop, taken by a copy of the model, on all of the data in two batches."""
    model = copy.deepcopy(model)
    config = TrainingConfig(steps=1, clip=0.0, **settings)
    pieces = Pieces(data)
    objectives = [
        step.make_objective(pieces.batch(group, vocabulary_size=len(model.vocabulary)), model, config, step.MASKS, 0, n)
        for n, group in enumerate(np.array_split(range(len(data)), 2))
    ]
    loss = taken(model, objectives, config)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def taken(model, objectives, config):
    """The loss of one step, after which the model has its gradients."""
    numbered = [(n, objective, True) for n, objective in enumerate(objectives)]
    return step.gradient_step(Direct(model), make_optimizer(model, config), numbered, config, Carried(), step=0)[0]


def answers_alone(model, sequences):
    """What the task head says of each sequence, read by itself."""
    rows = []
    for sequence in sequences:
        batch = PackedBatch.from_sequences([sequence])
        rows.append(model.task(model.backbone(batch)[0], batch, model.vocabulary))
    return rows


def same_gradients(model, loss, found):
    model.zero_grad()
    loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == found.keys() and any(name.startswith("task.") for name in own)
    for name, grad in own.items():
        torch.testing.assert_close(grad, found[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_numbers_by_hand(kind, make_model, tokenizer):
    model = make_model(kind, dropout=0.0)
    sequences = [tokenizer.encode(word) for word in WORDS]
    labels = np.array([[1.0, 10.0], [3.0, NAN], [NAN, NAN], [5.0, 30.0], [3.0, NAN]])
    data = Labelled(sequences, labels)
    config = data.task("one", "two", dropout=0.0)
    assert config.mean == (3.0, 20.0) and config.deviation == (pytest.approx(math.sqrt(2)), 10.0)
    add_task(model, config, seed=1)
    loss, gradients = one_step(model, data)
    answers = answers_alone(model, sequences)
    root = math.sqrt(2)
    by_hand = (
        (answers[0][0, 0] + 2 / root) ** 2
        + (answers[0][0, 1] + 1) ** 2
        + answers[1][0, 0] ** 2
        + (answers[3][0, 0] - 2 / root) ** 2
        + (answers[3][0, 1] - 1) ** 2
        + answers[4][0, 0] ** 2
    ) / 6
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)
    same_gradients(model, by_hand, gradients)


def test_yes_or_no_by_hand(make_model, tokenizer):
    model = make_model(dropout=0.0)
    sequences = [tokenizer.encode(word) for word in WORDS[:3]]
    data = Labelled(sequences, [1, 0, NAN], kind="binary", class_weights=[[1.0, 3.0]])
    add_task(model, data.task("active", dropout=0.0))
    loss, gradients = one_step(model, data)
    yes, no, _ = (answer[0, 0] for answer in answers_alone(model, sequences))
    by_hand = (3 * -F.logsigmoid(yes) - F.logsigmoid(-no)) / 4
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)
    same_gradients(model, by_hand, gradients)


def test_classes_of_tokens_by_hand(make_model, tokenizer):
    model = make_model("masked", dropout=0.0)
    data = Labelled.encode(tokenizer, ["abc", "d"], [[2, NAN, 0], [1]], kind="classes", level="token")
    add_task(model, data.task("helix", "strand", "coil", dropout=0.0))
    loss, gradients = one_step(model, data)
    one, other = answers_alone(model, data.sequences)
    assert one.shape == (5, 3)  # the begin and the end token are answered too, and have no label
    by_hand = -(one[1].log_softmax(0)[2] + one[3].log_softmax(0)[0] + other[1].log_softmax(0)[1]) / 3
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)
    same_gradients(model, by_hand, gradients)


def test_two_views_by_hand(make_model, tokenizer):
    model = make_model(dropout=0.0)
    words, others = ["abc", "dd"], ["cba", "dddd"]
    data = Labelled.encode(tokenizer, words, [1, NAN], kind="binary", views=others, consistency=0.5)
    assert len(data) == 2 and len(data[1]) == len("dd") + len("dddd") + 4
    add_task(model, data.task("active", dropout=0.0))
    loss, gradients = one_step(model, data)
    (a, b), (c, d) = (
        [answer[0, 0] for answer in answers_alone(model, [tokenizer.encode(w) for w in both])]
        for both in zip(words, others, strict=True)
    )
    p, q = a.sigmoid(), b.sigmoid()
    divergence = 0.5 * ((p - q) * (p.log() - q.log()) + (q - p) * ((1 - p).log() - (1 - q).log()))
    p, q = c.sigmoid(), d.sigmoid()
    divergence = divergence + 0.5 * ((p - q) * (p.log() - q.log()) + (q - p) * ((1 - p).log() - (1 - q).log()))
    by_hand = -0.5 * (F.logsigmoid(a) + F.logsigmoid(b)) + 0.5 * divergence  # one label is known
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)
    same_gradients(model, by_hand, gradients)


def causal_log_likelihood(model, sequence):
    batch = PackedBatch.from_sequences([sequence])
    log_p = model(batch)[0].log_softmax(-1)
    return sum(log_p[i, int(token)] for i, token in enumerate(sequence[1:]))


def same_language_gradients(model, loss, found):
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, found[name], rtol=1e-4, atol=1e-6)


def test_preferences_of_a_causal_model_by_hand(make_model, tokenizer):
    model = make_model(dropout=0.0)
    data = Preferences.of_pairs(
        [tokenizer.encode("abc"), tokenizer.encode("d")], [tokenizer.encode("ef"), tokenizer.encode("gh")], beta=0.3
    ).with_reference(model)
    by_model = [causal_log_likelihood(model, sequence) for sequence in data.sequences]
    assert data.reference == pytest.approx([value.item() for value in by_model], rel=1e-5)
    data.reference = np.array([-7.0, -9.0, -6.0, -8.0])  # of a model that stood elsewhere
    loss, gradients = one_step(model, data)
    a, b, c, d = [causal_log_likelihood(model, sequence) for sequence in data.sequences]
    by_hand = -(F.logsigmoid(0.3 * ((a + 7) - (b + 9))) + F.logsigmoid(0.3 * ((c + 6) - (d + 8)))) / 2
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)
    same_language_gradients(model, by_hand, gradients)


@pytest.mark.parametrize("marginal", ["masked-marginal", "wild-type-marginal"])
def test_preferences_of_a_masked_model_by_hand(marginal, make_model, tokenizer):
    model = make_model("masked", dropout=0.0)
    wild, variants = "abcd", ["abgd", "ebcd", "abhd", "gbch", "abcd"]
    values = np.array([2.0, 1.0, 1.2, NAN, 0.0])
    data = Preferences.encode(tokenizer, variants, values, gap=0.5, beta=2.0, wild_type=wild, marginal=marginal)
    data = data.with_reference(model)
    ids = model.vocabulary.ids

    def ratio(word):
        at = [i for i in range(4) if word[i] != wild[i]]
        tokens = tokenizer.encode(wild)
        if marginal == "masked-marginal":
            tokens[[i + 1 for i in at]] = ids["<mask>"]
        log_p = model(PackedBatch.from_sequences([tokens]))[0].log_softmax(-1)
        return sum((log_p[i + 1, ids[word[i]]] - log_p[i + 1, ids[wild[i]]] for i in at), torch.zeros(()))

    assert data.reference == pytest.approx([ratio(word).item() for word in variants], rel=1e-4, abs=1e-6)
    data.reference = np.array([0.5, -0.5, 0.0, 0.0, 0.25])
    pieces = Pieces(data)
    config = TrainingConfig(steps=1, clip=0.0)
    batch = pieces.batch(range(5), vocabulary_size=len(model.vocabulary))
    taught = [step.make_objective(batch, model, config, step.MASKS, 0, 0)]
    loss = taken(model, taught, config)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = make_model("masked", dropout=0.0)
    moved = [ratio(word) - before for word, before in zip(variants, data.reference, strict=True)]
    pairs = [(0, 1), (0, 2), (0, 4), (1, 4), (2, 4)]  # 1 and 2 are too near, and 3 was not measured
    by_hand = -sum(F.logsigmoid(2.0 * (moved[a] - moved[b])) for a, b in pairs) / len(pairs)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    same_language_gradients(model, by_hand, gradients)


def test_pairs_and_groups_are_never_split_over_batches(make_model, tokenizer, rng):
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 12))) for _ in range(60)]
    groups = [str(number) for number in rng.integers(0, 20, 60)]
    data = Preferences([tokenizer.encode(w) for w in words], rng.normal(size=60), groups=groups)
    pieces, model = Pieces(data), make_model()
    wanted = sum(groups[i] == groups[j] and data.values[i] > data.values[j] for i in range(60) for j in range(60))
    for epoch in range(3):
        seen, pairs = [], 0
        for indices in pieces.batches(batch_tokens=100, seed=0, epoch=epoch):
            batch = pieces.batch(indices, vocabulary_size=12)
            assert [int(n) for n in batch.lengths] == [len(data.sequences[row]) for row in batch.rows]
            for row, tokens in zip(batch.rows, batch.split(batch.tokens), strict=True):
                assert tokens.tolist() == data.sequences[row].tolist()
            seen += batch.rows.tolist()
            data.reference = np.zeros(60)
            pairs += len(batch.objective(model).pairs)
        assert sorted(seen) == list(range(60)) and pairs == wanted


@pytest.fixture
def named(monkeypatch, tokenizer):
    """Let models be loaded with the tests' tokenizer, which no package has declared."""
    monkeypatch.setattr(tokenizers, "tokenizer_class", {"letters": type(tokenizer)}.__getitem__)


@pytest.mark.parametrize("kind", ["labels", "preferences", "detector"])
def test_a_killed_run_goes_on_bit_for_bit(kind, make_model, sequences, tmp_path, rng, interrupted):
    model = make_model("masked" if kind == "detector" else "causal", dropout=0.2)
    data = sequences
    if kind == "detector":
        add_detector(model)
    elif kind == "labels":
        data = Labelled(sequences, rng.normal(size=len(sequences)))
        add_task(model, data.task(dropout=0.2))
    else:
        data = Preferences(sequences, rng.normal(size=len(sequences))).with_reference(model)
    start = weights(model)
    objective = "replaced" if kind == "detector" else "causal"
    config = TrainingConfig(objective=objective, steps=6, batch_tokens=80, checkpoint_every=2, log_every=1)
    train(model, data, config, out=tmp_path / "whole", progress=False)
    whole = weights(model)
    assert not torch.equal(whole["backbone.embedding.weight"], start["backbone.embedding.weight"])
    model.load_state_dict(start)
    with interrupted(3):
        train(model, data, config, out=tmp_path / "run", progress=False)
    train(model, data, config, out=tmp_path / "run", resume=True, progress=False)
    assert equal(weights(model), whole) and equal(load_file(tmp_path / "run" / "model.safetensors"), whole)
    lines = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines == wanted


def test_other_labels_are_another_run(make_model, sequences, tmp_path):
    model = make_model()
    labels = np.arange(len(sequences), dtype=float)
    data = Labelled(sequences, labels)
    add_task(model, data.task())
    config = TrainingConfig(steps=1, batch_tokens=80)
    train(model, data, config, out=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="another data"):
        train(model, Labelled(sequences, labels + 1), config, out=tmp_path, resume=True, progress=False)


def test_labels_are_learned_saved_and_loaded(named, make_model, sequences, tokenizer, tmp_path):
    model = make_model("masked", dropout=0.0)
    words = [tokenizer.decode(sequence) for sequence in sequences]
    data = Labelled.encode(tokenizer, words, [5.0 + 3 * word.count("a") for word in words])
    add_task(model, data.task("letters a", dropout=0.0))
    lm_head = model.head.weight.clone()
    config = TrainingConfig(epochs=30, batch_tokens=200, learning_rate=5e-3, precision="fp32")
    metrics = train(model, data, config, out=tmp_path, validation=data, progress=False)
    assert metrics["validation_loss"] < 0.1  # of a variance of 1
    assert torch.equal(model.head.weight, lm_head) and model.head.weight.requires_grad
    again = load(tmp_path)
    assert again.task_config == model.task_config
    found = predict(model, [*words, None, "abab"])
    assert equal(weights(again), weights(model))
    np.testing.assert_allclose(predict(again, [*words, None, "abab"]), found, rtol=1e-6)
    assert np.isnan(found[-2]) and abs(found[-1] - 11) < 2
    assert np.corrcoef(found[: len(words)], data.labels[:, 0])[0, 1] > 0.97


@pytest.mark.parametrize("trained", ["head", "lora"])
def test_what_is_frozen_stays(trained, make_model, sequences, tmp_path, rng):
    model = make_model()
    data = Labelled(sequences, (rng.random(len(sequences)) < 0.5).astype(float), kind="binary")
    if trained == "lora":
        add_task(model, data.task("active"))
        base = make_model()
        add_adapter(model, AdapterConfig(rank=2, targets=("backbone.blocks.*",)))
    else:
        add_task(model, data.task("active"))
    start = weights(model)
    config = TrainingConfig(steps=3, batch_tokens=80, trained="all" if trained == "lora" else "head", warmup=0)
    train(model, data, config, out=tmp_path, progress=False)
    after = weights(model)
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert {name for name in changed if name.startswith("task.")} == {n for n in start if n.startswith("task.")}
    if trained == "head":
        assert all(name.startswith("task.") for name in changed)
        return
    assert all(name.startswith("task.") or ".adapters." in name for name in changed)
    assert not (tmp_path / "model.safetensors").exists()
    words = ["abc", "hgf", "a"]
    model.eval()
    load_adapter(base.eval(), tmp_path)
    assert np.array_equal(predict(base, words), predict(model, words))


def test_answers_are_read(make_model, tokenizer):
    model = make_model("masked", dropout=0.0)
    with pytest.raises(ConfigError, match="learned no labels"):
        predict(model, ["abc"])
    data = Labelled.encode(tokenizer, ["abc", "d"], [[2, NAN, 0], [1]], kind="classes", level="token")
    add_task(model, data.task("x", "y", "z"))
    model.eval()
    one, none, two = predict(model, ["abc", None, "d"])
    answers = answers_alone(model, data.sequences)
    assert one.shape == (3, 3) and none.shape == (0, 3)
    assert np.allclose(one, answers[0][1:4].detach().softmax(-1).numpy(), atol=1e-6)
    assert np.allclose(two, answers[1][1:2].detach().softmax(-1).numpy(), atol=1e-6)
    binary = Labelled.encode(tokenizer, ["abc", "d"], [1, 0], kind="binary")
    add_task(model, binary.task("active"))
    model.eval()
    found = predict(model, ["abc", "d"])
    assert np.allclose(found, [a.sigmoid().item() for a in answers_alone(model, binary.sequences)], atol=1e-6)


def test_wrong_labels_are_named(tokenizer):
    def refused(labels, match, **options):
        with pytest.raises((InputError, ConfigError), match=match):
            Labelled.encode(tokenizer, ["abc", "d", "ef"], labels, **options)

    refused([1.0, 2.0], r"shape \[2\]; 3 sequences")
    refused([1.0, math.inf, 2.0], "record 2: The label is inf; it can be a finite number")
    refused([0, 1, 0.5], "record 3: The label is 0.5; it can be 0, 1", kind="binary")
    refused([0, 1, -1], "record 3: The label is -1", kind="classes")
    refused([NAN] * 3, "no label is known")
    refused([0, 1, 5], "6 classes or more, not 3", kind="classes", classes=3)
    refused([[0, 1], [1, 0], [1, 1]], "2 columns", kind="classes")
    refused([[1, 0, 1], [1, 1], [0, 0]], "record 2: There are 2 labels, and 1 token", level="token", kind="binary")
    refused([[1, 0, 1], [1], [0, 7]], "record 3, position 3: The label is 7", level="token", kind="binary")
    refused([[1, 0, 1]], "labels of 1 sequences, and 3", level="token")
    refused([1, 2, 3], "kind is 'number'", kind="number")
    refused([1, 2, 3], "level is 'word'", level="word")
    refused([1, 0, 1], r"class_weights has shape \[2\]", kind="binary", class_weights=[1, 2])
    refused([1, 2, 3], "views are for level", views=["abc"])
    refused([1, 2, 3], "needs views", consistency=1.0)
    with pytest.raises(InputError, match="record 2"):
        Labelled.encode(tokenizer, ["abc"], [1.0, 2.0][:1]).check and Labelled([[1, 2], [3]], [1.0, math.inf])


def test_wrong_preferences_are_named(tokenizer, make_model):
    encoded = [tokenizer.encode(word) for word in ("ab", "cd", "ef")]
    with pytest.raises(InputError, match="no two values differ by more than 1"):
        Preferences(encoded, [1.0, 2.0, NAN], gap=1.0)
    with pytest.raises(InputError, match="nothing to compare"):
        Preferences(encoded, [1.0, 2.0, 3.0], groups=["x", "y", "z"])
    with pytest.raises(InputError, match=r"shape \[2\]; there are 3"):
        Preferences(encoded, [1.0, 2.0])
    with pytest.raises(InputError, match="2 groups, and 3"):
        Preferences(encoded, [1.0, 2.0, 3.0], groups=["x", "y"])
    with pytest.raises(InputError, match="record 2: A sequence of less than two"):
        Preferences([encoded[0], [1], encoded[1]], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="record 1: The sequence has 4 tokens, and the wild type 5"):
        Preferences(encoded, [1.0, 2.0, 3.0], wild_type=tokenizer.encode("abc"))
    with pytest.raises(InputError, match="2 preferred sequences and 1"):
        Preferences.of_pairs(encoded[:2], encoded[2:])
    for options in ({"gap": -1.0}, {"beta": 0.0}):
        with pytest.raises(ConfigError, match="gap is at least 0 and beta positive"):
            Preferences(encoded, [1.0, 2.0, 3.0], **options)
    data = Preferences(encoded, [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="give Preferences its wild_type"):
        data.with_reference(make_model("masked"))
    with pytest.raises(ConfigError, match="leave wild_type out"):
        Preferences(encoded, [1.0, 2.0, 3.0], wild_type=encoded[0]).with_reference(make_model())


def test_what_the_loop_refuses(make_model, sequences, tmp_path):
    model = make_model()
    data = Labelled(sequences, np.arange(float(len(sequences))))
    config = TrainingConfig(steps=1)

    def refused(match, data=data, config=config, **options):
        with pytest.raises(ConfigError, match=match):
            train(model, data, config, out=tmp_path / "run", progress=False, **options)
        assert not (tmp_path / "run").exists()

    refused("no head for labels")
    add_task(model, data.task())
    refused("max_length = 5 would cut", config=TrainingConfig(steps=1, max_length=5))
    refused("Validation must be Labelled too, not list", validation=sequences)
    refused("Validation is Labelled", data=sequences, validation=data)
    refused("mixture is of plain", data=Mixture((sequences, data), (1, 1)))
    classes = Labelled(sequences, np.arange(len(sequences)) % 3, kind="classes")
    refused("regression with 1 output per sequence, and the labels are classes with 3 outputs", data=classes)
    refused("with_reference", data=Preferences(sequences, np.arange(float(len(sequences)))))


def test_plain_training_leaves_the_task_head_alone(make_model, sequences, tmp_path):
    model = make_model()
    add_task(model, Labelled(sequences, np.arange(float(len(sequences)))).task())
    before = model.task.dense.weight.clone()
    train(model, sequences, TrainingConfig(steps=2, batch_tokens=80), out=tmp_path, progress=False)
    assert torch.equal(model.task.dense.weight, before) and model.task.dense.weight.requires_grad


def test_preferences_lower_their_loss(make_model, sequences, tokenizer, tmp_path):
    model = make_model()
    liked = np.array([tokenizer.decode(sequence).count("a") for sequence in sequences], float)
    data = Preferences(sequences, liked, beta=0.5).with_reference(model)
    config = TrainingConfig(steps=30, batch_tokens=400, learning_rate=3e-3, log_every=1)
    train(model, data, config, out=tmp_path, validation=data, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.1) and lines[-1]["validation_loss"] < 0.35

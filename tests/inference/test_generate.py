"""Generation: equal to the slow way, whatever the batch size, with a state that does not grow."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from processive import inference
from processive.backbones.layers import Linear
from processive.errors import ConfigError, InputError
from processive.inference import generate
from processive.inference.sampling import draw, filtered, uniforms
from processive.models.head import Head
from processive.sequences import PackedBatch


@torch.inference_mode()
def slowly(model, count, *, prompt="", max_length=512, seed=0, stop=(), **options):
    """Every sequence alone, the whole of it read again for each token."""
    model.eval()
    vocabulary, results = model.vocabulary, []
    ends = {vocabulary.require("eos"), *(vocabulary.ids[token] for token in stop)}
    banned = torch.tensor([i in vocabulary.special_ids - {vocabulary.require("eos")} for i in range(len(vocabulary))])
    for number in range(count):
        ids = model.tokenizer.encode(prompt).tolist()[:-1]
        for step in range(max_length):
            logits = model(PackedBatch.from_sequences([ids]))[0][-1:].masked_fill(banned, -torch.inf)
            token = int(draw(filtered(logits, **options), torch.from_numpy(uniforms(seed, np.array([number]), step))))
            if token in ends:
                break
            ids.append(token)
        results.append(model.tokenizer.decode(ids))
    return results


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "min_p": 0.05}], ids=str)
def test_equals_the_slow_way(kind, options, make_model):
    model = make_model(kind)
    wanted = slowly(model, 6, prompt="ab", max_length=15, seed=3, **options)
    assert len(set(wanted)) > 3
    found = generate(model, 6, prompts="ab", max_length=15, seed=3, **options)
    assert found == wanted


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
def test_does_not_depend_on_the_batch_size(kind, make_model):
    model = make_model(kind)
    wanted = generate(model, 12, max_length=15, batch_size=12)
    assert len({len(text) for text in wanted}) > 4  # they end at different times, so finished ones are dropped
    for batch_size in (5, 256):
        assert generate(model, 12, max_length=15, batch_size=batch_size) == wanted
    assert generate(model, 5, max_length=15) == wanted[:5]
    assert generate(model, 12, max_length=15, seed=1) != wanted


def test_prompts_in_order_each_counted_times(make_model):
    model = make_model()
    found = generate(model, 2, prompts=["abc", "", "h"], max_length=10, batch_size=4)
    assert len(found) == 6 and all(text.startswith("abc") for text in found[:2])
    assert all(text.startswith("h") for text in found[4:])
    assert len(generate(model, prompts=["a", "b"], max_length=3)) == 2
    assert len(generate(model, max_length=3)) == 1
    assert generate(model, 0) == []


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
def test_is_the_same_without_native_decoding(kind, make_model, monkeypatch):
    from processive.backbones import backbone

    model = make_model(kind)
    wanted = generate(model, 20, prompts=["", "abc"], max_length=30)
    monkeypatch.setattr(backbone, "decodes", lambda *_: False)
    assert generate(model, 20, prompts=["", "abc"], max_length=30) == wanted


@pytest.mark.parametrize("kind", ["xlstm", "decoder"])
def test_matrices_in_bfloat16_change_little(kind, make_model):
    """As ``models.load(folder, dtype=torch.bfloat16)`` makes them; reading many tokens, few, and one at a time."""
    model = make_model(kind).eval()
    low = copy.deepcopy(model)
    for module in low.modules():
        if isinstance(module, Linear | Head) and module.weight is not None:
            module.weight.data = module.weight.data.bfloat16()
    for count in (4, 40):
        batch = PackedBatch.from_sequences([[1, *(4 + i % 8 for i in range(count))]])
        want, got = model(batch)[0], low(batch)[0]
        assert got.dtype == torch.float32
        assert 0 < (got - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()
    found = generate(low, 10, prompts="ab", max_length=10, temperature=0)
    assert found == generate(model, 10, prompts="ab", max_length=10, temperature=0)


def test_greedy_is_one_answer(make_model):
    model = make_model()
    found = generate(model, 3, temperature=0, max_length=12)
    assert len(set(found)) == 1 and generate(model, 1, temperature=0, max_length=12, seed=9) == found[:1]


def test_special_tokens_are_never_sampled_and_limits_hold(make_model, monkeypatch):
    model = make_model()
    seen = []
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: seen.append(list(ids)) or "")
    model.head.weight.data[list(model.vocabulary.special_ids)] = 0
    generate(model, 50, max_length=15, temperature=3.0)
    body = [i for ids in seen for i in ids[1:]]
    assert body and not set(body) & model.vocabulary.special_ids
    assert max(len(ids) for ids in seen) == 1 + 15  # the begin token and max_length new ones


def test_stop_tokens(make_model):
    model = make_model()
    plain = generate(model, 20, max_length=20)
    stopped = generate(model, 20, max_length=20, stop=["c", "d"])
    assert stopped == [min((text.split(letter)[0] for letter in "cd"), key=len) for text in plain]
    with pytest.raises(ConfigError, match="'xyz'"):
        generate(model, 1, stop="xyz")


def test_memory_of_the_state_is_constant(make_model, monkeypatch):
    model = make_model()
    sizes, forward = [], model.backbone.forward

    def watched(batch, state=None, **options):
        hidden, after = forward(batch, state, **options)
        sizes.append((len(after), sum(t.numel() for t in after.tensors().values()), len(batch.tokens)))
        return hidden, after

    monkeypatch.setattr(model.backbone, "forward", watched)
    generate(model, 30, max_length=60)
    per_sequence = {numbers / sequences for sequences, numbers, _ in sizes}
    assert len(per_sequence) == 1  # as much after sixty tokens as after one
    assert len(sizes) > 20 and sizes[-1][0] < sizes[1][0]  # the finished leave
    assert all(tokens == sequences for sequences, _, tokens in sizes[1:])  # one token at a time


def test_equal_prompts_are_read_once(make_model, monkeypatch):
    model = make_model()
    read, forward = [], model.backbone.forward
    monkeypatch.setattr(
        model.backbone,
        "forward",
        lambda batch, state=None, **options: read.append(len(batch.tokens)) or forward(batch, state, **options),
    )
    generate(model, 5, prompts="abcabc", max_length=1)
    assert read == [7]


def test_mode_and_random_state_are_left_alone(make_model):
    model = make_model().train()
    state = torch.get_rng_state()
    generate(model, 3, max_length=5)
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_what_is_refused(make_model):
    with pytest.raises(ConfigError, match="causal"):
        generate(make_model("encoder"), 1)
    model = make_model()
    for options in ({"max_length": 0}, {"batch_size": 0}, {"temperature": -1}, {"top_k": 0}):
        with pytest.raises(ConfigError):
            generate(model, 1, **options)
    with pytest.raises(ConfigError, match="count"):
        generate(model, -1)
    with pytest.raises(InputError, match="prompt 2, position 2: 'z'"):
        generate(model, prompts=["a", "az"])


def test_public_names():
    assert set(inference.__all__) >= {"embed", "generate", "score", "log_likelihood", "pseudo_log_likelihood"}

"""Adapters of low rank: what they add, merging, several on one base, files, and what they leave alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig, decoding
from processive.backbones.layers import BlockLinear, Linear
from processive.errors import ConfigError, InputError
from processive.kernels import chosen_backend
from processive.models import (
    AdapterConfig,
    HeadConfig,
    LanguageModel,
    ModelCard,
    adapter_names,
    add_adapter,
    linear_maps,
    load,
    load_adapter,
    merge_adapter,
    remove_adapters,
    save_adapter,
    trainable_share,
    unmerge_adapter,
    use_adapter,
    used_adapter,
)
from processive.models.adapter_files import base_fingerprint
from processive.models.adapters import low_ranks_of
from processive.sequences import IdTokenizer, PackedBatch
from torch import nn

TOKENS = 11
ESM = HeadConfig(kind="esm", tied=False)
MODELS = {
    "mlstm": (XLSTMConfig(TOKENS, 24, 2, heads=2, bias=True), HeadConfig()),
    "mlstm, rotary": (XLSTMConfig(TOKENS, 24, 2, heads=2, rotary="width"), HeadConfig()),
    "mlstm, tied strands": (XLSTMConfig(TOKENS, 24, 2, heads=2, direction="tied", bias=True), HeadConfig()),
    "slstm": (XLSTMConfig(TOKENS, 24, 2, heads=2, blocks="slstm"), HeadConfig()),
    "7b": (XLSTMConfig(TOKENS, 24, 2, heads=2, blocks="mlstm-7b"), HeadConfig()),
    "decoder": (TransformerConfig(TOKENS, 24, 2, heads=4, key_value_heads=2), HeadConfig()),
    "encoder": (
        TransformerConfig(TOKENS, 24, 2, heads=2, direction="bidirectional", activation="gelu", bias=True),
        ESM,
    ),
}


def make_model(name="mlstm"):
    torch.manual_seed(0)
    model = LanguageModel(IdTokenizer(TOKENS), *MODELS[name], name=name).eval()
    with torch.no_grad():  # no parameter at a value that hides a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def lively(model, name=None, seed=1):
    """Let an adapter do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for low_rank in low_ranks_of(model, name or used_adapter(model)).values():
            low_rank.up.copy_(torch.randn(low_rank.up.shape, generator=generator) * 0.05)


def batch(lengths=(7, 1, 150), seed=2):
    tokens = torch.randint(TOKENS, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return PackedBatch.from_lengths(tokens, torch.tensor(lengths, dtype=torch.int64))


def logits(model, lengths=(7, 1, 150)):
    return model(batch(lengths))[0]


def plain_copy(model):
    """The same numbers with the adapter in use written into the weights by hand, each map by itself."""
    other = make_model(model.name).to(next(model.parameters()).dtype)
    other.load_state_dict({name: t for name, t in model.state_dict().items() if ".adapters." not in f".{name}"})
    maps = linear_maps(other)
    with torch.no_grad():
        for name, low_rank in low_ranks_of(model, used_adapter(model)).items():
            product = torch.einsum("...or,...ri->...oi", low_rank.up, low_rank.down)
            maps[name].weight += low_rank.scale * product
    return other


def test_by_hand():
    layer = nn.Sequential(Linear(2, 2, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    add_adapter(layer, AdapterConfig(rank=1, alpha=2.0, targets=("0",)))
    (low_rank,) = low_ranks_of(layer, "default").values()
    with torch.no_grad():
        low_rank.down.copy_(torch.tensor([[1.0, 2.0]]))
        low_rank.up.copy_(torch.tensor([[3.0], [-1.0]]))
    # down x = 1 * 1 + 2 * 1 = 3; scaled by 2 / 1: 6; up: 18, -6; and x itself
    assert layer(torch.ones(1, 2)).tolist() == [[19.0, -5.0]]
    merge_adapter(layer)
    assert layer[0].weight.tolist() == [[7.0, 12.0], [-2.0, -3.0]]


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_changes_nothing(name):
    model = make_model(name)
    with torch.no_grad():
        before = logits(model)
        add_adapter(model, AdapterConfig(rank=3, targets=("*",)))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_map_adds_what_its_weight_would(name):
    model = make_model(name).double()
    add_adapter(model, AdapterConfig(rank=3, targets=("*",)))
    lively(model)
    assert set(low_ranks_of(model, "default")) == set(linear_maps(model))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(plain_copy(model)), rtol=1e-10, atol=1e-10)
        for map_name in linear_maps(model):  # each is in use: without any of them the outputs differ
            low_rank = low_ranks_of(model, "default")[map_name]
            whole, kept = logits(model), low_rank.up.clone()
            low_rank.up.zero_()
            assert not torch.equal(logits(model), whole), map_name
            low_rank.up.copy_(kept)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [(7, 1, 150), (3,), ()], ids=str)
def test_merged_equals_unmerged(name, lengths):
    model = make_model(name)
    add_adapter(model, AdapterConfig(rank=4, targets=("*",)))
    lively(model)
    base = {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        apart = logits(model, lengths)
        merge_adapter(model)
        merge_adapter(model)  # a second time is no second addition
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(type(module) in (Linear, nn.Linear, BlockLinear, type(model.head)) for module in maps(model))
        torch.testing.assert_close(logits(model, lengths), apart, rtol=1e-5, atol=1e-5)
        unmerge_adapter(model)
        assert torch.equal(logits(model, lengths), apart)
        assert all(torch.equal(t, base[key]) for key, t in model.state_dict().items())
        merge_adapter(model)
        merged = logits(model, lengths)
        remove_adapters(model)
        assert torch.equal(logits(model, lengths), merged) and adapter_names(model) == []
        assert set(model.state_dict()) == set(make_model(name).state_dict())
        assert all(parameter.requires_grad for parameter in model.parameters())


def maps(model):
    return linear_maps(model).values()


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_weights(name):
    """d loss / d up is scale * (d loss / d W) down^T, and d loss / d down is scale * up^T (d loss / d W)."""
    model = make_model(name).double()
    add_adapter(model, AdapterConfig(rank=3, alpha=5.0, targets=("*",)))
    lively(model)
    other = plain_copy(model)
    for network in (model, other):
        logits(network).square().mean().backward()
    adapted = low_ranks_of(model, "default")
    for map_name, module in linear_maps(other).items():
        low_rank, gradient = adapted[map_name], module.weight.grad
        torch.testing.assert_close(
            low_rank.up.grad, low_rank.scale * gradient @ low_rank.down.mT, rtol=1e-8, atol=1e-12
        )
        torch.testing.assert_close(
            low_rank.down.grad, low_rank.scale * low_rank.up.mT @ gradient, rtol=1e-8, atol=1e-12
        )
        assert low_rank.up.grad.any() and low_rank.down.grad.any()
    trained = {id(p) for low_rank in adapted.values() for p in low_rank.parameters()}
    assert all((p.grad is not None) == p.requires_grad == (id(p) in trained) for p in model.parameters())


@pytest.mark.parametrize("name", ["mlstm", "7b", "encoder"])
def test_gradient_checkpointing_and_dropout(name):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(name).train()
        add_adapter(model, AdapterConfig(rank=2, dropout=0.3, targets=("*",)))
        lively(model)
        model.backbone.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        logits(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits(model), logits(model))
        model.train()
        assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model = make_model(name)
    add_adapter(model, AdapterConfig(rank=4, targets=("*",)))
    lively(model)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model)
        rough.float().square().mean().backward()
    error = (rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_base_in_bfloat16(tmp_path):
    model = make_model()
    model.save(tmp_path / "base")
    narrow = load(tmp_path / "base", dtype=torch.bfloat16)
    assert base_fingerprint(narrow) == base_fingerprint(model)
    add_adapter(model, AdapterConfig(rank=4))
    lively(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(narrow, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(logits(narrow), logits(model), rtol=0.1, atol=0.1)
        low_rank = low_ranks_of(narrow, "default")["backbone.blocks.0.up"]
        assert low_rank.up.dtype == torch.float32
    logits(narrow).mean().backward()
    assert low_rank.up.grad.any()


@pytest.mark.skipif(chosen_backend("decoding") == "torch", reason="the native kernels are not there")
@pytest.mark.parametrize("name", ["mlstm", "mlstm, rotary", "7b"])
@pytest.mark.parametrize("target", ["*.0.up", "*.0.gates", "*.0.value", "*.0.query_key*", "*.0.down", "*.0.out"])
def test_decoding_notices_an_adapter(name, target, monkeypatch):
    model = make_model(name)
    try:
        config = AdapterConfig(rank=3, targets=(target,))
        add_adapter(model, config)
    except ConfigError:
        pytest.skip("no such map")
    lively(model)
    native, decode = [], decoding.decode
    monkeypatch.setattr(
        "processive.backbones.backbone.decode",
        lambda *a, **o: [found := decode(*a, **o), native.append(found is not None)][0],
    )

    @torch.no_grad()
    def streamed(network):
        tokens = batch((6,)).tokens
        _, state = network(PackedBatch.from_lengths(tokens[:3], torch.tensor([3])), return_state=True)
        found = []
        for at in (3, 4, 5):
            one = PackedBatch.one_each(tokens[at : at + 1], positions=state.lengths)
            out, state = network(one, state, return_state=True)
            found.append(out)
        return torch.cat(found)

    use_adapter(model, None)
    base = streamed(model)
    assert native == [True] * 6
    use_adapter(model, "default")
    adapted = streamed(model)
    assert native[6:] == [False, True] * 3  # the first block is adapted, the second is not
    with torch.no_grad():
        torch.testing.assert_close(adapted, logits(model, (6,))[3:], rtol=1e-5, atol=1e-5)
    merge_adapter(model)
    torch.testing.assert_close(streamed(model), adapted, rtol=1e-5, atol=1e-5)
    assert native[12:] == [True] * 6 and not torch.allclose(adapted, base, atol=1e-4)
    unmerge_adapter(model)
    use_adapter(model, None)
    assert torch.equal(streamed(model), base)


def test_several_adapters_on_one_base(tmp_path):
    model = make_model()
    base = logits(model).detach()
    found = {}
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, AdapterConfig(rank=2, targets=("backbone.blocks.*.up", "backbone.blocks.*.down")), name)
        lively(model, seed=seed)
        found[name] = logits(model).detach()
        save_adapter(model, tmp_path / name)
    assert adapter_names(model) == ["one", "two"] and not torch.equal(found["one"], found["two"])
    for name in ("one", "two", "one"):
        use_adapter(model, name)
        assert torch.equal(logits(model).detach(), found[name]) and used_adapter(model) == name
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        assert trained and all(f".adapters.{name}." in key for key in trained)
        merge_adapter(model)  # and the next one is not added to it
    use_adapter(model, None)
    assert torch.equal(logits(model).detach(), base) and used_adapter(model) is None
    with pytest.raises(ConfigError, match="no adapter 'three'; it has one, two"):
        use_adapter(model, "three")
    with pytest.raises(ConfigError, match="an adapter 'one' already"):
        add_adapter(model, AdapterConfig(), "one")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapter(model)
    fresh = make_model()
    assert [load_adapter(fresh, tmp_path / name) for name in found] == ["one", "two"]
    for name, wanted in found.items():
        use_adapter(fresh, name)
        assert torch.equal(logits(fresh).detach(), wanted)
    assert load_adapter(fresh, tmp_path / "one", "again") == "again"
    assert torch.equal(logits(fresh).detach(), found["one"])


def test_the_file_is_small_and_belongs_to_its_base(tmp_path):
    model = make_model()
    before = base_fingerprint(model)
    add_adapter(model, AdapterConfig(rank=2, alpha=3.0, dropout=0.25, targets=("*.up",)), "mine")
    lively(model)
    merge_adapter(model)
    assert base_fingerprint(model) == before  # whatever is on it, and in it
    save_adapter(model, tmp_path, card=ModelCard(metrics={"loss": 1.5}))
    saved = json.loads((tmp_path / "adapter.json").read_text())
    assert saved["base"] == {"name": "mlstm", "sha256": before} and saved["card"]["metrics"] == {"loss": 1.5}
    assert saved["maps"]["backbone.blocks.0.up"] == {"scale": 1.5, "dropout": 0.25}
    rows = 2 * 24 + 128 * 2  # down [2, 24], up [2 inner, 2]
    assert (tmp_path / "adapter.safetensors").stat().st_size < 2 * rows * 4 + 1000
    other = make_model()
    with torch.no_grad():
        other.backbone.embedding.weight[0, 0] += 0.1
    with pytest.raises(InputError, match=r"another base \(mlstm, weights .*Load the model that it was trained on"):
        load_adapter(other, tmp_path)
    assert adapter_names(other) == []
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError):
        load_adapter(make_model(), tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(InputError, match="not the configuration of an adapter"):
        load_adapter(make_model(), tmp_path)


def test_saving_a_model_with_adapters_is_refused_and_merging_allows_it(tmp_path):
    model = make_model()
    add_adapter(model, AdapterConfig(rank=2))
    lively(model)
    with pytest.raises(ConfigError, match=r"has adapters \(default\)"):
        model.save(tmp_path)
    wanted = logits(plain_copy(model)).detach()
    merge_adapter(model)
    remove_adapters(model)
    model.save(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)).detach(), wanted)


def test_names_ranks_and_shares():
    model = make_model()
    assert trainable_share(model) == 1
    add_adapter(model, AdapterConfig(rank=8, targets=("*.0.up", "*.1.query_key", "*.1.gates", "head")), seed=3)
    low_ranks = low_ranks_of(model, "default")
    shapes = {name: (tuple(r.down.shape), tuple(r.up.shape)) for name, r in low_ranks.items()}
    inner = 64
    blocks = inner // 4  # block-diagonal maps of 4 x 4 have no more than rank 4, and gates of 2 heads neither
    assert shapes == {
        "backbone.blocks.0.up": ((8, 24), (2 * inner, 8)),
        "backbone.blocks.1.query_key": ((2, blocks, 4, 4), (2, blocks, 4, 4)),
        "backbone.blocks.1.gates": ((4, 3 * inner), (4, 4)),
        "head": ((8, 24), (11, 8)),
    }
    assert {r.scale for r in low_ranks.values()} == {2.0}
    count = sum(p.numel() for r in low_ranks.values() for p in r.parameters())
    whole = sum(p.numel() for p in make_model().parameters())
    assert trainable_share(model) == count / (count + whole)
    again, other = make_model(), make_model()
    add_adapter(again, AdapterConfig(rank=8, targets=("*.0.up", "*.1.query_key", "*.1.gates", "head")), seed=3)
    add_adapter(other, AdapterConfig(rank=8, targets=("*.0.up", "*.1.query_key", "*.1.gates", "head")), seed=4)
    same, different = (low_ranks_of(m, "default")["head"].down for m in (again, other))
    assert torch.equal(same, low_ranks["head"].down) and not torch.equal(different, same)
    twin = copy.deepcopy(model)
    lively(twin)
    assert not torch.equal(logits(twin), logits(model))
    with pytest.raises(ConfigError, match=r"No linear map is called '\*\.attention'; there are backbone.blocks.0.up"):
        add_adapter(model, AdapterConfig(targets=("*.attention",)), "x")
    with pytest.raises(ConfigError, match=r"cannot be called 'a\.b'"):
        add_adapter(model, AdapterConfig(), "a.b")
    with pytest.raises(ConfigError, match="cannot be called 'keys'"):
        add_adapter(model, AdapterConfig(), "keys")


def test_a_tied_head_has_no_matrix_of_its_own():
    model = LanguageModel(make_model().tokenizer, MODELS["decoder"][0], HeadConfig(tied=True))
    assert "head" not in linear_maps(model)
    with pytest.raises(ConfigError, match="No linear map is called 'head'"):
        add_adapter(model, AdapterConfig(targets=("head",)))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}], ids=str)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError):
        AdapterConfig(**settings)

import json
from pathlib import Path

import processive as pv
import pytest
import torch
from processive import models
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.errors import ConfigError, InputError, OutputError
from processive.models import HeadConfig, LanguageModel, ModelCard
from processive.sequences import PackedBatch
from safetensors.torch import load_file, save_file

CONFIGS = {
    "xlstm": (XLSTMConfig(12, 32, 2, heads=2, blocks=("mlstm", "slstm")), HeadConfig()),
    "7b-capped": (XLSTMConfig(16, 32, 1, heads=2, blocks="mlstm-7b"), HeadConfig(soft_cap=30.0, bias=True)),
    "decoder-tied": (TransformerConfig(12, 32, 2, heads=2), HeadConfig(tied=True)),
    "encoder": (
        TransformerConfig(12, 32, 1, heads=2, direction="bidirectional", norm="layer", activation="gelu", bias=True),
        HeadConfig("esm"),
    ),
    "strands": (
        XLSTMConfig(12, 32, 2, heads=2, blocks="slstm", direction="tied", complement=(*range(10), 11, 10)),
        HeadConfig("esm", activation="relu", norm_eps=1e-6, conditions=(("species", 3), ("assay", 2))),
    ),
}


def make(tokenizer, config="xlstm", **options):
    backbone, head = CONFIGS[config]
    return LanguageModel(tokenizer, backbone, head, **options).eval()


def batch_of(model, *records):
    return PackedBatch.from_sequences([model.tokenizer.encode(record) for record in records])


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_are_bitwise_equal(tokenizer, tmp_path, name):
    card = ModelCard("Letters.", data={"records": 3}, metrics={"loss": 0.1 + 0.2}, recipe={"steps": 5})
    model = make(tokenizer, name, name="letters-model", card=card)
    model.save(tmp_path / "run" / "model")
    back = models.load(tmp_path / "run" / "model")
    assert type(back) is LanguageModel
    assert not back.training
    assert back.name == "letters-model"
    assert back.backbone.config == model.backbone.config
    assert back.head.config == model.head.config
    assert back.card.metrics == {"loss": 0.1 + 0.2}
    assert back.card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "torch" in back.card.versions
    assert back.vocabulary == model.vocabulary
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(parameter.requires_grad for parameter in back.parameters())
    batch = batch_of(model, "abc", "h")
    assert torch.equal(model(batch)[0], back(batch)[0])
    back.save(tmp_path / "again")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "run" / "model" / file).read_bytes()


def test_the_card_reads_well(tokenizer, tmp_path):
    card = ModelCard("Small letters.", "CC0", data={"file": "a|b.txt", "split": {"train": 12345}}, metrics={"x": 1 / 3})
    make(tokenizer, card=card, name="letters").save(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    for piece in ("# letters", "Small letters.", "Licence: CC0", "| split.train | 12,345 |", r"a\|b.txt", "0.333333"):
        assert piece in text
    assert "| width | 32 |" in text


def test_logits_and_properties(tokenizer):
    model = make(tokenizer, "7b-capped")
    with torch.no_grad():
        model.head.bias.fill_(100.0)
    logits, state = model(batch_of(model, "abc"), return_state=True)
    assert logits.shape == (5, 12)  # 16 embeddings, 12 tokens
    assert logits.max() <= 30.0
    assert state.lengths.tolist() == [5]
    assert (model.causal, model.width, model.device.type) == (True, 32, "cpu")
    assert not make(tokenizer, "encoder").causal


def test_a_tied_head_holds_no_copy(tokenizer, tmp_path):
    model = make(tokenizer, "decoder-tied")
    assert not [name for name, _ in model.head.named_parameters()]
    hidden, _ = model.backbone(batch_of(model, "ab"))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.backbone.embedding.weight.T)


def test_head_defaults_follow_the_kind():
    assert (HeadConfig().is_tied, HeadConfig().has_bias) == (False, False)
    assert (HeadConfig("esm").is_tied, HeadConfig("esm").has_bias) == (True, True)
    assert not HeadConfig("esm", tied=False).is_tied
    with pytest.raises(ConfigError, match="mlp"):
        HeadConfig("mlp")
    with pytest.raises(ConfigError, match="soft_cap"):
        HeadConfig(soft_cap=0.0)


def test_fewer_embeddings_than_tokens_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="11, and the tokenizer has 12"):
        LanguageModel(tokenizer, XLSTMConfig(11, 32, 1))


def test_dtype_and_device(tokenizer, tmp_path):
    make(tokenizer).save(tmp_path / "m")
    low = models.load(tmp_path / "m", dtype=torch.bfloat16)
    narrow = {name for name, parameter in low.named_parameters() if parameter.dtype == torch.bfloat16}
    matrices = ("head.weight", ".up.weight", ".down.weight")
    assert narrow == {name for name, _ in low.named_parameters() if name.endswith(matrices)}
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16, torch.float32}
    low.save(tmp_path / "low")
    for dtype in (None, torch.bfloat16):
        back = models.load(tmp_path / "low", dtype=dtype).state_dict()
        assert all(torch.equal(back[name], tensor) for name, tensor in low.state_dict().items())
        assert {name for name, tensor in back.items() if tensor.dtype == torch.bfloat16} == narrow
    batch = batch_of(low, "abcabcabc", "h")
    want, got = models.load(tmp_path / "m")(batch)[0], low(batch)[0]
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.02 * want.abs().max()
    for dtype in (torch.float32, torch.float64):
        assert {parameter.dtype for parameter in models.load(tmp_path / "m", dtype=dtype).parameters()} == {dtype}


def test_other_files_in_the_folder_stay(tokenizer, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    model = make(tokenizer)
    model.save(tmp_path)
    model.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "config.json", "model.safetensors", "README.md"}


def test_a_failed_save_leaves_the_old_model(tokenizer, tmp_path, monkeypatch):
    model = make(tokenizer)
    model.save(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("processive.models.files.save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        make(tokenizer, "decoder-tied").save(tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        model.save(tmp_path / "file")


@pytest.fixture
def folder(tokenizer, tmp_path):
    make(tokenizer).save(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(folder, words):
    with pytest.raises(InputError, match=words) as error:
        models.load(folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_or_file_is_named(folder):
    refused(folder.parent / "nowhere", "nowhere: There is no such folder")
    refused(folder / "README.md", "this is a file")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: There is no such file")
    (folder / "config.json").unlink()
    refused(folder, "config.json: There is no such file")


def test_a_wrong_configuration_is_refused(folder):
    original = (folder / "config.json").read_text()
    for changes, words in (
        ({"format": 2}, "format 2; this version reads 1"),
        ({"kind": "property-model"}, "'property-model', not a 'language-model'"),
        ({"backbone": {"family": "os.system"}}, "config.json: No backbone family"),
        ({"backbone": None}, "no 'backbone'"),
        ({"head": {"kind": "mlp"}}, "config.json: A head is"),
        ({"head": {"knid": "linear"}}, "'knid'"),
        ({"card": {"foo": 1}}, "'foo'"),
        ({"tokenizer": {}}, "tokenizer has no name"),
    ):
        edit(folder, **changes)
        refused(folder, words)
        (folder / "config.json").write_text(original)
    for text, words in (("{", "not JSON"), ("[]", "not the configuration"), ("{}", "not the configuration")):
        (folder / "config.json").write_text(text)
        refused(folder, words)


def test_an_unknown_tokenizer_is_looked_up_and_never_imported(folder, monkeypatch):
    monkeypatch.undo()
    edit(folder, tokenizer={"name": "os:system"})
    with pytest.raises(ConfigError, match="No tokenizer is called 'os:system'"):
        models.load(folder)


def test_tensors_that_do_not_fit_are_all_named(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"] = weights["head.weight"][:-1].contiguous()
    weights["stray"] = torch.zeros(1)
    del weights["backbone.blocks.0.skip"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        models.load(folder)
    for piece in (
        "model.safetensors",
        "backbone.blocks.0.skip is missing",
        "stray is unknown",
        "head.weight has shape [11, 32] in place of [12, 32]",
    ):
        assert piece in str(error.value)


def test_damaged_weights_are_refused_and_pickles_are_not_read(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(folder, "weights are damaged")
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, "weights are damaged")


def test_the_face_loads_a_model_with_verbs(folder):
    model = pv.load(folder)
    assert type(model) is pv.Model
    assert model.embed(["abc", "h"]).shape == (2, 32)
    assert model.score(["abc", "h"]).shape == (2,)
    texts = model.generate(3, max_length=5)
    assert len(texts) == 3
    assert model.generate(3, max_length=5) == texts

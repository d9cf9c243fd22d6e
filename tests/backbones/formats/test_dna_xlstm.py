"""DNA-xLSTM, beside what its authors' own code gave (tests/backbones/golden)."""

import json
from dataclasses import replace

import pytest
import torch
from processive.backbones import XLSTMConfig, config_to_dict
from processive.backbones.formats.dna_xlstm import DNA_XLSTM
from processive.backbones.formats.table import shapes_of_theirs
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel, load
from processive.sequences import PackedBatch, tokenizer_from_dict

CASES = ["causal-mlstm", "tied-mlstm", "alternating-mixed", "tied-slstm-positions", "shared-slstm", "shared-causal"]
COMPLEMENT = (*range(7), 10, 9, 8, 7, 11)


@pytest.fixture
def folder(golden, patterned, tmp_path):
    """A checkpoint as their training saves it; the map of complements is no weight."""

    def write(name, **change):
        recorded = golden("dna_xlstm")[name]
        target = {"_target_": "models.dna_xlstm.modelling_xlstm.xLSTMConfig"}
        config = {"config": {**target, **recorded["config"], **change}}
        (tmp_path / "model_config.json").write_text(json.dumps(config))
        shapes = {key: shape for key, shape in recorded["shapes"].items() if not key.endswith("complement_map")}
        weights = patterned(shapes)
        maps = {key: torch.tensor(COMPLEMENT) for key in recorded["shapes"] if key not in shapes}
        torch.save({"epoch": 1, "state_dict": weights | maps}, tmp_path / "loss.ckpt")
        return tmp_path, weights | maps

    return write


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits_are_the_recorded_ones(name, golden, folder):
    recorded, model = golden("dna_xlstm"), load(folder(name)[0])
    ids, at = recorded["ids"], recorded[name]["at"]
    batch = PackedBatch.from_sequences([ids[:3], ids])  # in company
    hidden, want = model.backbone(batch)[0], torch.tensor(recorded[name]["logits"])
    assert (hidden[3:][at[1]] - torch.tensor(recorded[name]["hidden"])).abs().max() <= 1e-4
    assert (model.logits(hidden, batch)[3:][at] - want).abs().max() <= 1e-4
    assert want.std() > 0.1


@torch.no_grad()
def test_without_the_quirk_a_shared_model_is_equivariant_and_differs(golden, folder):
    model = load(folder("shared-slstm")[0])
    assert model.backbone.config.legacy_head_flip
    exact = LanguageModel(model.tokenizer, replace(model.backbone.config, legacy_head_flip=False)).eval()
    exact.load_state_dict(model.state_dict())
    ids = torch.tensor(golden("dna_xlstm")["ids"])
    other = torch.tensor(COMPLEMENT)[ids.flip(0)]
    for network, equivariant in ((exact, True), (model, False)):
        one, two = (network.backbone(PackedBatch.from_sequences([each]))[0] for each in (ids, other))
        assert ((one - two.flip(0, 1)).abs().max() <= 1e-5) == equivariant


@pytest.mark.parametrize("name", CASES)
def test_written_back_it_is_the_same_checkpoint(name, folder, tmp_path, same, golden):
    path, weights = folder(name)
    model = load(path)
    model.save(tmp_path / "out", format="dna-xlstm")
    written = torch.load(tmp_path / "out" / "loss.ckpt", weights_only=True)["state_dict"]
    same(written, weights)
    config = json.loads((tmp_path / "out" / "model_config.json").read_text())["config"]
    for key, value in golden("dna_xlstm")[name]["config"].items():
        if key not in ("m_proj_factor", "s_proj_factor", "m_backend"):
            assert config[key] == value, key
    again = load(tmp_path / "out")
    assert again.backbone.config == model.backbone.config
    same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_whole_experiments_configuration_tells_too(folder, same):
    path, _ = folder("tied-mlstm")
    model = load(path)
    config = json.loads((path / "model_config.json").read_text())
    (path / "model_config.json").unlink()
    (path / "config.json").write_text(json.dumps({"train": {}, "model": config}))
    same(dict(load(path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "change",
    [{"m_conv1d_causal": False}, {"m_backend_bidirectional": True}, {"d_model": 64}, {"n_layer": 3}, {"s_lstm_at": [1]},
     {"m_num_heads": 2}],
    ids=str,
)  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(change, folder):
    with pytest.raises(InputError, match=next(iter(change))):
        load(folder("tied-mlstm", **change)[0])


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (XLSTMConfig(16, 128, 4), 442_016),
        (XLSTMConfig(16, 128, 4, bias=True), 447_648),
        (XLSTMConfig(16, 128, 4, blocks="slstm", feed_forward_width=136), 350_336),
        (XLSTMConfig(16, 128, 6, blocks="slstm", feed_forward_width=136), 523_392),
        (XLSTMConfig(16, 256, 4), 1_670_432),
        (XLSTMConfig(16, 256, 4, bias=True), 1_681_696),
        (XLSTMConfig(16, 256, 4, blocks="slstm", feed_forward_width=280), 1_405_184),
    ],
)
def test_published_sizes(config, size):
    parts = {"backbone": config_to_dict(config), "head": {}, "tokenizer": {"name": "dna"}}
    with torch.device("meta"):
        model = LanguageModel(tokenizer_from_dict({"name": "dna"}), config)
    theirs = shapes_of_theirs(DNA_XLSTM.table(parts), model.state_dict())
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == size


@pytest.mark.parametrize("width", [40, 100])
def test_odd_widths_are_written(width, tmp_path, same):
    config = XLSTMConfig(
        12, width, 2, heads=2, blocks=("mlstm", "slstm"), norm_offset=True, expansion=1.9, direction="tied"
    )
    model = LanguageModel(tokenizer_from_dict({"name": "dna"}), replace(config, feed_forward_width=width + 7))
    model.save(tmp_path, format="dna-xlstm")
    config = json.loads((tmp_path / "model_config.json").read_text())["config"]
    assert int(config["m_proj_factor"] * width / 64) * 64 == model.backbone.config.inner_width(0)
    assert int(config["s_proj_factor"] * width) == width + 7
    same(dict(load(tmp_path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "change",
    [{"direction": "alternating"}, {"direction": "bidirectional"}, {"rotary": "width"}, {"norm_offset": False},
     {"complement": COMPLEMENT}, {"complement": COMPLEMENT, "blocks": "slstm", "width": 64}, {"norm_eps": 1e-6}],
    ids=str,
)  # fmt: skip
def test_what_their_code_has_not_is_not_written(change, tmp_path):
    config = XLSTMConfig(12, 32, 2, norm_offset=True)
    with pytest.raises(ConfigError):
        LanguageModel(tokenizer_from_dict({"name": "dna"}), replace(config, **change)).save(
            tmp_path, format="dna-xlstm"
        )
    assert not any(tmp_path.iterdir())

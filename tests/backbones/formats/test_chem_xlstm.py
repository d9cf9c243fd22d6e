"""Chem-xLSTM, beside what its authors' own code gave (tests/backbones/golden)."""

import json
from dataclasses import replace

import pytest
import torch
from processive.backbones import XLSTMConfig, config_to_dict
from processive.backbones.formats.chem_xlstm import CHEM_XLSTM
from processive.backbones.formats.table import shapes_of_theirs
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel, load
from processive.sequences import PackedBatch, tokenizer_from_dict


@pytest.fixture
def folder(golden, patterned, tmp_path):
    """A checkpoint as their code saves it."""

    def write(**change):
        recorded = golden("chem_xlstm")
        (tmp_path / "init_arguments.json").write_text(json.dumps({**recorded["config"], **change}))
        torch.save(patterned(recorded["shapes"]), tmp_path / "model.pt")
        return tmp_path

    return write


@torch.no_grad()
def test_tokens_and_logits_are_the_recorded_ones(golden, folder):
    recorded, model = golden("chem_xlstm"), load(folder())
    assert model.backbone.config.heads == 2  # the file says 1, of a model with 2
    for smiles, ids in zip(recorded["smiles"], recorded["ids"], strict=True):
        assert model.tokenizer.encode(smiles).tolist() == ids
        assert model.tokenizer.decode(ids) == smiles
    batch = PackedBatch.from_sequences([recorded["ids"][recorded["of"]]])
    got = model.head(model.backbone(batch)[0], model.backbone.embedding.weight)
    want = torch.tensor(recorded["logits"])
    assert got.shape == want.shape  # 2 rows beyond the tokens
    assert (got - want).abs().max() <= 1e-4
    assert want.std() > 0.1
    assert model.logits(model.backbone(PackedBatch.from_sequences([[1]]))[0]).shape == (1, 27)


def test_written_back_it_is_the_same_checkpoint(folder, tmp_path, same, patterned, golden):
    model = load(folder())
    model.save(tmp_path / "out", format="chem-xlstm")
    same(torch.load(tmp_path / "out" / "model.pt", weights_only=True), patterned(golden("chem_xlstm")["shapes"]))
    written = json.loads((tmp_path / "out" / "init_arguments.json").read_text())
    for key, value in golden("chem_xlstm")["config"].items():
        assert written[key] == value or key in ("n_heads", "state_dim"), key
    assert written["n_heads"] == 2
    same(dict(load(tmp_path / "out").state_dict()), dict(model.state_dict()))


def test_what_the_model_never_saw_is_refused_by_its_position(folder):
    tokenizer = load(folder()).tokenizer
    for smiles, segment, position in [("CC[Pd]", "P", 4), ("F/C=C/F", "/", 2), ("C\\C", r"\\", 2), ("CCs", "s", 3)]:
        with pytest.raises(InputError, match=f"{segment}' is not among") as error:
            tokenizer.encode(smiles)
        assert error.value.position == position
    with pytest.raises(ConfigError, match=r"\[END\]"):
        tokenizer_from_dict({"name": "smiles-segments", "tokens": ["[PAD]", "[BEG]", "C"]})
    with pytest.raises(ConfigError, match="units"):
        tokenizer_from_dict({"name": "smiles-segments", "tokens": [], "units": []})


@pytest.mark.parametrize(
    ("change", "named"), [({"mode": "fasta"}, "mode"), ({"token2label": {"[PAD]": 0, "C": 2}}, "token2label")]
)
def test_what_is_not_ours_is_refused_by_name(change, named, folder):
    with pytest.raises(InputError, match=named):
        load(folder(**change))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (XLSTMConfig(37, 512, 9, heads=8, norm_offset=True), 14_816_400),
        (XLSTMConfig(37, 256, 4, heads=1, norm_offset=True), 1_644_296),
    ],
)
def test_published_sizes(config, size):
    parts = {"backbone": config_to_dict(config), "head": {}}
    tokens = ["[PAD]", "[BEG]", "[END]", *"CNO"]
    with torch.device("meta"):
        model = LanguageModel(tokenizer_from_dict({"name": "smiles-segments", "tokens": tokens}), config)
    theirs = shapes_of_theirs(CHEM_XLSTM.table(parts), model.state_dict())
    assert sum(torch.Size(shape).numel() for shape in theirs.values()) == size


@pytest.mark.parametrize(
    "change", [{"expansion": 3.0}, {"bias": True}, {"convolution": 3}, {"blocks": ("slstm", "mlstm")}], ids=str
)
def test_what_their_classes_have_not_is_not_written(change, folder, tmp_path):
    model = load(folder())
    other = LanguageModel(model.tokenizer, replace(model.backbone.config, **change))
    with pytest.raises(ConfigError, match="slstm" if "blocks" in change else next(iter(change))):
        other.save(tmp_path / "out", format="chem-xlstm")


def test_a_model_with_their_slstm_block_is_written_for_its_class(folder, tmp_path, same):
    model = load(folder())
    mixed = LanguageModel(model.tokenizer, replace(model.backbone.config, blocks=("mlstm", "slstm")))
    mixed.save(tmp_path / "out", format="chem-xlstm")
    assert "sLSTMModel" in json.loads((tmp_path / "out" / "init_arguments.json").read_text())["model_class"]
    weights = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert weights["model.xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"].shape == (2, 16, 64)  # cuda
    same(dict(load(tmp_path / "out").state_dict()), dict(mixed.state_dict()))

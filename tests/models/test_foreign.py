"""Checkpoints of other packages: found, recognised, read in little memory, checked by both names, written whole."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import processive as pv
import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.backbones.formats import FORMATS
from processive.bio import ProteinTokenizer
from processive.errors import ConfigError, InputError, OutputError
from processive.models import HeadConfig, LanguageModel
from safetensors.torch import load_file, save_file

ESM2 = TransformerConfig(
    33, 40, 3, heads=5, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=32
)
HEAD = HeadConfig("esm", contacts=True)
LAYER = "esm.encoder.layer.1."


def make(config=ESM2, head=HEAD, tokenizer=None):
    model = LanguageModel(tokenizer or ProteinTokenizer(), config, head).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def same(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def hf(tmp_path):
    """A folder as transformers reads it, and the model that it was made from."""
    model = make()
    model.save(tmp_path / "hf", format="hf-esm")
    return tmp_path / "hf", model


def refused(folder, *pieces, **options):
    with pytest.raises(InputError) as error:
        pv.load(folder, **options)
    for piece in pieces:
        assert piece in str(error.value)
    assert "\n" not in str(error.value)


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", ["fair-esm", "hf-esm"])
def test_out_and_in_is_bitwise(tmp_path, name):
    model = make()
    model.save(tmp_path / "m", format=name)
    back = pv.load(tmp_path / "m")
    assert type(back) is pv.Model
    assert back.name == "m"
    assert not back.training
    assert same(model, back)
    back.save(tmp_path / "again", format=name)
    for file in (tmp_path / "m").iterdir():
        if file.suffix != ".pt":  # a zip archive holds its own name
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    back.save(tmp_path / "ours")
    assert same(model, pv.load(tmp_path / "ours"))


def test_every_container_holds_the_same_model(hf, tmp_path):
    folder, model = hf
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"1-of-2": names[:20], "2-of-2": names[20:]}
    config, index = (folder / "config.json").read_text(), {}
    for kind in ("bin", "shards", "bin-shards", "pt", "loose-shards", "legacy", "trained", "yaml"):
        there = tmp_path / kind
        there.mkdir()
        (there / "config.json").write_text(config)
        if kind == "bin":
            torch.save(weights, there / "pytorch_model.bin")
        elif kind == "legacy":
            torch.save(weights, there / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        elif kind == "pt":
            torch.save(weights, there / "epoch3.ckpt")
        elif kind == "trained":
            torch.save({"state_dict": weights, "epoch": 3, "lr": [0.1]}, there / "epoch3.pth")
        elif kind == "yaml":
            pytest.importorskip("yaml").safe_dump(json.loads(config), (there / "config.yaml").open("w"))
            (there / "config.json").unlink()
            save_file(weights, there / "model.safetensors")
        else:
            stem, suffix = ("pytorch_model", "bin") if kind == "bin-shards" else ("model", "safetensors")
            for half, part in halves.items():
                file = f"{stem}-0000{half[0]}-of-00002.{suffix}"
                (torch.save if suffix == "bin" else save_file)({name: weights[name] for name in part}, there / file)
                index |= dict.fromkeys(part, file)
            if kind != "loose-shards":
                (there / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
        assert same(model, pv.load(there)), kind
    assert same(model, pv.load(tmp_path / "pt" / "epoch3.ckpt"))
    assert same(model, pv.load(folder / "model.safetensors"))


def test_dtype_is_as_for_our_own_folders(hf, tmp_path):
    folder, model = hf
    model.save(tmp_path / "ours")
    for dtype in (None, torch.bfloat16, torch.float64):
        ours, theirs = (pv.load(path, dtype=dtype).state_dict() for path in (tmp_path / "ours", folder))
        for name, tensor in ours.items():
            assert theirs[name].dtype == tensor.dtype
            assert torch.equal(theirs[name], tensor)
    low = make().to(torch.bfloat16)
    low.save(tmp_path / "low", format="hf-esm")
    stored = load_file(tmp_path / "low" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16}
    assert wide == {"esm.rotary_embeddings.inv_freq"}  # rounded they would be another model's
    assert same(low, pv.load(tmp_path / "low"))


def test_what_does_not_fit_is_listed_by_both_names(hf):
    folder, _ = hf

    def change(weights):
        del weights[LAYER + "attention.self.key.weight"]
        weights[LAYER + "output.dense.bias"] = weights[LAYER + "output.dense.bias"][:-1].clone()
        weights["esm.stray"] = torch.zeros(2)
        weights["esm.rotary_embeddings.inv_freq"] += 1
        weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"] + 1

    edit(folder, lambda weights: weights.__setitem__("esm.embeddings.position_ids", torch.arange(9)))
    pv.load(folder)  # of transformers 4, and of no meaning
    edit(folder, change)
    refused(folder, "rotary frequencies")
    edit(folder, lambda weights: weights.pop("esm.rotary_embeddings.inv_freq"))
    refused(
        folder,
        str(folder),
        f"{LAYER}attention.self.key.weight -> backbone.blocks.1.query_key_value.weight is missing",
        f"{LAYER}output.dense.bias -> backbone.blocks.1.feed_forward.down.bias has shape [39] in place of [40]",
        "esm.stray is unknown",
        "lm_head.decoder.weight differs from esm.embeddings.word_embeddings.weight",
    )


def test_an_unknown_checkpoint_names_the_formats_and_the_nearest(hf, monkeypatch):
    folder, model = hf
    configure(folder, model_type="esmology")
    refused(folder, "not the configuration of a processive model", "Nearest is hf-esm", *(one.name for one in FORMATS))
    assert same(model, pv.load(folder, format="hf-esm"))
    with pytest.raises(ConfigError, match=r"called 'esm2'\. Known: .*fair-esm"):
        pv.load(folder, format="esm2")
    configure(folder, model_type="esm")
    twin = replace(next(one for one in FORMATS if one.name == "hf-esm"), name="hf-twin")
    monkeypatch.setattr("processive.models.foreign.FORMATS", (*FORMATS, twin))
    refused(folder, "may be hf-esm or hf-twin", "format=")


def test_a_configuration_that_we_cannot_run_is_refused_by_key(hf):
    folder, _ = hf
    for changes, piece in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"intermediate_size": 0}, "inner is 0"),
        ({"rope_theta": 500.0}, "base 500"),
    ):
        text = (folder / "config.json").read_text()
        configure(folder, **changes)
        refused(folder, "hf-esm", piece)
        (folder / "config.json").write_text(text)


def test_an_unknown_vocabulary_is_refused(hf):
    folder, _ = hf
    tokens = (folder / "vocab.txt").read_text().split("\n")
    (folder / "vocab.txt").write_text("\n".join([*tokens[:5], "Å", *tokens[6:]]))
    refused(folder, "token 5 is 'Å' in place of 'A'")
    (folder / "vocab.txt").write_text("\n".join(tokens[:-1]))
    refused(folder, "32 tokens in place of 33")
    (folder / "vocab.txt").unlink()
    pv.load(folder)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_nothing_is_unpickled_and_the_refused_type_is_named(hf, tmp_path, monkeypatch):
    folder, _ = hf
    monkeypatch.chdir(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for content, words in (
        ({"state_dict": weights, "x": Evil()}, "getattr was refused"),
        ({"state_dict": weights, "where": tmp_path}, "pathlib.PosixPath was refused"),
        ({"state_dict": weights, "x": Namespace(y=Evil())}, "was refused, and nothing was run"),
    ):
        torch.save(content, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "x.pt", words)
    assert not (tmp_path / "evil").exists()
    for damaged in (b"", b"weights", (tmp_path / "x.pt").read_bytes()[:5000]):
        (tmp_path / "x.pt").write_bytes(damaged)
        refused(tmp_path / "x.pt", "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "no tensors")


def test_folders_that_are_no_model(hf, tmp_path):
    folder, _ = hf
    index = {"weight_map": {"a": "../m/model.safetensors"}}
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "no file of its own folder")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "no index of weights")
    (folder / "model.safetensors.index.json").unlink()
    save_file({"a": torch.zeros(1)}, folder / "b.safetensors")
    refused(folder, "several models: a.safetensors, b.safetensors")
    (folder / "a.safetensors").unlink()
    (folder / "b.safetensors").unlink()
    refused(folder, "holds no weights")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "a file of another kind")


def test_a_format_refuses_what_it_has_no_place_for(tmp_path):
    with pytest.raises(ConfigError, match="No checkpoint format is called 'onnx'"):
        make().save(tmp_path / "m", format="onnx")
    for changes, words in (
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06 and would become 1e-05"),
        ({"window": 5}, "window is 5 and would become None"),
        ({"activation": "swiglu"}, "activation is 'swiglu'"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(replace(ESM2, **changes)).save(tmp_path / "m", format="fair-esm")
    for head, words in ((HeadConfig(), "head.kind"), (HeadConfig("esm", soft_cap=3.0), "head.soft_cap is 3.0")):
        with pytest.raises(ConfigError, match=words):
            make(head=head).save(tmp_path / "m", format="hf-esm")
    with pytest.raises(ConfigError, match="'xlstm'"):
        make(XLSTMConfig(33, 32, 1, heads=2), HeadConfig("esm")).save(tmp_path / "m", format="hf-esm")
    assert not (tmp_path / "m").exists()
    with pytest.raises(ConfigError, match="attention maps of a transformer"):
        make(XLSTMConfig(33, 32, 1, heads=2))


def test_a_failed_save_leaves_the_old_checkpoint(hf, monkeypatch):
    folder, _ = hf
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("processive.models.export.save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        make().save(folder, format="hf-esm")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    big = replace(ESM2, width=640, depth=10, heads=10, feed_forward_width=None)  # 200 MB
    model, small = make(big), make()
    model.save(tmp_path / "big-ours")
    small.save(tmp_path / "small-ours")
    for name in ("hf-esm", "fair-esm"):
        model.save(tmp_path / f"big-{name}", format=name)
        small.save(tmp_path / f"small-{name}", format=name)
    for name in ("hf-esm", "fair-esm", "ours"):
        for dtype in ("None", "bfloat16"):
            command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", str(SCRIPT)]
            paths = [str(tmp_path / f"{size}-{name}") for size in ("big", "small")]
            result = subprocess.run([*command, *paths, dtype], capture_output=True, text=True, check=True)
            size, share = map(float, result.stdout.split())
            assert size > (9e7 if dtype == "bfloat16" else 1.8e8)
            assert share <= 1.15, (name, dtype)


SCRIPT = Path(__file__).with_name("memory_of_loading.py")

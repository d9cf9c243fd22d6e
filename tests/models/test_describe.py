"""Descriptions against the models themselves: parameters counted, the state measured, the files' headers alone read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.bio.tokenizer import ProteinTokenizer
from processive.errors import InputError
from processive.models import HeadConfig, LanguageModel, ModelCard
from processive.models.catalogue import models_of_the_hub, models_under, published_models
from processive.models.describe import Description, context_in_words, describe, state_bytes
from processive.models.published import FAIR_ESM
from processive.sequences import PackedBatch
from safetensors.torch import load_file, save_file

MIXED = XLSTMConfig(12, 32, 3, heads=2, blocks=("mlstm", "slstm", "mlstm-7b"), expansion=(2.0, 1.0, 1.0), convolution=3)
CAUSAL = {
    "mixed": MIXED,
    "mlstm": XLSTMConfig(12, 32, 2, heads=4, expansion=(2.0, 4.0)),
    "7b": XLSTMConfig(12, 32, 2, heads=2, blocks="mlstm-7b"),
    "llama": TransformerConfig(12, 32, 3, heads=4, key_value_heads=2),
    "window": TransformerConfig(12, 32, 2, heads=4, head_width=12, window=4),
}
ENCODER = TransformerConfig(
    12, 32, 1, heads=2, direction="bidirectional", norm="layer", activation="gelu", bias=True, positions="absolute",
    max_positions=22, position_offset=2,
)  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("length", [3, 17])
def test_state_bytes_are_those_of_the_state(name, length, tokenizer):
    model = LanguageModel(tokenizer, CAUSAL[name])
    with torch.no_grad():
        _, state = model.backbone(PackedBatch.from_sequences([torch.arange(length) % 12]), return_state=True)
    skipped = ("lengths", "cu_seqlens")
    tensors = {key: part for key, part in state.tensors().items() if not key.endswith(skipped)}
    found = state_bytes(CAUSAL[name], 4)
    tokens = length if found.tokens is None else min(length, found.tokens)
    assert sum(part.numel() * 4 for part in tensors.values()) == found.sequence + tokens * found.token
    convolved = sum(part.numel() for key, part in tensors.items() if key.endswith("convolution"))
    half = state_bytes(CAUSAL[name], 2)
    assert half.sequence == found.sequence - 2 * convolved
    assert half.token * 2 == found.token


def test_a_folder_of_ours(tokenizer, tmp_path):
    card = ModelCard("Letters.", "CC0", recipe={"training": {"max_length": 1024}})
    model = LanguageModel(tokenizer, MIXED, name="letters", card=card)
    model.save(tmp_path / "m")
    found = describe(tmp_path / "m")
    assert found.parameters == model.parameters_count
    assert (found.name, found.format, found.licence) == ("letters", "processive", "CC0")
    assert found.context == "no fixed limit; trained on up to 1,024 tokens"
    assert found.tokenizer == "letters, 12 tokens"
    for piece in ("causal", "width 32", "1 mLSTM and 1 sLSTM and 1 mLSTM of the 7B kind blocks", "linear head, untied"):
        assert piece in found.architecture
    table = found.table()
    assert table["parameters"].startswith(f"{model.parameters_count:,} (")
    assert "for any length (state)" in table["memory per sequence"]


def test_no_weight_is_read(tokenizer, tmp_path):
    """Weights behind a whole header are NaN or gone, and the description is the same."""
    LanguageModel(tokenizer, MIXED).save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    before = describe(tmp_path / "m")
    save_file({name: torch.full_like(part, torch.nan) for name, part in load_file(file).items()}, file)
    assert describe(tmp_path / "m") == before


def test_words_of_transformers(tokenizer, tmp_path):
    model = LanguageModel(tokenizer, ENCODER, HeadConfig("esm"))
    model.save(tmp_path / "m")
    found = describe(tmp_path / "m")
    assert found.state is None
    assert found.table()["memory per sequence"] == "none is kept: a sequence is read at once"
    assert found.table()["licence"] == "not stated"
    assert context_in_words(ENCODER) == "20 tokens, the rows of its positions"
    for piece in (
        "bidirectional",
        "2 heads of 16",
        "LayerNorm before",
        "gelu feed-forward of 128",
        "learned positions",
    ):
        assert piece in found.architecture
    assert "4 heads of 8 (2 of keys and values)" in str(describe_config(CAUSAL["llama"], tokenizer, tmp_path))
    assert context_in_words(CAUSAL["window"]) == "no fixed limit; a token sees 4 tokens"


def describe_config(config, tokenizer, folder) -> Description:
    LanguageModel(tokenizer, config).save(folder / config.family)
    return describe(folder / config.family)


def test_published_names():
    found = describe("esm2_t33_650M_UR50D")
    assert found.parameters == 651_043_254  # fair-esm's, its contact regression included
    assert (found.format, found.licence) == ("fair-esm", "MIT")


def test_published_parts_are_fair_esms(tmp_path):
    esm = pytest.importorskip("esm")
    depth, width, heads = FAIR_ESM["esm2_t6_8M_UR50D"]
    theirs = esm.ESM2(num_layers=depth, embed_dim=width, attention_heads=heads)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert describe("esm2_t6_8M_UR50D").parameters == count


def test_a_model_that_is_not_there():
    with pytest.raises(InputError, match="no such model"):
        describe("nowhere")


class TestForeign:
    """A checkpoint in another package's format, in a folder and in the hub's cache."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = TransformerConfig(
            33, 24, 2, heads=3, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=32
        )
        model = LanguageModel(ProteinTokenizer(), config, HeadConfig("esm", contacts=True))
        model.save(tmp_path / "runs" / "esm", format="hf-esm")
        self.parameters = model.parameters_count
        return tmp_path / "runs" / "esm"

    def test_described(self, folder):
        found = describe(folder)
        assert found.format.startswith("hf-esm (")
        assert found.parameters == self.parameters
        assert "bidirectional, width 24, 2 blocks, 3 heads of 8" in found.architecture
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        assert describe(folder).licence == "mit"

    def test_listed(self, folder, tmp_path):
        LanguageModel(ProteinTokenizer(), replace(MIXED, vocabulary_size=33), name="own").save(
            tmp_path / "runs" / "own"
        )
        (tmp_path / "runs" / "other").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "runs" / "other" / "model.safetensors")
        torch.save([1], tmp_path / "runs" / "other" / "x.pt")
        found = {model.name: model for model in models_under(tmp_path / "runs")}
        assert set(found) == {"esm", "own"}
        esm = found["esm"]
        assert (esm.kind, esm.family, esm.parameters) == ("hf-esm", "transformer", self.parameters)
        assert (esm.tokenizer, esm.place) == ("protein", str(folder))
        assert (found["own"].kind, found["own"].tokenizer) == ("language-model", "protein")
        assert list(models_under(folder)) == [esm]

    def test_in_the_cache_of_the_hub(self, folder, tmp_path, monkeypatch):
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert list(models_of_the_hub()) == []
        with pytest.raises(InputError, match=r"not in the cache.*fetches it"):
            describe("hf://ada/esm")
        commit = "a" * 40
        snapshot = tmp_path / "cache" / "models--ada--esm" / "snapshots" / commit
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (tmp_path / "cache" / "models--ada--esm" / "refs").mkdir()
        (tmp_path / "cache" / "models--ada--esm" / "refs" / "main").write_text(commit)
        (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
        (found,) = models_of_the_hub()
        assert (found.place, found.kind, found.parameters) == ("hf://ada/esm", "hf-esm", self.parameters)
        described = describe(Path("hf://ada/esm"))
        assert (described.name, described.licence, described.source) == ("esm", "mit", f"hf://ada/esm@{commit}")
        assert described.parameters == self.parameters


def test_downloads_of_fair_esm_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert all(file is None for _, file in published_models())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "esm2_t6_8M_UR50D.pt").write_bytes(b"x")
    assert dict(published_models())["esm2_t6_8M_UR50D"] == tmp_path / "checkpoints" / "esm2_t6_8M_UR50D.pt"

"""The Python in README.md runs, in its order, on small stand-ins for the models and data that it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import processive as pv
import pytest
import torch
from processive import bio, cells, chem
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.models import HeadConfig, LanguageModel, hub
from processive.training import read_recipe

README = Path(__file__).parents[1] / "README.md"
PROTEINS = [record.text[:60] for record in bio.read(README.parent / "examples" / "proteins.fasta", "protein")]
ESM2 = TransformerConfig(
    33, 20, 1, heads=5, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=32
)


def snippets() -> list[str]:
    """Each snippet behind as many empty lines as stand before it, so that an error tells its line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


@pytest.fixture
def cells_of_blood():
    adata = pytest.importorskip("scanpy").datasets.pbmc68k_reduced()
    return adata[:30].copy()


@pytest.fixture
def place(tmp_path, monkeypatch, cells_of_blood):
    """A working folder with a small model under each name in README.md, and a hub and a cache that have one too."""
    monkeypatch.chdir(tmp_path)
    genes = cells.make_tokenizer({}, cells_of_blood)
    width = {"backbone.width": 16, "backbone.depth": 1, "backbone.heads": 2}
    for name, tokenizer, config in (
        ("chem", chem.make_tokenizer({}, []), lambda tokens: XLSTMConfig(tokens, 16, 1, heads=2)),
        ("prot", bio.ProteinTokenizer(), lambda tokens: TransformerConfig(tokens, 16, 1, 2, direction="bidirectional")),
        ("cells", genes, lambda tokens: TransformerConfig(tokens, 16, 1, 2, direction="bidirectional")),
    ):
        LanguageModel(tokenizer, config(len(tokenizer.vocabulary)), name=name).save(f"runs/{name}")
    LanguageModel(bio.ProteinTokenizer(), ESM2, HeadConfig("esm", contacts=True)).save("hub", format="hf-esm")
    monkeypatch.setattr(hub, "fetch", lambda named: (tmp_path / "hub", named))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    esm2 = pv.load("hub")
    esm2.name = "esm2_t33_650M_UR50D"
    esm2.save("torch/checkpoints", format="fair-esm")
    for path in (tmp_path / "torch" / "checkpoints").iterdir():
        path.rename(path.with_name(path.name.replace("esm2", esm2.name)))
    generator = read_recipe("generator", overrides=width | {"backbone.key_value_heads": 1})
    generator.build(bio.make_tokenizer(generator.tokenizer)).save("checkpoints/generator", format="hf-llama")
    read_recipe("geneformer", overrides=width).build(genes).save("checkpoints/geneformer", format="hf-bert")
    large = XLSTMConfig(33, 32, 1, heads=2, blocks=("mlstm-7b",))
    LanguageModel(bio.ProteinTokenizer(), large).save("checkpoints/xlstm-7b", format="xlstm-large")
    LanguageModel(bio.ProteinTokenizer(), XLSTMConfig(33, 16, 1, heads=2, norm_offset=True)).save(
        "checkpoints", format="xlstm"
    )
    return tmp_path


@pytest.fixture
def stand_ins(cells_of_blood):
    """What each snippet takes for granted."""
    wild = PROTEINS[0]
    measured = [f"{residue}{place}A" for place, residue in enumerate(wild[:12], 1)]
    fit = {"sequences": PROTEINS, "activity": [0.1, 1.0, np.nan, 0.7, 0.3], "others": PROTEINS[:2]}
    preferred = {"wild_type": wild, "measured": measured, "activity": np.arange(12.0), "others": ["K29R", "I30V"]}
    return [{"adata": cells_of_blood}, fit, preferred, {}]


@pytest.mark.slow
def test_it_runs(place, stand_ins):
    code, names = snippets(), {}
    assert len(code) == len(stand_ins)
    for snippet, given in zip(code, stand_ins, strict=True):
        names.update(given)
        exec(compile(snippet, str(README), "exec"), names)
    assert names["adata"].obsm["X_cells"].shape == (30, 16)
    assert names["predictor"].predict(PROTEINS[:1]).shape == (1,)
    assert (place / "runs" / "activity" / "model.safetensors").is_file()
    assert (place / "runs" / "preferring" / "model.safetensors").is_file()
    assert (place / "esm2-tuned" / "model.safetensors").is_file()

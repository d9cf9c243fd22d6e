"""LangCell trained on pairs of a cell and a text through the one loop: by hand, on blood cells, resumed, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processive import cells
from processive.backbones import TransformerConfig
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel
from processive.sequences import TextTokenizer
from processive.training import Labelled, TrainingConfig, objectives, read_metrics, train
from processive.training.data import Pieces
from safetensors.torch import load_file

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def blood():
    return pytest.importorskip("scanpy").datasets.pbmc68k_reduced()


@pytest.fixture
def make(blood):
    """A small LangCell over the genes of the blood cells."""
    genes = cells.make_tokenizer({"max_genes": 24}, blood)
    words = TextTokenizer.from_pieces([str(name) for name in blood.obs["bulk_labels"].cat.categories])

    def build(*, dropout: float = 0.0, seed: int = 0) -> cells.LangCell:
        torch.manual_seed(seed)
        cell = TransformerConfig(len(genes.vocabulary), 32, 1, 2, direction="bidirectional", dropout=dropout)
        text = TransformerConfig(
            len(words.vocabulary), 32, 1, 2, direction="bidirectional", cross_width=32, dropout=dropout
        )
        return cells.LangCell(genes, words, cell, text, channels=16)

    return build


def pairs(model, blood, rows=slice(None)):
    return cells.CellTexts.encode(model, blood[rows].copy(), [str(name) for name in blood.obs["bulk_labels"][rows]])


def test_the_loss_by_hand(make, blood):
    model = make()
    data = pairs(model, blood, slice(0, 5))
    batch = Pieces(data).batch(range(5), vocabulary_size=model.vocabulary_size)
    found = batch.objective(model)
    assert found.weight == 5
    torch.manual_seed(3)
    loss = found.loss_sum(model.train())
    names = [str(name) for name in blood.obs["bulk_labels"][:5]]
    assert len(set(names)) > 2
    states = model.read_cells(data.sequences[:5])
    one, other = model.embed_cells(states), model.embed_texts(names)
    same = torch.tensor([[a == b for b in names] for a in names])
    shares = same / same.sum(1, keepdim=True)
    similar = one @ other.T / 0.05
    contrast = -(shares * similar.log_softmax(1)).sum() / 10 - (shares * similar.T.log_softmax(1)).sum() / 10
    torch.manual_seed(3)
    groups = torch.tensor([names.index(name) for name in names])
    drawn = objectives.hard_negatives(one, other, torch.default_generator, groups=groups)
    chances = model.match(states, names)
    wrong = [chances[cell, int(text)] for cell, text in enumerate(drawn[0])]
    wrong += [chances[int(cell), text] for text, cell in enumerate(drawn[1])]
    matching = -(chances.diag().log().sum() + (1 - torch.stack(wrong)).log().sum()) / 15
    assert loss.item() == pytest.approx(5 * (contrast + matching).item(), rel=1e-4)


@pytest.mark.slow
def test_it_learns_which_text_is_of_a_cell(make, blood, tmp_path):
    model = make()
    data, held_out = pairs(model, blood, slice(0, 300)), pairs(model, blood, slice(600, 700))
    config = TrainingConfig(steps=50, batch_tokens=800, learning_rate=5e-3, log_every=5)
    metrics = train(model, data, config, out=tmp_path, validation=held_out, progress=False)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < losses[0] - 1
    assert metrics["validation_loss"] < losses[0] - 1
    back = cells.LangCell.load(tmp_path)
    assert back.card.metrics["loss"] == metrics["loss"]
    texts = [str(name) for name in blood.obs["bulk_labels"].cat.categories]
    with torch.no_grad():
        states = back.read_cells(held_out.sequences[:100])
        similar = back.embed_cells(states) @ back.embed_texts(texts).T
    truth = blood.obs["bulk_labels"].cat.codes.to_numpy()[600:]
    commonest = np.bincount(truth).max() / 100
    assert (similar.argmax(1).numpy() == truth).mean() > commonest + 0.1


def test_a_killed_run_goes_on_bit_for_bit(make, blood, tmp_path, interrupted):
    config = TrainingConfig(steps=6, batch_tokens=300, accumulation=2, checkpoint_every=2, log_every=1)
    whole, model = make(dropout=0.1), make(dropout=0.1)
    data = pairs(model, blood, slice(0, 60))
    train(whole, data, config, out=tmp_path / "whole", validation=data, progress=False)
    with interrupted(3):
        train(model, data, config, out=tmp_path / "run", validation=data, progress=False)
    train(make(dropout=0.1, seed=1), data, config, out=tmp_path / "run", validation=data, resume=True, progress=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    lines = [[(line["step"], line["loss"]) for line in read_metrics(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_heads_alone(make, blood, tmp_path):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainingConfig(steps=2, batch_tokens=300, trained="head", warmup=0)
    train(model, pairs(model, blood, slice(0, 40)), config, out=tmp_path, progress=False)
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)
    }
    assert changed == {"cell_projection", "text_projection", "matching"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_refused(make, blood, tmp_path):
    model, config = make(), TrainingConfig(steps=1)
    data = pairs(model, blood, slice(0, 4))

    def refused(match, model=model, data=data, config=config):
        with pytest.raises(ConfigError, match=match):
            train(model, data, config, out=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    language = LanguageModel(model.genes, model.cell.config)
    refused("learned by a LangCell, and model is none", model=language)
    refused("langcell is of the class LangCell", data=data.sequences[:4])
    refused("langcell is of the class LangCell", data=Labelled(data.sequences[:4], [0.0, 1.0, 2.0, 3.0]))
    refused("goes down one network, and langcell has 2", config=TrainingConfig(steps=1, layer_decay=0.9))
    refused("A text has the token 900", data=cells.CellTexts(data.sequences[:2], [[3], [900]]))
    with pytest.raises(InputError, match="2 cells and 1 texts"):
        cells.CellTexts(data.sequences[:2], [[3]])
    with pytest.raises(InputError, match=r"record 2.*no token"):
        cells.CellTexts(data.sequences[:2], [[3], []])
    with pytest.raises(InputError, match="700 cells and 1 texts"):
        cells.CellTexts.encode(model, blood, ["B cell"])
    with pytest.raises(ConfigError, match="must be positive"):
        cells.CellTexts(data.sequences[:1], [[3]], temperature=0.0)

"""LangCell: its authors' code is no package; transformers' BertModel, in both modes, is the peer (random weights)."""

import json

import pytest
import torch
import torch.nn.functional as F
from processive.cells import LangCell
from processive.errors import ConfigError, InputError
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

CELL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 21,
        "hidden_act": "relu", "max_position_embeddings": 20, "pad_token_id": 0}  # fmt: skip
TEXT = {"vocab_size": 22, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
        "max_position_embeddings": 12, "pad_token_id": 0}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(15))]  # and then [DEC] and [ENC]
TEXTS = ["w1", "w2 w3 w4", "w7 w8 w9 w10 w1 w2 w14"]


class Peer:
    """Their five parts, of transformers' modules."""

    def __init__(self, channels=9):
        self.cell = transformers.BertModel(transformers.BertConfig(**CELL), add_pooling_layer=False)
        # A decoder has the layers of cross-attention; then it is told to look both ways.
        config = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, attn_implementation="eager")
        self.text = transformers.BertModel(config, add_pooling_layer=False)
        self.text.config.is_decoder = False
        for layer in self.text.encoder.layer:
            attention = layer.crossattention.self
            attention.key = nn.Linear(CELL["hidden_size"], TEXT["hidden_size"])
            attention.value = nn.Linear(CELL["hidden_size"], TEXT["hidden_size"])
        self.maps = {
            "cell_proj": nn.Linear(CELL["hidden_size"], channels),
            "text_proj": nn.Linear(TEXT["hidden_size"], channels),
            "ctm_head": nn.Linear(TEXT["hidden_size"], 2),
        }
        with torch.no_grad():
            for module in (self.cell, self.text, *self.maps.values()):
                for parameter in module.eval().parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            self.text.embeddings.token_type_embeddings.weight.zero_()  # LangCell's texts have none

    def text_tensors(self):
        state = self.text.state_dict()
        return {name: tensor for name, tensor in state.items() if "token_type" not in name}

    def save(self, folder):
        for name, config, tensors in (
            ("cell_bert", CELL, self.cell.state_dict()),
            (
                "text_bert",
                TEXT | {"encoder_width": CELL["hidden_size"], "add_cross_attention": True},
                self.text_tensors(),
            ),
        ):
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
            torch.save(tensors, folder / name / "pytorch_model.bin")
        for name, module in self.maps.items():
            torch.save(module.state_dict(), folder / f"{name}.bin")
        (folder / "text_bert" / "vocab.txt").write_text("\n".join(WORDS))
        genes = ["<pad>", "<mask>", *(f"ENSG{i:011d}" for i in range(28))]
        lines = [f"{gene}\t{i}\t{'' if i < 2 else i / 3}" for i, gene in enumerate(genes)]
        (folder / "gene_table.tsv").write_text("\n".join(["ensembl_id\ttoken\tmedian", *lines]))
        return folder


@pytest.fixture
def peer():
    return Peer()


@pytest.fixture
def model(peer, tmp_path):
    return LangCell.load(peer.save(tmp_path / "theirs"))


@pytest.fixture
def cells(model):
    counts = [{f"ENSG{i:011d}": float(1 + (i * k) % 7) for i in range(0, 28, k)} for k in (1, 3, 13)]
    return [model.genes.encode(cell) for cell in counts]


def test_tokens_are_geneformers_with_cls_before(model, cells):
    assert model.genes.max_genes == 19
    assert [len(cell) for cell in cells] == [20, 11, 4]
    assert all(cell[0] == 30 for cell in cells)
    assert model.words.vocabulary.ids["[DEC]"] == 20
    assert model.words.encode("w1 W2").tolist() == [2, 6, 7, 3]


def test_both_modes_equal_the_peer(peer, model, cells):
    with torch.no_grad():
        states = model.read_cells(cells)
        found_cells, found_texts = model.embed_cells(states), model.embed_texts(TEXTS)
        matches = model.match(states, TEXTS, batch_tokens=16)
        for i, cell in enumerate(cells):
            hidden = peer.cell(torch.from_numpy(cell).long()[None]).last_hidden_state
            start, end = states.cu_seqlens[i : i + 2]
            assert (states.hidden[start:end] - hidden[0]).abs().max() <= 1e-4
            want = F.normalize(peer.maps["cell_proj"](hidden[0, 0]), dim=-1)
            assert (found_cells[i] - want).abs().max() <= 1e-4
            for j, text in enumerate(TEXTS):
                tokens = torch.from_numpy(model.words.encode(text)).long()[None]
                alone = peer.text(tokens).last_hidden_state[0, 0]
                assert (found_texts[j] - F.normalize(peer.maps["text_proj"](alone), dim=-1)).abs().max() <= 1e-4
                seeing = peer.text(tokens, encoder_hidden_states=hidden).last_hidden_state[0, 0]
                assert (seeing - alone).abs().max() > 0.01
                probability = peer.maps["ctm_head"](seeing).softmax(-1)[1]
                assert abs(matches[i, j] - probability) <= 1e-5
    assert matches.std() > 1e-3


def test_the_peer_looks_both_ways(peer):
    tokens = torch.tensor([[2, 6, 7, 3]])
    with torch.no_grad():
        one, two = peer.text(tokens).last_hidden_state, peer.text(tokens[:, :3]).last_hidden_state
    assert (one[:, 0] - two[:, 0]).abs().max() > 1e-3


def test_a_long_text_keeps_its_end(model):
    long = " ".join(f"w{i % 15}" for i in range(40))
    assert model.words_of(long).tolist() == [*model.words.encode(long)[:11].tolist(), 3]
    assert model.embed_texts([long]).isfinite().all()


def test_folders_of_theirs_and_ours_are_equal_bit_by_bit(peer, model, cells, tmp_path):
    model.save(tmp_path / "again", format="langcell")
    for name, want in (("cell_bert", peer.cell.state_dict()), ("text_bert", peer.text_tensors())):
        stored = load_file(tmp_path / "again" / name / "model.safetensors")
        assert stored.keys() == want.keys()
        assert all(torch.equal(stored[key], want[key]) for key in want)
    for name, module in peer.maps.items():
        stored = torch.load(tmp_path / "again" / f"{name}.bin", weights_only=True)
        assert all(torch.equal(stored[key], tensor) for key, tensor in module.state_dict().items())
    cell = transformers.BertModel.from_pretrained(tmp_path / "again" / "cell_bert", add_pooling_layer=False)
    assert all(torch.equal(cell.state_dict()[key], tensor) for key, tensor in peer.cell.state_dict().items())
    model.save(tmp_path / "ours")
    for folder in ("again", "ours"):
        back = LangCell.load(tmp_path / folder)
        assert back.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
        assert back.genes.encode(cells[0]).tolist() == cells[0].tolist()
        assert back.genes.to_dict()["genes"]["tokens"] == model.genes.to_dict()["genes"]["tokens"]
        assert back.words.to_dict() == model.words.to_dict()


def test_a_missing_or_unknown_part_is_named(peer, tmp_path):
    folder = peer.save(tmp_path / "theirs")
    state = peer.cell.state_dict()
    name = "encoder.layer.1.output.dense.bias"
    torch.save(
        {key: tensor for key, tensor in state.items() if key != name}, folder / "cell_bert" / "pytorch_model.bin"
    )
    with pytest.raises(InputError, match=f"{name} -> cell.blocks.1.feed_forward.down.bias is missing"):
        LangCell.load(folder)
    torch.save(state, folder / "cell_bert" / "pytorch_model.bin")
    (folder / "gene_table.tsv").rename(folder / "genes.tsv")
    with pytest.raises(InputError, match="table of genes"):
        LangCell.load(folder)
    (folder / "genes.tsv").rename(folder / "gene_table.tsv")
    (folder / "text_bert" / "vocab.txt").unlink()
    with pytest.raises(InputError, match="PubMedBERT"):
        LangCell.load(folder)
    (folder / "ctm_head.bin").unlink()
    with pytest.raises(InputError, match=r"ctm_head\.bin"):
        LangCell.load(folder)


def test_poolers_of_its_training_are_passed_over(peer, model, tmp_path):
    folder = tmp_path / "theirs"
    path = folder / "text_bert" / "pytorch_model.bin"
    more = {"pooler.proj.weight": torch.zeros(9, 24), "embeddings.position_ids": torch.arange(12)[None]}
    path.unlink()
    save_file({**peer.text_tensors(), **more}, folder / "text_bert" / "model.safetensors")
    back = LangCell.load(folder)
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_what_the_format_cannot_hold_is_not_written(model, tmp_path):
    object.__setattr__(model.cell.config, "norm_placement", "pre")
    with pytest.raises(ConfigError, match="norm_placement"):
        model.save(tmp_path / "again", format="langcell")
    assert not (tmp_path / "again" / "cell_bert").exists()
    with pytest.raises(ConfigError, match="hf-bert"):
        model.save(tmp_path / "again", format="hf-bert")


@pytest.mark.shared_data
def test_cells_of_the_published_vocabulary(shared):
    from processive.cells import RankTokenizer

    path = shared / "cells" / "geneformer_gc30M_tokens_medians.tsv.gz"
    genes = RankTokenizer.from_table(path, most_tokens=2048, added=["<cls>"])
    assert len(genes.vocabulary) == 25427
    assert genes.vocabulary.ids["<cls>"] == 25426
    assert genes.max_genes == 2047
    assert genes.encode("ENSG00000000003 ENSG00000000005").tolist() == [25426, 2, 3]

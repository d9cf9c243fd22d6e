"""BERT has the numbers of transformers' BertForMaskedLM, from its files and back in them (random weights)."""

import gzip
import json

import pytest
import torch
from processive import cells, inference, models
from processive.cells import RankTokenizer
from processive.errors import ConfigError, InputError
from processive.sequences import tokenizer_from_dict
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 41,
    "max_position_embeddings": 33,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.02,
    "attention_probs_dropout_prob": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
VARIANTS = {
    "Geneformer": {},
    "BERT": {"hidden_act": "gelu", "type_vocab_size": 3, "layer_norm_eps": 1e-3, "intermediate_size": 96},
}
GENES = ["<pad>", "<mask>", "<cls>", "<eos>", *(f"ENSG{i:011d}" for i in range(36))]


def table(tokens=GENES):
    """A table as of Geneformer's tokens and medians."""
    lines = ["ensembl_id\ttoken\tmedian\tsymbol"]
    for i, gene in enumerate(tokens):
        lines.append(
            f"{gene}\t{i}\t{'' if gene.startswith('<') else 1 / (i + 1)}\t{'' if gene.startswith('<') else f'G{i}'}"
        )
    return "\n".join(lines) + "\n"


def bert(perturb, **changes):
    return perturb(transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE | changes)))


def saved(theirs, folder, genes=True, **changes):
    theirs.save_pretrained(folder)
    if genes:
        (folder / "gene_table.tsv").write_text(table())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_logits_equal_transformers(variant, dtype, perturb, batch, tmp_path):
    theirs = bert(perturb, **VARIANTS[variant]).to(dtype)
    ours = models.load(saved(theirs, tmp_path))
    padded, mask = batch.to_padded(0)
    with torch.no_grad():
        want = theirs(padded, attention_mask=mask.long(), output_hidden_states=True)
        layers, logits = ours.backbone.hidden_layers(batch), ours(batch)[0]
    within = 1e-4 if dtype == torch.float32 else 1e-9
    assert len(layers) == len(want.hidden_states) == 4
    for layer, theirs_layer in zip(layers, want.hidden_states, strict=True):
        assert layer.dtype == dtype
        assert (layer - theirs_layer[mask]).abs().max() <= within
    assert (logits - want.logits[mask]).abs().max() <= within
    assert logits.std() > 0.1


def test_the_second_to_last_layer_is_what_geneformer_takes(perturb, tmp_path):
    theirs = bert(perturb)
    ours = models.load(saved(theirs, tmp_path))
    cell = ours.tokenizer.encode({"G10": 3.0, "G7": 9.0, "G30": 2.0})
    with torch.no_grad():
        layers = theirs(torch.from_numpy(cell).long()[None], output_hidden_states=True).hidden_states
    found = inference.embed(ours, [cell], layer=-2)
    assert abs(found[0] - layers[-2][0, 1:-1].mean(0).numpy()).max() <= 1e-5  # genes alone, not <cls> and <eos>


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_is_read_by_transformers_bit_by_bit(variant, perturb, same, tmp_path):
    theirs = bert(perturb, **VARIANTS[variant])
    ours = models.load(saved(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "again", format="hf-bert")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again")
    same(theirs.state_dict(), again.state_dict())
    for key in (*SHAPE, *VARIANTS[variant]):
        assert getattr(again.config, key) == getattr(theirs.config, key), key
    back = models.load(tmp_path / "again")
    same(ours.state_dict(), back.state_dict())
    assert back.tokenizer.to_dict() == ours.tokenizer.to_dict()


def test_the_pooler_is_passed_over_and_older_names_are_read(perturb, batch, tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE))
    perturb(theirs)
    saved(theirs, tmp_path)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert "bert.pooler.dense.weight" in older
    older["bert.embeddings.position_ids"] = torch.arange(33)[None]
    save_file(older, tmp_path / "model.safetensors")
    ours = models.load(tmp_path)
    padded, mask = batch.to_padded(0)
    with torch.no_grad():
        want = theirs(padded, attention_mask=mask.long()).prediction_logits[mask]
        assert (ours(batch)[0] - want).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu_new"), ("position_embedding_type", "relative_key"), ("is_decoder", True),
     ("add_cross_attention", True), ("tie_word_embeddings", False)],
)  # fmt: skip
def test_what_would_not_run_alike_is_refused_by_name(key, value, perturb, tmp_path):
    with pytest.raises(InputError, match=key):
        models.load(saved(bert(perturb), tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_placement", "pre"), ("direction", "causal"), ("norm_eps", 1e-3)],
)
def test_what_bert_cannot_hold_is_not_written(field, value, perturb, tmp_path):
    ours = models.load(saved(bert(perturb), tmp_path / "theirs"))
    object.__setattr__(ours.backbone.config, field, value)
    with pytest.raises(ConfigError, match=field):
        ours.save(tmp_path / "again", format="hf-bert")
    assert not (tmp_path / "again").exists()


def test_a_cell_fits_the_positions(perturb, tmp_path):
    ours = models.load(saved(bert(perturb, max_position_embeddings=10), tmp_path))
    assert ours.tokenizer.max_genes == 8
    cell = ours.tokenizer.encode({f"G{i}": 1.0 for i in range(4, 30)})
    assert len(cell) == 10
    assert (cell[0], cell[-1]) == (2, 3)


def test_a_missing_or_other_gene_table_is_told(perturb, tmp_path):
    folder = saved(bert(perturb), tmp_path, genes=False)
    (folder / "token_dictionary.pkl").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"tokenizer=.*gene_table\.tsv.*never unpickled"):
        models.load(folder)
    (folder / "gene_table.tsv").write_text(table(GENES[:-1]))
    with pytest.raises(InputError, match="39 tokens, and the model has 40"):
        models.load(folder)


def test_a_tokenizer_can_be_given(perturb, same, tmp_path):
    folder = saved(bert(perturb), tmp_path / "theirs", genes=False)
    (tmp_path / "genes.tsv").write_text(table())
    genes = RankTokenizer.from_table(tmp_path / "genes.tsv", most_tokens=33)
    ours = models.load(folder, tokenizer=genes)
    assert ours.tokenizer is genes
    ours.save(tmp_path / "own")
    same(ours.state_dict(), models.load(tmp_path / "own").state_dict())
    with pytest.raises(ConfigError, match="has its tokenizer"):
        models.load(tmp_path / "own", tokenizer=genes)
    (tmp_path / "genes.tsv").write_text(table([*GENES, "ENSG99999999999"]))
    with pytest.raises(InputError, match="40, and the tokenizer has 41"):
        models.load(folder, tokenizer=RankTokenizer.from_table(tmp_path / "genes.tsv"))


def test_a_text_model_has_its_word_pieces(perturb, batch, tmp_path):
    pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    folder = saved(bert(perturb, hidden_act="gelu"), tmp_path / "theirs", genes=False)
    (folder / "vocab.txt").write_text("\n".join(words))
    ours = models.load(folder)
    assert ours.tokenizer.encode("w3 W10").tolist() == [2, 8, 15, 3]
    ours.save(tmp_path / "again", format="hf-bert")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("w3 W10")["input_ids"] == [2, 8, 15, 3]
    assert theirs.mask_token_id == 4


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "tokens", "positions", "genes", "specials"),
    [("gc30M", 25426, 2048, 2048, 2), ("gc104M", 20275, 4096, 4094, 4)],
    ids=["V1", "V2"],
)
def test_geneformers_own_vocabularies(name, tokens, positions, genes, specials, shared, perturb, tmp_path):
    shape = {"vocab_size": tokens, "max_position_embeddings": positions, "hidden_size": 6, "num_hidden_layers": 1}
    folder = saved(bert(perturb, **shape), tmp_path, genes=False)
    path = shared / "cells" / f"geneformer_{name}_tokens_medians.tsv.gz"
    (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = models.load(folder).tokenizer
    assert (len(tokenizer.vocabulary), tokenizer.max_genes, len(tokenizer.vocabulary.special_ids)) == (
        tokens, genes, specials
    )  # fmt: skip
    lines = [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1:]]
    assert [line[0] for line in lines] == list(tokenizer.vocabulary.tokens)
    assert [int(line[1]) for line in lines] == list(range(tokens))
    cell = tokenizer.encode({lines[900][0]: 5 * float(lines[900][2]), lines[77][0]: 2 * float(lines[77][2])})
    assert cell.tolist() == ([900, 77] if specials == 2 else [2, 900, 77, 3])
    assert tokenizer_from_dict({"name": "cells-rank", **tokenizer.to_dict()}).encode(cell).tolist() == cell.tolist()


@pytest.mark.shared_data
def test_real_cells_have_the_embeddings_of_transformers(shared, perturb, tmp_path):
    anndata = pytest.importorskip("anndata")
    theirs = bert(perturb, vocab_size=20275, max_position_embeddings=4096)
    folder = saved(theirs, tmp_path, genes=False)
    name = "geneformer_gc104M_tokens_medians.tsv.gz"
    (folder / name).write_bytes((shared / "cells" / name).read_bytes())
    ours = models.load(folder)
    adata = anndata.read_h5ad(shared / "cells" / "celltypist_sample_pbmc_559.h5ad")[:4].copy()
    cells.embed(adata, ours, layer=-2, key_added="X_geneformer")
    for found, cell in zip(adata.obsm["X_geneformer"], cells.tokenize(adata, ours.tokenizer), strict=True):
        with torch.no_grad():
            layers = theirs(torch.from_numpy(cell).long()[None], output_hidden_states=True).hidden_states
        assert len(cell) > 1000
        assert abs(found - layers[-2][0, 1:-1].mean(0).numpy()).max() <= 1e-4

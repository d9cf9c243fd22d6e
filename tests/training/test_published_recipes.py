"""Recipes of published systems are the networks they are named after, and run from file to model and on to its use."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import processive as pv
import pytest
import torch
from processive import bio, cells, models, text
from processive.backbones import config_to_dict, to_plain
from processive.backbones.formats.bert import HF_BERT
from processive.cli import main
from processive.models import merge_adapter, remove_adapters
from processive.sequences import Record, TokenStore, tokenizer_to_dict
from processive.training import read_recipe

SMALL = ["--set", "backbone.width=16", "--set", "backbone.depth=1", "--set", "backbone.heads=2", "--steps", "3"]
GENERATOR = {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 4128}
RELATED = "ACGTTGCAAGGCTTAACGATCG"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("generator", "published", {**GENERATOR, "hidden_size": 2048, "intermediate_size": 5632}),
        ("generator", "published-3b", {**GENERATOR, "hidden_size": 3072, "intermediate_size": 8448}),
        ("prollama", "published", {}),  # transformers' own defaults are those of Llama-2-7B
    ],
    ids=["generator", "generator-3b", "prollama"],
)
def test_decoders_have_the_parameters_of_transformers_llama(name, size, settings):
    transformers = pytest.importorskip("transformers")
    depth = {"published": 26, "published-3b": 30} if name == "generator" else {"published": 32}
    config = transformers.LlamaConfig(**settings, num_hidden_layers=depth[size])
    recipe = read_recipe(name, size)
    small = bio.KmerTokenizer(k=2)  # a network may have more rows than its tokenizer has tokens
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
        ours = models.LanguageModel(small, recipe.backbone_config(config.vocab_size), recipe.head)
    assert ours.parameters_count == sum(p.numel() for p in theirs.parameters())


def test_the_tokenizer_of_generator_is_its_own():
    vocabulary = bio.make_tokenizer(read_recipe("generator", "published").tokenizer).vocabulary
    assert len(vocabulary) == 4128
    assert [vocabulary.ids[kmer] for kmer in ("AAAAAA", "AAAAAT", "TTTTTT", "GGGGGG")] == [32, 33, 1397, 4127]


V1 = {"vocab_size": 25426, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
V2 = {"vocab_size": 20275, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("size", "table", "settings"),
    [
        ("published", "gc30M", {**V1, "intermediate_size": 512, "max_position_embeddings": 2048}),
        ("published-v2", "gc104M", {**V2, "intermediate_size": 3072, "max_position_embeddings": 4096}),
    ],
    ids=["V1", "V2"],
)
def test_geneformer_has_the_tensors_of_the_published_one(size, table, settings, shared):
    """With the published table of genes, its format has a place for every tensor, and theirs has one for no other."""
    transformers = pytest.importorskip("transformers")
    path = shared / "cells" / f"geneformer_{table}_tokens_medians.tsv.gz"
    recipe = read_recipe("geneformer", size, {"tokenizer.gene_table": str(path)})
    tokenizer = cells.make_tokenizer(recipe.tokenizer, None)
    with torch.device("meta"):
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**settings, hidden_act="relu"))
        ours = models.LanguageModel(tokenizer, recipe.backbone_config(len(tokenizer.vocabulary)), recipe.head)
    assert ours.parameters_count == sum(p.numel() for p in theirs.parameters())
    frame = len({"<cls>", "<eos>"} & set(tokenizer.vocabulary.tokens))
    assert tokenizer.max_genes + frame == settings["max_position_embeddings"]
    parts = {
        "tokenizer": tokenizer_to_dict(tokenizer),
        "backbone": config_to_dict(ours.backbone.config),
        "head": to_plain(ours.head.config),
        "card": asdict(ours.card),
    }
    entries = HF_BERT.table(parts)
    assert {entry.own for entry in entries} == set(ours.state_dict())
    names = {name for entry in entries for name in entry.foreign} | set(HF_BERT.copies(parts))
    assert names == set(theirs.state_dict())
    written = HF_BERT.config_out(parts)
    assert all(
        written[key] == value for key, value in {**settings, "hidden_act": "relu", "layer_norm_eps": 1e-12}.items()
    )


def test_generator_from_fasta_to_designs(tmp_path, capsys):
    (tmp_path / "genes.fa").write_text(f">a\n{RELATED * 3}\n>b\n{RELATED[::-1]}NNRacgtacgtac\n")
    small = [*SMALL, "--set", "backbone.key_value_heads=1"]
    run("train", "generator", tmp_path / "genes.fa", "--out", tmp_path / "run", *small)
    assert "generate" in capsys.readouterr().out
    model = pv.load(tmp_path / "run")
    assert len(model.vocabulary) == 4128 and model.card.recipe["data"] == {"frames": 6}
    assert model.card.data["records"] == 2
    # Begin token and 6-mers of each frame of a, and of the stretches of 22 and 10 known bases of b; frame 5 of the
    # last has no 6-mer.
    assert model.card.data["tokens"] == (6 * 1 + 11 + 5 * 10) + (6 * 1 + 5 * 3 + 2) + (5 * 1 + 5)
    run("generate", tmp_path / "run", "-n", 2, "--max-length", 4, "-o", tmp_path / "designs.fasta")
    made = bio.read(tmp_path / "designs.fasta", "dna")
    assert len(made) == 2 and all(len(record.text) == 24 for record in made)
    run("embed", tmp_path / "run", tmp_path / "designs.fasta", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["embeddings"].shape == (2, 16)
    model.save(tmp_path / "theirs", format="hf-llama")
    assert pv.load(tmp_path / "theirs").score([RELATED[:18]]) == pytest.approx(model.score([RELATED[:18]]), abs=1e-4)


def test_a_store_of_generator_is_read_in_its_frames(tmp_path, capsys):
    (tmp_path / "genes.fa").write_text(f">a\n{RELATED * 3}\n")
    run("tokenize", tmp_path / "genes.fa", "--recipe", "generator", "--out", tmp_path / "store", "--workers", 1)
    assert len(TokenStore(tmp_path / "store")) == 6
    small = [*SMALL, "--set", "backbone.key_value_heads=1"]
    run("train", "generator", tmp_path / "store", "--out", tmp_path / "run", *small)
    capsys.readouterr()
    one = ["--set", "data.frames=1"]
    assert main(["train", "generator", str(tmp_path / "store"), "--out", str(tmp_path / "other"), *small, *one]) == 1
    assert "made with data settings {'frames': 6}" in capsys.readouterr().err


def test_prollama_in_two_stages(tmp_path, capsys):
    """Text of proteins, then instructions in an adapter, merged; and what it is asked for."""
    pytest.importorskip("tokenizers")
    (tmp_path / "p.fasta").write_text(">P1\nMKTAYIAKQR\n>P2\nGSHMLEDPVA\n>P3\nMVLSPADKTNV\n")
    (tmp_path / "families.tsv").write_text("P1\tGlobin-like superfamily\nP3\tOB-fold superfamily\n")
    proteins = bio.read(tmp_path / "p.fasta", "protein")
    bio.write_instructions(tmp_path / "proteins.jsonl", proteins)
    families = bio.read_superfamilies(tmp_path / "families.tsv")
    assert bio.write_instructions(tmp_path / "it.jsonl", proteins, families) == 4
    run("train", "prollama", tmp_path / "proteins.jsonl", "--size", "tiny-proteins", "--out", tmp_path / "one", *SMALL)
    second = ["--base", tmp_path / "one", "--adapt", "lora", "--set", "adapt.rank=2", "--steps", 3]
    run("train", "prollama", tmp_path / "it.jsonl", "--out", tmp_path / "two", *second)
    assert "adapter=" in capsys.readouterr().out
    base, model = pv.load(tmp_path / "one"), pv.load(tmp_path / "one", adapter=tmp_path / "two")
    prompt = bio.superfamily_prompt("Globin-like superfamily")
    assert model.score([prompt])[0] != base.score([prompt])[0]
    merge_adapter(model)
    remove_adapters(model)
    model.save(tmp_path / "merged")
    run("generate", tmp_path / "merged", "-n", 2, "--prefix", prompt, "--max-length", 5, "-o", tmp_path / "out.txt")
    assert all(line.startswith(prompt) for line in (tmp_path / "out.txt").read_text().splitlines())
    run("score", tmp_path / "merged", tmp_path / "it.jsonl", "-o", tmp_path / "scores.csv")
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 5
    run("embed", tmp_path / "merged", tmp_path / "proteins.jsonl", "-o", tmp_path / "out.npz")
    pv.load(tmp_path / "merged").save(tmp_path / "theirs", format="hf-llama")
    again = pv.load(tmp_path / "theirs")
    assert again.score([prompt]) == pytest.approx(pv.load(tmp_path / "merged").score([prompt]), abs=1e-4)


def test_prollama_learns_answers_alone(tmp_path):
    """The loss of the recipe is that of the answers: a prompt that cannot be known does not raise it."""
    pytest.importorskip("tokenizers")
    rng = np.random.default_rng(0)
    lines = [{"instruction": "".join(rng.choice(list("ACDEFGHIKLMNPQ"), 30)), "output": "yes"} for _ in range(64)]
    (tmp_path / "it.json").write_text(json.dumps(lines))
    small = [*SMALL[:-1], "60", "--set", "training.learning_rate=1e-2", "--set", "training.batch_tokens=512"]
    run("train", "prollama", tmp_path / "it.json", "--out", tmp_path / "run", *small)
    assert pv.load(tmp_path / "run").card.metrics["loss"] < 0.5  # of the prompts' letters alone it would be 2.6


def test_a_text_recipe_without_a_tokenizer_says_where_one_comes_from(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "Seq=<MK>"}\n')
    arguments = ["train", "prollama", tmp_path / "a.jsonl", "--size", "published", "--out", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 1
    assert "--base MODEL" in capsys.readouterr().err
    run("models", "describe", "prollama", "--size", "published")
    assert "32 blocks" in capsys.readouterr().out


def test_geneformer_from_counts_to_its_own_format(tmp_path):
    anndata = pytest.importorskip("anndata")
    transformers = pytest.importorskip("transformers")
    counts = np.random.default_rng(0).poisson(1.0, (12, 30)).astype(np.float32)
    adata = anndata.AnnData(counts)
    adata.var_names = [f"ENSG{i:011d}" for i in range(30)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    run("train", "geneformer", tmp_path / "cells.h5ad", "--out", tmp_path / "run", *SMALL)
    model = pv.load(tmp_path / "run")
    cells.embed(adata, model, layer=-2)
    assert adata.obsm["X_run"].shape == (12, 16)
    model.save(tmp_path / "theirs", format="hf-bert")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    (cell, *_) = cells.tokenize(adata, model.tokenizer)
    with torch.no_grad():
        want = theirs(torch.from_numpy(cell).long()[None], output_hidden_states=True).hidden_states[-2][0, 1:-1].mean(0)
    assert np.allclose(adata.obsm["X_run"][0], want.numpy(), atol=1e-5)


def test_entities_are_masked_from_a_file_and_from_a_store(tmp_path, capsys):
    """The same spans beside the data and in a store of it give the same weights."""
    (tmp_path / "p.fasta").write_text(">P1\nMKTAYIAKQRMKTAYIAKQR\n>P2\nGSHMLEDPVAGSHMLEDPVA\n")
    (tmp_path / "sites.bed").write_text("P1\t2\t9\nP2\t0\t4\nP2\t12\t18\n")
    masked = ["--set", "training.objective=entity-masked", "--set", "training.entity_mode=span", *SMALL]
    spans = ["--spans", tmp_path / "sites.bed"]
    run("train", "protein-encoder", tmp_path / "p.fasta", "--out", tmp_path / "a", *spans, *masked)
    store = ["--recipe", "protein-encoder", "--out", tmp_path / "store", "--workers", 1]
    run("tokenize", tmp_path / "p.fasta", *store, *spans)
    run("train", "protein-encoder", tmp_path / "store", "--out", tmp_path / "b", *masked)
    run("train", "protein-encoder", tmp_path / "p.fasta", "--out", tmp_path / "c", *SMALL)
    a, b, c = (pv.load(tmp_path / name) for name in "abc")
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs) and not all(torch.equal(p, r) for p, _, r in pairs)
    assert a.card.data["spans"]["file"] == "sites.bed"
    capsys.readouterr()
    for arguments, said in (
        (["protein-encoder", tmp_path / "store", *spans], "give --spans to processive tokenize"),
        (["protein-encoder", tmp_path / "p.fasta"], "needs data with spans"),
        (["cell-encoder", tmp_path / "p.fasta", *spans], "cells has none"),
    ):
        assert main(["train", *map(str, arguments), "--out", str(tmp_path / "d"), *masked]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.shared_data
def test_text_of_real_families_goes_from_alignments_to_instructions(shared, tmp_path):
    """Homologs of two superfamilies, by the names InterPro gives them."""
    pytest.importorskip("tokenizers")
    families = {
        "BLAT_ECOLX.a2m": "Beta-lactamase/transpeptidase-like superfamily",
        "1a3a_1_A.a3m": "Phosphotransferase/anion transporter superfamily",
    }
    records, of = [], {}
    for file, family in families.items():
        for number, record in enumerate(bio.read(shared / "bio" / "msa" / file, "protein").usable[:20]):
            name = f"{file}_{number}"
            kept = "".join(letter for letter in record.text if letter not in "-.").upper()
            records.append(Record(kept, name))
            of[name] = family
    assert bio.write_instructions(tmp_path / "it.jsonl", records, of) == 80
    run("train", "prollama", tmp_path / "it.jsonl", "--out", tmp_path / "run", *SMALL)
    assert len(text.read(tmp_path / "it.jsonl")) == 80

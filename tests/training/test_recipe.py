"""Recipes: the bundled ones, and those that are refused by name."""

from __future__ import annotations

import pytest
import torch
from processive import recipes
from processive.backbones import build
from processive.errors import ConfigError, InputError
from processive.training import Recipe, read_recipe

TEXT = """
name = "small"
domain = "chem"
[tokenizer]
name = "smiles"
[sizes.tiny.backbone]
family = "xlstm"
width = 16
depth = 1
[sizes.tiny.training]
steps = 10
clip = 1
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TEXT)
    return path


SIZES = [(name, size) for name in recipes.names() for size in recipes.sizes(name)]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_bundled_recipes_are_whole(name, size):
    recipe = read_recipe(name, size)
    assert recipe.name == name and recipe.size == size and recipe.description and recipe.source
    assert recipe.predictor or (recipe.training is not None and recipe.tokenizer["name"])
    if recipe.backbone and recipe.backbone.get("complement") is None:
        assert recipe.backbone_config(40).vocabulary_size == 40


def test_all_are_there_at_both_sizes():
    assert set(recipes.names()) == {
        *("chem-xlstm", "dna-xlstm", "prot-xlstm", "generator", "xtrimopglm", "prollama", "geneformer"),
        *("protein-encoder", "cell-encoder", "molecule-property"),
    }
    assert all({(name, "tiny"), (name, "published")} <= set(SIZES) for name in recipes.names())


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"),
    # Counted on the networks of the source repositories: Chem-xLSTM, DNA-xLSTM ("2m", sLSTM), with their heads.
    # GENERator, Llama-2-7B (ProLLaMA) and Geneformer as transformers counts them (test_published_recipes).
    [
        ("chem-xlstm published", 37, 14_816_400),
        ("dna-xlstm published", 16, 1_405_184),
        ("generator published", 4128, 1_162_061_824),
        ("generator published-3b", 4128, 2_998_262_784),
        ("prollama published", 32000, 6_738_415_616),
        ("prollama published-instructions", 32000, 6_738_415_616),
        ("geneformer published", 25426, 10_288_722),
        ("geneformer published-v2", 20275, 104_386_867),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, vocabulary, parameters):
    from processive.models.head import Head

    recipe = read_recipe(*name.split())
    config = recipe.backbone_config(vocabulary)
    with torch.device("meta"):
        parts = build(config), Head(recipe.head, width=config.width, vocabulary_size=vocabulary)
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters


def test_the_recipe_of_both_strands_trains(tmp_path):
    """A few steps at a small width, and its logits are those of either strand before and after."""
    from processive import bio
    from processive.training import train

    sequences = ["ACGTTGACCCATNNA" * 4, "GATTACA" * 5, "TTTTGGCA"]
    tokenizer = bio.DNATokenizer()
    small = {"backbone.width": 32, "backbone.depth": 2, "backbone.feed_forward_width": 40, "training.steps": 4}
    recipe = read_recipe("dna-xlstm", "published-strands", {**small, "training.accumulation": 1})
    model = recipe.build(tokenizer)
    assert model.backbone.config.complement == tokenizer.complement and model.width == 64

    def apart():
        own, other = (bio.logits(s, model) for s in (sequences, [bio.reverse_complement(s) for s in sequences]))
        return max(abs(a - b[::-1, list(tokenizer.complement)]).max() for a, b in zip(own, other, strict=True))

    assert apart() <= 1e-5
    before = model.head.weight.clone()
    train(model, [tokenizer.encode(s) for s in sequences], recipe.training, out=tmp_path / "run")
    assert not torch.equal(model.head.weight, before) and apart() <= 1e-5


def test_build_is_a_function_of_the_seed(file, tokenizer):
    state = torch.get_rng_state()
    weights = [
        read_recipe(file, overrides={"training.seed": seed}).build(tokenizer).head.weight.detach() for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_overrides(file):
    recipe = read_recipe(
        file,
        overrides={"training.minutes": "0.5", "backbone.depth": "2", "tokenizer.k": "6", "training.precision": "fp32"},
    )
    assert recipe.training.minutes == 0.5 and recipe.training.steps is None  # one limit takes the place of the other
    assert recipe.backbone["depth"] == 2 and recipe.tokenizer == {"name": "smiles", "k": 6}
    assert recipe.training.precision == "fp32"
    assert read_recipe(file, overrides={"training.max_length": "none"}).training.max_length is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.speed": 1}, "'speed'"),
        ({"steps": 1}, "no setting 'steps'"),
        ({"predictor.width": 1}, "no setting 'predictor.width'"),
        ({"training.steps": "many"}, "steps is 'many'"),
        ({"training.steps": True}, "steps is True"),
        ({"backbone.wings": 2}, "'wings'"),
    ],
    ids=str,
)
def test_overrides_that_are_refused(file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(file, overrides=overrides)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('domain = "chem"', "", "needs domain"),
        ("clip = 1", "clap = 1", "'clap'"),
        ("depth = 1", "depht = 1", "'depht'"),
        ("[sizes.tiny.training]", "[sizes.tiny.trainig]", "'trainig'"),
        ("[tokenizer]", "[tokeniser]", "'tokeniser'"),
        ("steps = 10", "", "Exactly one"),
        ("width = 16", "width = ", "not a TOML file"),
    ],
)
def test_mistakes_are_named(file, old, new, message):
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_recipe(file)


def test_unknown_names_sizes_and_files(file, tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'chem-lstm': .*chem-xlstm"):
        read_recipe("chem-lstm")
    with pytest.raises(ConfigError, match="no size 'huge'; it has tiny"):
        read_recipe(file, "huge")
    with pytest.raises(InputError, match="no such file"):
        read_recipe(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="directory"):
        read_recipe(tmp_path)


def test_a_predictor_has_no_backbone(tokenizer):
    recipe = read_recipe("molecule-property")
    assert isinstance(recipe, Recipe) and recipe.predictor["width"] == 128
    with pytest.raises(ConfigError, match="predictor"):
        recipe.build(tokenizer)


def test_a_size_may_change_the_tokenizer(file):
    file.write_text(
        TEXT + "[sizes.tiny.tokenizer]\nunits = []\n[sizes.other.backbone]\nfamily = 'xlstm'\nwidth = 8\ndepth = 1\n"
    )
    assert read_recipe(file).tokenizer == {"name": "smiles", "units": []}
    assert read_recipe(file, "other").tokenizer == {"name": "smiles"}


def test_the_small_chem_size_is_that_of_the_repository():
    config = read_recipe("chem-xlstm", "small").backbone_config(37)
    backbone = sum(p.numel() for p in build(config).parameters())
    assert backbone + 37 * config.width == 1_644_296

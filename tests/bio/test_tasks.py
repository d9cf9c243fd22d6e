import subprocess
import sys
import warnings

import numpy as np
import pytest
from processive import bio, inference
from processive.backbones import TransformerConfig
from processive.chem import SmilesTokenizer
from processive.errors import ConfigError, InputError
from processive.models import LanguageModel
from processive.sequences import Record, Records

GOOD, BAD = Record("MKL", "a", 1), Record("MJ", "b", 2, InputError("bad"))
RECORDS = Records((GOOD, BAD, Record("MKLVV", "c", 3)))


@pytest.mark.parametrize("name", ["dna", "dna-kmer", "protein"])
def test_make_tokenizer(name):
    assert bio.make_tokenizer({"name": name}, RECORDS).name == name


def test_make_tokenizer_takes_the_table_s_options():
    tokenizer = bio.make_tokenizer({"name": "dna-kmer", "k": 3, "tail": "refuse"})
    assert (tokenizer.k, tokenizer.tail, tokenizer.n) == (3, "refuse", "single")
    with pytest.raises(ConfigError, match="unknown setting 'q'"):
        bio.make_tokenizer({"name": "dna", "q": 3})
    with pytest.raises(ConfigError, match="names no tokenizer"):
        bio.make_tokenizer({"k": 3})
    with pytest.raises(ConfigError, match="No tokenizer is called 'rna'"):
        bio.make_tokenizer({"name": "rna"})


def test_tokenize_takes_the_usable_ones():
    tokenizer = bio.ProteinTokenizer()
    assert [tokenizer.decode(ids) for ids in bio.tokenize(RECORDS, tokenizer)] == ["MKL", "MKLVV"]
    with pytest.raises(InputError, match=r"record 1 \(a\), position 1: 'M'"):
        bio.tokenize([Record("MKL", "a", 1)], bio.DNATokenizer(iupac="refuse"))
    with pytest.raises(InputError, match="record 1: The sequence is empty"):
        bio.tokenize([Record("")], tokenizer)


def tiny(tokenizer, direction="bidirectional"):
    size = len(tokenizer.vocabulary)
    return LanguageModel(tokenizer, TransformerConfig(size, width=16, depth=2, heads=2, direction=direction))


@pytest.fixture
def model():
    return tiny(bio.ProteinTokenizer())


def test_embed_keeps_rows_aligned(model):
    mean = bio.embed(RECORDS, model)
    assert mean.shape == (3, 16)
    assert mean.dtype == np.float32
    assert np.isnan(mean[1]).all()
    residues = bio.embed(RECORDS, model, pooling="tokens")
    assert [rows.shape for rows in residues] == [(3, 16), (0, 16), (5, 16)]
    np.testing.assert_allclose(mean[0], residues[0].mean(0), atol=1e-5)
    np.testing.assert_allclose(bio.embed(RECORDS, model, pooling="last")[2], residues[2][-1], atol=1e-5)


def test_embed_gives_the_layers_asked_for(model):
    first, last = bio.embed(["MKL"], model, layer=[0, 2], pooling="tokens")
    ids = model.tokenizer.encode("MKL")[1:-1]
    np.testing.assert_allclose(first[0], model.backbone.embedding.weight.detach().numpy()[ids], atol=1e-6)
    np.testing.assert_allclose(last[0], bio.embed(["MKL"], model, pooling="tokens")[0], atol=1e-5)
    assert np.abs(first[0] - last[0]).max() > 1e-3


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_score_keeps_rows_aligned(direction):
    model = tiny(bio.ProteinTokenizer(), direction)
    scores = bio.score(RECORDS, model)
    assert np.isnan(scores[1])
    np.testing.assert_allclose(scores[[0, 2]], inference.score(model, ["MKL", "MKLVV"]), atol=1e-6)
    np.testing.assert_allclose(bio.score(["mkl"], model), scores[:1], atol=1e-6)


def test_generate(model):
    causal = tiny(bio.DNATokenizer(), "causal")
    sequences = bio.generate(causal, 3, prompts="acg", max_length=7, seed=1)
    assert len(sequences) == 3
    assert all(text.startswith("ACG") and len(text) <= 10 and set(text) <= set("ACGTN") for text in sequences)
    assert sequences == bio.generate(causal, 3, prompts="acg", max_length=7, seed=1)
    with pytest.raises(ConfigError, match="causal"):
        bio.generate(model, 1)


@pytest.mark.parametrize("verb", [bio.embed, bio.score])
def test_bad_input_is_refused_by_place(verb, model):
    with pytest.raises(InputError, match="record 2, position 2: 'J'"):
        verb(["MKL", "MJ"], model)
    with pytest.raises(InputError, match=r"record 7 \(x\), position 1: '1'"):
        verb([Record("1", "x", 7)], model)
    with pytest.raises(InputError, match="record 2: The sequence is empty"):
        verb(["MKL", ""], model)
    with pytest.raises(InputError, match="one string, not a list"):
        verb("MKL", model)
    with pytest.raises(ConfigError, match="'smiles' does not read DNA or proteins"):
        verb(["CCO"], tiny(SmilesTokenizer()))


def test_dna_given_to_a_protein_model_is_noticed(model):
    with pytest.warns(UserWarning, match="look like DNA"):
        bio.score(["ACGTACGT"], model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bio.score(["MKLVG"], model)
        bio.score(["ACGTACGT"], tiny(bio.DNATokenizer()))


def test_make_tokenizer_refuses_another_domain():
    with pytest.raises(ConfigError, match="'smiles' does not read DNA or proteins"):
        bio.make_tokenizer({"name": "smiles"})


def test_the_room_opens_without_biopython():
    code = """
import sys
sys.modules["Bio"] = None
from processive import bio
print(bio.reverse_complement("AAC"))
bio.translate("ATG")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "GTT"
    assert "pip install 'processive[bio]'" in done.stderr.splitlines()[-1]

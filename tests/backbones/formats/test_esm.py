"""ESM-2, ESM-C and Nucleotide Transformer beside the packages they come from (random weights, real sequences)."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import processive as pv
import pytest
import torch
from processive.backbones import TransformerConfig
from processive.bio import KmerTokenizer, ProteinTokenizer
from processive.errors import ConfigError, InputError
from processive.models import HeadConfig, LanguageModel
from processive.sequences import PackedBatch
from safetensors.torch import load_file, save_file

# Ubiquitin (P0CG48), insulin's two chains (P01308), glucagon (P01275), oxytocin (P01178); phiX174's and lambda's ends.
PROTEINS = [
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "FVNQHLCGSHLVEALYLVCGERGFFYTPKT",
    "GIVEQCCTSICSLYQLENYCN",
    "HSQGTFTSDYSKYLDSRRAQDFVQWLMNT",
    "CYIQNCPLG",
]
DNA = [
    "GAGTTTTATCGCTTCCATGACGCAGAAGTTAACACTTTCGGATATTTCTGATGAGTCGAAAAATTATCTTGATAAAGCAGGAATTACTACTGCTTGTTTACGAATTAAATCGAAGTGG",
    "GGGCGGCGACCTCGCGGGTTTTCGCTATTTATGAAAATTTTCNNTCCGGTTTAAGGCG",
    "TTTTCCGG",
]


def perturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def masked_batch(model, records):
    """The records packed, one in eight tokens of each but the first masked."""
    sequences = [model.tokenizer.encode(record) for record in records]
    for sequence in sequences[1:]:
        sequence[2::8] = model.vocabulary.require("mask")
    return PackedBatch.from_sequences(sequences)


def assert_equal_outputs(model, batch, hidden, logits, tolerance):
    """Compare every hidden layer and the logits with theirs at the real tokens."""
    _, mask = batch.to_padded(1)
    with torch.no_grad():
        ours = model.backbone.hidden_layers(batch)
        found = model(batch)[0]
    assert len(ours) == len(hidden)
    for one, other in zip(ours, hidden, strict=True):
        assert one.std() > 0.05
        assert (one - other[mask]).abs().max() <= tolerance
    assert found.std() > 0.1
    assert (found - logits[mask][:, : found.shape[1]]).abs().max() <= tolerance


def bitwise(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype, name
        assert torch.equal(two[name], tensor), name


# fair-esm


@pytest.fixture
def fair():
    return pytest.importorskip("esm")


def fair_model(fair, token_dropout=True, precision=torch.float32):
    model = perturb(fair.model.esm2.ESM2(num_layers=3, embed_dim=40, attention_heads=5, token_dropout=token_dropout))
    for layer in model.layers:
        rotary = layer.self_attn.rot_emb
        rotary.inv_freq = rotary.inv_freq.to(precision).float()
    return model


def fair_save(model, folder, name="esm2_t3_test", prefix="encoder.sentence_encoder.", as_dict=False, contacts=True):
    config = {"encoder_layers": 3, "encoder_embed_dim": 40, "encoder_attention_heads": 5}
    config["token_dropout"] = model.token_dropout
    state = model.state_dict()
    head = {name: state.pop(name) for name in list(state) if name.startswith("contact_head")}
    head_prefix = prefix.replace("sentence_encoder.", "")
    state = {(head_prefix if name.startswith("lm_head") else prefix) + name: part for name, part in state.items()}
    settings = config if as_dict else Namespace(**config, arch="esm2", extra=Namespace(seeds=[1, 2]))
    torch.save({"cfg": {"model": settings}, "model": state}, folder / f"{name}.pt")
    if contacts:
        torch.save({"model": head}, folder / f"{name}-contact-regression.pt")
    return folder / f"{name}.pt"


def fair_load(fair, path):
    with torch.serialization.safe_globals([Namespace]):
        return fair.pretrained.load_model_and_alphabet_local(path)[0].eval()


def fair_run(theirs, batch):
    padded, _ = batch.to_padded(1)
    with torch.no_grad():
        found = theirs(padded, repr_layers=range(4))
    return list(found["representations"].values()), found["logits"]


@pytest.mark.parametrize(
    ("token_dropout", "precision", "dtype", "tolerance"),
    [
        (True, torch.float32, torch.float32, 1e-4),
        (False, torch.float32, torch.float32, 1e-4),
        (True, torch.float16, torch.float32, 1e-4),
        (True, torch.float32, torch.float64, 1e-9),
        (True, torch.float16, torch.float64, 1e-9),
        (True, torch.bfloat16, torch.float64, 1e-9),
    ],
    ids=str,
)
def test_fair_esm_in_and_out(fair, tmp_path, monkeypatch, token_dropout, precision, dtype, tolerance):
    if dtype == torch.float64:  # its softmax alone is of float32 whatever the model is
        from esm import multihead_attention

        monkeypatch.setattr(multihead_attention, "utils_softmax", lambda x, dim, onnx_trace: x.softmax(dim))
    theirs = fair_model(fair, token_dropout, precision)
    ours = pv.load(fair_save(theirs, tmp_path), dtype=dtype)
    assert ours.name == "esm2_t3_test"
    batch = masked_batch(ours, PROTEINS)
    assert_equal_outputs(ours, batch, *fair_run(theirs.to(dtype), batch), tolerance)
    ours.save(tmp_path / "out", format="fair-esm")
    back = fair_load(fair, tmp_path / "out" / "esm2.pt")
    if dtype == torch.float32:
        bitwise(theirs.state_dict(), back.state_dict())
    files = (tmp_path / "esm2_t3_test.pt", tmp_path / "out" / "esm2.pt")
    with torch.serialization.safe_globals([Namespace]):
        before, after = (torch.load(file)["model"] for file in files)
    assert before.keys() == after.keys()
    assert_equal_outputs(ours, batch, *fair_run(back.to(dtype), batch), tolerance)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.sentence_encoder.", ""])
def test_fair_esm_prefixes_dicts_and_no_contact_head(fair, tmp_path, prefix):
    theirs = fair_model(fair)
    ours = pv.load(fair_save(theirs, tmp_path, prefix=prefix, as_dict=True, contacts=False))
    assert ours.contacts is None
    batch = masked_batch(ours, PROTEINS)
    assert_equal_outputs(ours, batch, *fair_run(theirs, batch), 1e-4)
    ours.save(tmp_path / "out", format="fair-esm")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["esm2.pt"]


def test_half_precision_files_keep_their_dtype(fair, tmp_path):
    theirs = fair_model(fair).half()
    ours = pv.load(fair_save(theirs, tmp_path))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float16}
    assert ours.backbone.config.rotary_precision == "float16"
    ours.save(tmp_path / "out", format="fair-esm")
    bitwise(theirs.float().state_dict(), fair_load(fair, tmp_path / "out" / "esm2.pt").state_dict())
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(tmp_path / "out" / "esm2.pt")["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_fair_esm_names_are_read_from_its_cache(fair, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    theirs = fair_model(fair)
    fair_save(theirs, cache, name="esm2_t6_8M_UR50D")

    def offline(url, *arguments, **options):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    ours = pv.load("esm2_t6_8M_UR50D")
    assert (ours.name, ours.card.licence) == ("esm2_t6_8M_UR50D", "MIT")
    batch = masked_batch(ours, PROTEINS)
    assert_equal_outputs(ours, batch, *fair_run(theirs, batch), 1e-4)
    assert ours.contacts is not None
    with pytest.raises(InputError, match=r"esm2_t48_15B_UR50D\.pt: .*not in the cache.*fair-esm/models/esm2_t48_15B"):
        pv.load("esm2_t48_15B_UR50D")
    (cache / "esm2_t6_8M_UR50D-contact-regression.pt").unlink()
    with pytest.raises(InputError, match="regression/esm2_t6_8M_UR50D-contact-regression"):
        pv.load("esm2_t6_8M_UR50D")


def test_fair_esm_names_are_downloaded_once(fair, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    fair_save(fair_model(fair), tmp_path, name="esm2_t6_8M_UR50D")
    asked = []

    def download(url, target, **options):
        asked.append(url)
        shutil.copy(tmp_path / Path(target).name, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert all(pv.load("esm2_t6_8M_UR50D").contacts is not None for _ in range(2))
    start = "https://dl.fbaipublicfiles.com/fair-esm/"
    name = "esm2_t6_8M_UR50D"
    assert asked == [f"{start}models/{name}.pt", f"{start}regression/{name}-contact-regression.pt"]


def test_fair_esm_names_are_its_own(fair):
    from processive.models.published import FAIR_ESM

    theirs = {name for name in vars(fair.pretrained) if name.startswith(("esm2_t", "esm1b_", "esm1v_"))}
    assert set(FAIR_ESM) == theirs - {"esm1v_t33_650M_UR90S"}  # another name for the first of five


@pytest.mark.parametrize(("name", "norm_before"), [("esm1b_test", True), ("esm1v_test", False)])
def test_esm1b_and_esm1v_in_and_out(fair, tmp_path, name, norm_before):
    args = {"encoder_layers": 3, "encoder_embed_dim": 40, "encoder_attention_heads": 5, "encoder_ffn_embed_dim": 72}
    args |= {"arch": "roberta_large", "max_positions": 80, "token_dropout": True}
    stripped = {key.removeprefix("encoder_"): value for key, value in args.items()}
    made = Namespace(**stripped, emb_layer_norm_before=norm_before)
    model = perturb(fair.ProteinBertModel(made, fair.Alphabet.from_architecture("ESM-1b")))
    state = model.state_dict()
    head = {key: state.pop(key) for key in list(state) if key.startswith("contact_head")}
    prefixed = {
        ("encoder." if key.startswith("lm_head") else "encoder.sentence_encoder.") + key: state[key] for key in state
    }
    torch.save({"args": Namespace(**args), "model": prefixed}, tmp_path / f"{name}.pt")
    if name.startswith("esm1b"):
        torch.save({"model": head}, tmp_path / f"{name}-contact-regression.pt")
    theirs = fair_load(fair, tmp_path / f"{name}.pt")
    assert theirs.embed_tokens.weight[32].abs().max() == 0 != state["embed_tokens.weight"][32].abs().max()
    ours = pv.load(tmp_path / f"{name}.pt")
    batch = masked_batch(ours, PROTEINS)
    assert_equal_outputs(ours, batch, *fair_run(theirs, batch), 1e-4)
    ours.save(tmp_path / "out", format="fair-esm")
    back = fair_load(fair, tmp_path / "out" / f"{name[:5]}.pt")
    want, found = theirs.state_dict(), back.state_dict()
    if name.startswith("esm1v"):  # there is none, and each loader makes up another
        want, found = ({key: d[key] for key in d if not key.startswith("contact_head")} for d in (want, found))
    bitwise(want, found)
    assert_equal_outputs(ours, batch, *fair_run(back, batch), 1e-4)
    ours.save(tmp_path / "hf", format="hf-esm")
    bitwise(ours.state_dict(), pv.load(tmp_path / "hf").state_dict())
    with pytest.raises(InputError, match="'protein_bert_base'"):
        torch.save({"args": Namespace(arch="protein_bert_base"), "model": prefixed}, tmp_path / "esm1.pt")
        pv.load(tmp_path / "esm1.pt")


# transformers


def hf_esm(kind):
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 72}
    nucleotide = {"vocab_size": 4105, "mask_token_id": 2, "pad_token_id": 1, "eos_token_id": None}
    protein = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1}
    options = {
        "esm2": protein | {"position_embedding_type": "rotary", "token_dropout": True, "layer_norm_eps": 1e-5},
        "esm1b": protein | {"max_position_embeddings": 90, "emb_layer_norm_before": True, "token_dropout": True},
        "nt-v1": nucleotide | {"max_position_embeddings": 60, "token_dropout": True, "layer_norm_eps": 1e-12},
        "untied": nucleotide | {"max_position_embeddings": 60, "tie_word_embeddings": False},
    }
    options["untied"]["emb_layer_norm_before"] = True
    config = transformers.EsmConfig(**common, **options[kind])
    return perturb(transformers.EsmForMaskedLM(config))


def hf_run(theirs, batch):
    padded, mask = batch.to_padded(1)
    with torch.no_grad():
        found = theirs(padded, attention_mask=mask.long(), output_hidden_states=True)
    layers = list(found.hidden_states)
    base = theirs.base_model
    with torch.no_grad():
        layers[-1] = base(padded, attention_mask=mask.long()).last_hidden_state
    return layers, found.logits


@pytest.mark.parametrize("kind", ["esm2", "esm1b", "nt-v1", "untied"])
def test_hf_esm_in_and_out(tmp_path, kind):
    theirs = hf_esm(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pv.load(tmp_path / "theirs")
    assert type(ours.tokenizer) is (ProteinTokenizer if kind.startswith("esm") else KmerTokenizer)
    batch = masked_batch(ours, PROTEINS if kind.startswith("esm") else DNA)
    assert_equal_outputs(ours, batch, *hf_run(theirs, batch), 1e-4)
    ours.save(tmp_path / "out", format="hf-esm")
    back = type(theirs).from_pretrained(tmp_path / "out").eval()
    bitwise(theirs.state_dict(), back.state_dict())
    assert_equal_outputs(ours, batch, *hf_run(back, batch), 1e-4)
    if kind == "untied":  # rotary positions and the share of masked tokens are float32 whatever the model is
        assert_equal_outputs(ours.double(), batch, *hf_run(theirs.double(), batch), 1e-9)


def test_hf_esm_of_transformers_4(tmp_path):
    """Frequencies in every layer, position_ids, a copy of the decoder: all of it in pytorch_model.bin."""
    theirs = hf_esm("esm2")
    rounded = theirs.esm.rotary_embeddings.inv_freq.half().float()
    theirs.esm.rotary_embeddings.inv_freq = rounded
    state = dict(theirs.state_dict())
    del state["esm.rotary_embeddings.inv_freq"]
    for i in range(3):
        state[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = rounded
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    ours = pv.load(tmp_path)
    assert ours.backbone.config.rotary_precision == "float16"
    batch = masked_batch(ours, PROTEINS)
    assert_equal_outputs(ours, batch, *hf_run(theirs, batch), 1e-4)
    ours.save(tmp_path / "out", format="hf-esm")
    bitwise(theirs.state_dict(), type(theirs).from_pretrained(tmp_path / "out").state_dict())


@pytest.mark.parametrize("kind", ["esm2", "nt-v1"])
def test_hf_tokenizer_files_give_their_ids(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    hf_esm(kind).save_pretrained(tmp_path / "theirs")
    ours = pv.load(tmp_path / "theirs")
    ours.save(tmp_path / "out", format="hf-esm")
    theirs = transformers.EsmTokenizer.from_pretrained(tmp_path / "out")
    for record in (*PROTEINS, "AXBUZO.-") if kind == "esm2" else (*DNA, "N", "ACGTNNACGTACGTN", "ACGTACGTA", "A"):
        assert theirs(record).input_ids == ours.tokenizer.encode(record).tolist()
        assert ours.tokenizer.decode(ours.tokenizer.encode(record)) == record
    assert theirs.mask_token_id == ours.vocabulary.role("mask")
    assert theirs.pad_token_id == ours.vocabulary.role("pad")


def test_fair_esm_and_hf_esm_are_one_model(fair, tmp_path):
    ours = pv.load(fair_save(fair_model(fair), tmp_path))
    ours.save(tmp_path / "hf", format="hf-esm")
    pv.load(tmp_path / "hf").save(tmp_path / "fair", format="fair-esm")
    bitwise(ours.state_dict(), pv.load(tmp_path / "fair").state_dict())


# ESM-C


def hf_esmc():
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmcConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=80, vocab_size=64
    )
    return perturb(transformers.EsmcForMaskedLM(config))


def own_esmc(theirs):
    """The tensors of transformers' model in the authors' own layout, as the key table of their code has it."""
    state = theirs.state_dict()
    names = {"input_layernorm": "attn.layernorm_qkv.0", "post_attention_layernorm": "ffn.0", "mlp.down_proj": "ffn.3"}
    names |= {"self_attn.o_proj": "attn.out_proj", "self_attn.q_norm": "attn.q_ln", "self_attn.k_norm": "attn.k_ln"}
    own = {"embed.weight": state["esmc.embed_tokens.weight"], "transformer.norm.weight": state["esmc.norm.weight"]}
    for kind in ("weight", "bias"):
        for number, name in ((0, "dense"), (2, "layer_norm"), (3, "decoder")):
            own[f"sequence_head.{number}.{kind}"] = state[f"lm_head.{name}.{kind}"]
    for i in range(3):
        there, here = f"esmc.layers.{i}.", f"transformer.blocks.{i}."
        heads = [state[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"]
        own[here + "attn.layernorm_qkv.1.weight"] = torch.cat(heads)
        gate_up = [state[f"{there}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        own[here + "ffn.1.weight"] = torch.cat(gate_up)
        for theirs_name, own_name in names.items():
            for kind in ("weight", "bias"):
                if f"{there}{theirs_name}.{kind}" in state:
                    own[f"{here}{own_name}.{kind}"] = state[f"{there}{theirs_name}.{kind}"]
    return own


def test_esmc_of_transformers_and_of_its_authors(tmp_path):
    theirs = hf_esmc()
    theirs.save_pretrained(tmp_path / "theirs")
    torch.save(own_esmc(theirs), tmp_path / "esmc_300m.pth")
    ours, from_own = pv.load(tmp_path / "theirs"), pv.load(tmp_path / "esmc_300m.pth")
    assert from_own.name == "esmc_300m"
    bitwise(ours.state_dict(), from_own.state_dict())
    assert ours.backbone.config == from_own.backbone.config
    assert len(ours.vocabulary) == 33
    assert ours.vocabulary.tokens[31] == "|"
    batch = masked_batch(ours, [*PROTEINS, "|".join(PROTEINS[1:3])])
    assert ours(batch)[0].shape[1] == 33  # the embedding is padded to 64 rows
    assert_equal_outputs(ours, batch, *hf_run(theirs, batch), 1e-4)
    from_own.save(tmp_path / "hf", format="hf-esmc")
    back = type(theirs).from_pretrained(tmp_path / "hf").eval()
    bitwise(theirs.state_dict(), back.state_dict())
    assert_equal_outputs(ours, batch, *hf_run(back, batch), 1e-4)
    ours.save(tmp_path / "own", format="esmc")
    bitwise(own_esmc(theirs), torch.load(tmp_path / "own" / "esmc.pth"))


@torch.no_grad()
def test_esmc_gives_what_its_authors_code_gave(golden, patterned, tmp_path):
    recorded = golden("esmc")
    torch.save(patterned(recorded["shapes"]), tmp_path / "esmc.pth")
    model = pv.load(tmp_path / "esmc.pth").eval()
    assert model.tokenizer.encode(recorded["sequences"][0]).tolist() == recorded["ids"][0]
    batch = PackedBatch.from_sequences(recorded["ids"])
    layers = [layer[:, recorded["columns"]] for layer in model.backbone.hidden_layers(batch)[1:]]
    for got, wanted in zip([*layers, model(batch)[0]], [*recorded["layers"], recorded["logits"]], strict=True):
        want = torch.tensor([row for rows in wanted for row in rows])
        assert (got - want).abs().max() <= 1e-4
        assert want.std() > 0.1


def test_esmc_tokenizer_gives_their_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.EsmcTokenizer()
    theirs.save_pretrained(tmp_path / "theirs")
    hf_esmc().save_pretrained(tmp_path / "theirs")
    ours = pv.load(tmp_path / "theirs")
    ours.save(tmp_path / "out", format="hf-esmc")
    for tokenizer in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")):
        for record in (*PROTEINS, "AXBUZO.-", "ACD|EFG"):
            assert tokenizer(record).input_ids == ours.tokenizer.encode(record).tolist()
            assert ours.tokenizer.decode(ours.tokenizer.encode(record)) == record
    data = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"A": 6, "G": 5}
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="token 5 is 'G' in place of 'A'"):
        pv.load(tmp_path / "theirs")


def test_esmc_own_files_have_heads_of_64():
    config = TransformerConfig(
        64, 96, 2, heads=2, direction="bidirectional", norm="layer", norm_bias=True, qk_norm="width",
        post_blocks_norm_bias=False, residual_scale=18**0.5,
    )  # fmt: skip
    model = LanguageModel(ProteinTokenizer(chains=True), config, HeadConfig("esm", tied=False))
    with pytest.raises(ConfigError, match="64 channels; this model has 48"):
        model.save("nowhere", format="esmc")


# Nucleotide Transformer v2: its code is not on PyPI; what it gave, in JAX, is recorded

NT_V2 = TransformerConfig(
    4107, 48, 2, heads=4, direction="bidirectional", norm="layer", activation="swiglu", feed_forward_width=64,
    bias=True, feed_forward_bias=False, norm_eps=1e-12, rotary_precision="float32",
)  # fmt: skip


def test_nucleotide_transformer_v2_has_its_keys_and_comes_back(tmp_path):
    tokenizer = KmerTokenizer(layout="nucleotide-transformer-v2")
    head = HeadConfig("esm", norm_eps=1e-12, contacts=True)
    ours = perturb(LanguageModel(tokenizer, NT_V2, head))
    ours.save(tmp_path / "out", format="nucleotide-transformer-v2")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    layer = "esm.encoder.layer.1."
    assert weights[layer + "intermediate.dense.weight"].shape == (128, 48)
    assert weights[layer + "output.dense.weight"].shape == (48, 64)
    assert not {layer + "intermediate.dense.bias", layer + "output.dense.bias"} & set(weights)
    assert layer + "attention.self.rotary_embeddings.inv_freq" in weights
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["token_dropout"], config["vocab_size"]) == ("esm", False, 4107)
    back = pv.load(tmp_path / "out")
    assert back.tokenizer.layout == "nucleotide-transformer-v2"
    bitwise(ours.state_dict(), back.state_dict())
    back.save(tmp_path / "again", format="nucleotide-transformer-v2")
    bitwise(weights, load_file(tmp_path / "again" / "model.safetensors"))
    with pytest.raises(ConfigError, match="activation is 'swiglu' and would become 'gelu'"):
        ours.save(tmp_path / "v1", format="hf-esm")


@torch.no_grad()
def test_nucleotide_transformer_v2_gives_what_its_authors_code_gave(golden, patterned, tmp_path):
    recorded = golden("nucleotide_transformer_v2")
    (tmp_path / "config.json").write_text(json.dumps(recorded["config"]))
    save_file(patterned(recorded["shapes"]), tmp_path / "model.safetensors")
    model = pv.load(tmp_path).eval()
    assert [model.tokenizer.encode(text).tolist() for text in recorded["sequences"]] == recorded["ids"]
    sequence, position = recorded["masked"]
    recorded["ids"][sequence][position] = model.vocabulary.role("mask")
    batch = PackedBatch.from_sequences(recorded["ids"])
    found = [*model.backbone.hidden_layers(batch)[1:], model(batch)[0][:, recorded["columns"]]]
    for got, wanted in zip(found, [*recorded["layers"], recorded["logits"]], strict=True):
        want = torch.tensor([row for rows in wanted for row in rows])
        assert (got - want).abs().max() <= 1e-5
        assert want.std() > 0.1


@pytest.mark.parametrize(("width", "depth", "heads", "millions"), [(512, 22, 16, 100), (1024, 29, 16, 500)])
def test_nucleotide_transformer_v2_is_as_large_as_it_is_called(width, depth, heads, millions):
    config = replace(NT_V2, width=width, depth=depth, heads=heads, feed_forward_width=4 * width)
    with torch.device("meta"):
        model = LanguageModel(KmerTokenizer(layout="nucleotide-transformer-v2"), config, HeadConfig("esm"))
    assert round(model.parameters_count / 1e8) * 100 == millions

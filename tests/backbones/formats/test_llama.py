"""Llama and Mistral have the numbers of transformers, from its files and back in them (random weights)."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processive import models
from processive.backbones import TransformerConfig
from processive.backbones.formats import HF_LLAMA
from processive.backbones.formats.table import Checkpoint
from processive.bio import ProteinTokenizer
from processive.errors import ConfigError, InputError
from processive.inference import generate
from processive.sequences import PackedBatch

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 4128,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 77,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
VARIANTS = {
    "grouped": {},
    "all heads, tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
}
KMERS = {"tokenizer_class": "DNAKmerTokenizer", "k": 6, "add_bos_token": True, "add_eos_token": False}


def saved(theirs, folder, **changes):
    """Write their model with GENERator's tokenizer, and changes to its configuration."""
    theirs.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(KMERS))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama(perturb, **changes):
    return perturb(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)))


def their_layers(theirs, batch):
    """Hidden layers and logits of packed sequences."""
    padded, mask = batch.to_padded(3)
    with torch.no_grad():
        found = theirs(padded, attention_mask=mask.long(), output_hidden_states=True)
    return [layer[mask] for layer in found.hidden_states], found.logits[mask]


def compare(theirs, ours, batch, within, monkeypatch):
    """Assert that every hidden layer and the logits are equal."""
    layers, logits = their_layers(theirs, batch)
    monkeypatch.undo()
    with torch.no_grad():
        found = ours.backbone.hidden_layers(batch)
        found_logits = ours(batch)[0]
    assert len(found) == len(layers) == 4
    for ours_layer, layer in zip(found, layers, strict=True):
        assert (ours_layer - layer).abs().max() <= within
    assert (found_logits - logits).abs().max() <= within
    assert logits.std() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_logits_equal_transformers(variant, perturb, batch, tmp_path, monkeypatch):
    theirs = llama(perturb, **VARIANTS[variant])
    compare(theirs, models.load(saved(theirs, tmp_path)), batch, 1e-4, monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_logits_equal_transformers_in_float64(variant, perturb, batch, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = llama(perturb, **VARIANTS[variant])
    frequencies = theirs.model.rotary_emb.inv_freq.double()
    theirs = theirs.double()
    ours = models.load(saved(theirs, tmp_path))
    assert next(ours.parameters()).dtype == torch.float64
    # Their norms and angles are of float32 whatever the weights are of.

    def angles(x, position_ids):
        turned = position_ids[..., None] * frequencies.tile(2)
        return turned.cos(), turned.sin()

    theirs.model.rotary_emb.forward = angles
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    compare(theirs, ours, batch, 1e-9, monkeypatch)


def test_streaming_equals_transformers(perturb, tmp_path):
    theirs = llama(perturb)
    ours = models.load(saved(theirs, tmp_path))
    tokens = torch.randint(5, 40, (2, 20))
    with torch.no_grad():
        want = theirs(tokens).logits
        state, found = None, []
        for start, end in ((0, 7), (7, 8), (8, 20)):
            piece = tokens[:, start:end]
            offsets = None if state is None else state.lengths
            lengths = torch.tensor([piece.shape[1]] * 2)
            batch = PackedBatch.from_lengths(piece.flatten(), lengths, offsets=offsets)
            logits, state = ours(batch, state, return_state=True)
            found.append(logits.unflatten(0, piece.shape))
    assert (torch.cat(found, 1) - want).abs().max() <= 1e-4


def test_greedy_generation_equals_transformers(perturb, tmp_path):
    theirs = llama(perturb)
    ours = models.load(saved(theirs, tmp_path))
    prompts = ["ACGTTA" * n for n in (1, 4, 9)]
    found = generate(ours, prompts=prompts, temperature=0, max_length=12)
    for prompt, text in zip(prompts, found, strict=True):
        start = torch.tensor(ours.tokenizer.encode(prompt).tolist())[None]
        forbidden = [[i] for i in range(32) if i != 2]  # what we never draw
        ids = theirs.generate(start, max_new_tokens=12, do_sample=False, bad_words_ids=forbidden, eos_token_id=2)
        assert ours.tokenizer.decode(ids[0].tolist()) == text
        assert len(text) > len(prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_export_is_read_by_transformers_bit_by_bit(variant, dtype, perturb, same, tmp_path):
    theirs = llama(perturb, **VARIANTS[variant]).to(dtype)
    ours = models.load(saved(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "again", format="hf-llama")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    same(theirs.state_dict(), again.state_dict())
    for key in (*SHAPE, *VARIANTS[variant]):
        if key != "rope_theta":
            assert getattr(again.config, key) == getattr(theirs.config, key), key
    assert again.config.rope_parameters == theirs.config.rope_parameters
    same(ours.state_dict(), models.load(tmp_path / "again").state_dict())


def test_a_window_is_mistral(perturb, batch, same, tmp_path):
    shape = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"}
    config = transformers.MistralConfig(**shape, sliding_window=5, max_position_embeddings=64, head_dim=6)
    theirs = perturb(transformers.MistralForCausalLM(config))
    ours = models.load(saved(theirs, tmp_path / "theirs"))
    layers, logits = their_layers(theirs, batch)
    with torch.no_grad():
        for found, layer in zip(ours.backbone.hidden_layers(batch), layers, strict=True):
            assert (found - layer).abs().max() <= 1e-4
        assert (ours(batch)[0] - logits).abs().max() <= 1e-4
    ours.save(tmp_path / "again", format="hf-llama")
    same(theirs.state_dict(), transformers.MistralForCausalLM.from_pretrained(tmp_path / "again").state_dict())


def test_generator_is_llama_under_another_name(perturb, tmp_path):
    theirs = llama(perturb)
    folder = saved(theirs, tmp_path / "theirs", architectures=["GENERatorForCausalLM"])
    (folder / "tokenizer_config.json").unlink()
    ours = models.load(folder)
    assert ours.tokenizer.encode("AAAAAATTTTTT").tolist() == [1, 32, 1397]
    with pytest.raises(InputError, match="position 1"):
        ours.tokenizer.encode("<s>AAAAAA")  # which would begin twice
    named = {"added_tokens_decoder": {"0": {"content": "<oov>"}, "4": {"content": "<mask>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert models.load(folder).tokenizer.to_dict() == ours.tokenizer.to_dict()
    named["added_tokens_decoder"]["4"]["content"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match="Token 4 is '<pad>'"):
        models.load(folder)
    ours.save(tmp_path / "again", format="hf-llama")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["GENERatorForCausalLM"]
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert {key: settings[key] for key in KMERS} == KMERS


def test_prollama_has_its_sentencepiece_model(perturb, same, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    lines = [f"[Generate by superfamily] Superfamily=<Ankyrin {i}> Seq=<MKV{'ACDEFGHIKL' * i}>" for i in range(1, 60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, vocab_size=350, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    theirs = llama(perturb, vocab_size=350)
    folder = saved(theirs, tmp_path / "theirs")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    ours = models.load(folder)
    text = "[Generate by superfamily] Superfamily=<Ankyrin 3>  é"
    assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
    assert generate(ours, prompts=text, temperature=0, max_length=3)[0].startswith(text)
    ours.save(tmp_path / "again", format="hf-llama")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == content.getvalue()
    again = models.load(tmp_path / "again")
    same(ours.state_dict(), again.state_dict())
    assert again.tokenizer.to_dict() == ours.tokenizer.to_dict()
    ours.save(tmp_path / "own")
    assert models.load(tmp_path / "own").tokenizer.encode(text).tolist() == ours.tokenizer.encode(text).tolist()


def test_a_model_of_ours_is_written_with_its_own_tokenizer(same, tmp_path):
    config = TransformerConfig(33, 24, 2, heads=4, key_value_heads=2, rotary_precision="float32")
    ours = models.LanguageModel(ProteinTokenizer(), config).eval()
    ours.save(tmp_path, format="hf-llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.from_numpy(ours.tokenizer.encode("MKVLA")).long()
    with torch.no_grad():
        logits = ours(PackedBatch.from_sequences([tokens]))[0]
        assert (theirs(tokens[None]).logits[0] - logits).abs().max() <= 1e-4
    again = models.load(tmp_path)
    assert isinstance(again.tokenizer, ProteinTokenizer)
    same(ours.state_dict(), again.state_dict())


@pytest.mark.parametrize("version", [4, 5])
def test_rotary_base_of_either_version(version):
    shape = {key: value for key, value in SHAPE.items() if key != "rope_theta"}
    rope = {"rope_theta": 5e5} if version == 4 else {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config = {**shape, **rope, "model_type": "llama", "architectures": ["GENERatorForCausalLM"]}
    assert HF_LLAMA.config_in(Checkpoint(Path(), config, {}))["backbone"]["rotary_base"] == 5e5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.25),
        ("quantization_config", {"bits": 4}),
        ("architectures", ["LlamaForSequenceClassification"]),
    ],
)
def test_what_would_not_run_alike_is_refused_by_name(key, value, tmp_path):
    config = {**SHAPE, "model_type": "llama", "architectures": ["GENERatorForCausalLM"], key: value}
    with pytest.raises(InputError, match=key):
        HF_LLAMA.config_in(Checkpoint(tmp_path, config, {}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm", "layer"), ("activation", "gelu"), ("qk_norm", "head"), ("residual_scale", 0.5), ("positions", "none")],
)
def test_what_llama_cannot_hold_is_not_written(field, value, perturb, tmp_path):
    ours = models.load(saved(llama(perturb), tmp_path / "theirs"))
    object.__setattr__(ours.backbone.config, field, value)
    with pytest.raises(ConfigError, match=field):
        ours.save(tmp_path / "again", format="hf-llama")
    assert not (tmp_path / "again" / "config.json").exists()


def test_parameters_of_the_published_generator():
    config = {
        **SHAPE, "hidden_size": 3072, "intermediate_size": 8448, "num_hidden_layers": 30, "num_attention_heads": 32,
        "num_key_value_heads": 4, "model_type": "llama", "architectures": ["GENERatorForCausalLM"],
    }  # fmt: skip
    entries = HF_LLAMA.table(HF_LLAMA.config_in(Checkpoint(Path(), config, {})))
    assert len({name for entry in entries for name in entry.foreign}) == 273

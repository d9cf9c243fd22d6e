"""xTrimoPGLM: its own code is no package, so a short network in float64 written from its description is the peer."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from processive import inference, models
from processive.backbones import build, config_from_dict
from processive.backbones.formats import PROTEINGLM
from processive.backbones.formats.table import Checkpoint
from processive.errors import ConfigError, InputError
from safetensors.torch import load_file, save_file

TOKENS = [
    "<pad>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>", "<gmask>", "<smask>", "<eod>", "<sop>", "<eop>", "<eos>"
]  # fmt: skip
SHAPE = {
    "model_type": "ProteinGLM",
    "architectures": ["ProteinGLMForMaskedLM"],
    "num_layers": 3,
    "padded_vocab_size": 128,
    "hidden_size": 20,
    "ffn_hidden_size": 27,
    "kv_channels": 8,
    "num_attention_heads": 3,
    "seq_length": 77,
    "layernorm_epsilon": 1e-5,
    "glu_activation": "geglu",
    "is_causal": False,
    "rotary_embedding_2d": False,
}
VARIANTS = {
    "masked": {},
    "causal": {"is_causal": True, "architectures": ["ProteinGLMForCasualLM"]},
    "masked, 2D": {"rotary_embedding_2d": True},
    "causal, 2D": {"is_causal": True, "rotary_embedding_2d": True, "architectures": ["ProteinGLMForCasualLM"]},
    "shared keys": {"multi_query_attention": True, "multi_query_group_num": 1, "glu_activation": "swiglu"},
    "no DeepNorm": {"deepnorm": False, "apply_residual_connection_post_layernorm": False, "post_layer_norm": False},
    "norm skipped": {"deepnorm": False, "apply_residual_connection_post_layernorm": True},
}


def random_tensors(config):
    """Tensors of a checkpoint under its own names, in float64."""
    width, inner, heads, dim = (
        config[k] for k in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    )
    shared = config["multi_query_group_num"] if config.get("multi_query_attention") else heads
    vocabulary = config["padded_vocab_size"]
    shapes = {"transformer.embedding.word_embeddings.weight": (vocabulary, width)}
    for i in range(config["num_layers"]):
        block = f"transformer.encoder.layers.{i}"
        linears = {
            "self_attention.query_key_value": ((heads + 2 * shared) * dim, width),
            "self_attention.dense": (width, heads * dim),
            "mlp.dense_h_to_4h": (2 * inner, width),
            "mlp.dense_4h_to_h": (width, inner),
        }
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    if config.get("post_layer_norm", True):
        final = "transformer.encoder.final_layernorm"
        shapes |= {f"{final}.weight": (width,), f"{final}.bias": (width,)}
    output = "transformer.output_layer"
    shapes |= {f"{output}.weight": (vocabulary, width), f"{output}.bias": (vocabulary,)}
    return {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}


def turned(x, positions):
    """Rotate-half of [length, heads, dim]."""
    dim = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    angle = positions[:, None, None] * frequencies.float()  # which theirs are stored as
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def reference(config, tensors, tokens):
    """Hidden layers and logits of one sequence."""
    heads, dim = config["num_attention_heads"], config["kv_channels"]
    length = len(tokens)
    place, zero = torch.arange(length).double(), torch.zeros(length).double()

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)

    def rotate(x):
        if not config["rotary_embedding_2d"]:
            return turned(x, place)
        first, second = (zero, place) if config["is_causal"] else (place, zero)
        return torch.cat(
            [turned(half, where) for half, where in zip(x.chunk(2, -1), (first, second), strict=True)], dim=-1
        )

    def attend(x, name):
        mixed = linear(x, f"{name}.query_key_value")
        if config.get("multi_query_attention"):
            q, k, v = mixed.unflatten(1, (-1, dim)).split((heads, 1, 1), dim=1)  # one group
            k, v = k.expand(-1, heads, -1), v.expand(-1, heads, -1)
        else:
            q, k, v = mixed.view(length, heads, 3 * dim).split(dim, dim=-1)  # each head's q, k, v side by side
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(dim)
        if config["is_causal"]:
            scores = scores.masked_fill(place[None, :] > place[:, None], -torch.inf)
        return linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), f"{name}.dense")

    def feed_forward(x, name):
        plain, gate = linear(x, f"{name}.dense_h_to_4h").chunk(2, dim=-1)  # the second half is the activated one
        act = F.gelu if config["glu_activation"] == "geglu" else F.silu
        return linear(plain * act(gate), f"{name}.dense_4h_to_h")

    deepnorm = config.get("deepnorm", True)
    skip_scale = math.sqrt(2 * config["num_layers"]) if deepnorm else 1
    normed_skip = deepnorm or config["apply_residual_connection_post_layernorm"]
    x = tensors["transformer.embedding.word_embeddings.weight"][tokens]
    layers = [x]
    for i in range(config["num_layers"]):
        block = f"transformer.encoder.layers.{i}"
        for part, f in (("input_layernorm", attend), ("post_attention_layernorm", feed_forward)):
            n = norm(x, f"{block}.{part}")
            name = f"{block}.self_attention" if f is attend else f"{block}.mlp"
            x = skip_scale * (n if normed_skip else x) + f(n, name)
        layers.append(x)
    if config.get("post_layer_norm", True):
        layers[-1] = norm(x, "transformer.encoder.final_layernorm")
    return layers, linear(layers[-1], "transformer.output_layer")


def written(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_text("\n".join(TOKENS))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_logits_equal_the_reference(variant, batch, tmp_path):
    config = SHAPE | VARIANTS[variant]
    tensors = random_tensors(config)
    ours = models.load(written(tmp_path, config, tensors))
    with torch.no_grad():
        layers, logits = ours.backbone.hidden_layers(batch), ours(batch)[0]
    assert logits.shape[1] == len(TOKENS)
    found = [batch.split(layer) for layer in layers]
    for number, (tokens, ours_logits) in enumerate(zip(batch.split(batch.tokens), batch.split(logits), strict=True)):
        want, want_logits = reference(config, tensors, tokens)
        for ours_layer, layer in zip(found, want, strict=True):
            assert (ours_layer[number] - layer).abs().max() <= 1e-9
        assert (ours_logits - want_logits[:, : len(TOKENS)]).abs().max() <= 1e-9
        assert want_logits.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_by_bit(variant, dtype, same, tmp_path):
    config = SHAPE | VARIANTS[variant]
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    ours = models.load(written(tmp_path / "theirs", config, tensors))
    ours.save(tmp_path / "again", format="proteinglm")
    again = models.load(tmp_path / "again")
    same(ours.state_dict(), again.state_dict())
    assert again.backbone.config == ours.backbone.config
    assert (tmp_path / "again" / "tokenizer.model").read_text().split() == TOKENS
    there = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: there[key] for key in config} == config
    stored = load_file(tmp_path / "again" / "model.safetensors")
    frequencies = [name for name in stored if name.endswith("rotary_emb.inv_freq")]
    assert len(frequencies) == config["num_layers"]
    half = config["kv_channels"] // (2 if config["rotary_embedding_2d"] else 1)
    for name in frequencies:
        assert torch.allclose(
            stored.pop(name).double(), 10000.0 ** (-torch.arange(0, half, 2).double() / half), rtol=1e-6
        )
    same(stored, tensors)


def test_sequences_begin_and_end_as_its_tokenizer_has_them(tmp_path):
    masked = models.load(written(tmp_path / "masked", SHAPE, random_tensors(SHAPE)))
    assert masked.tokenizer.encode("LAc").tolist() == [1, 2, 20, 34]
    assert masked.vocabulary.role("mask") == 28
    config = SHAPE | VARIANTS["causal"]
    causal = models.load(written(tmp_path / "causal", config, random_tensors(config)))
    assert causal.tokenizer.encode("LA").tolist() == [29, 32, 34, 1, 2, 34]
    assert causal.tokenizer.decode([29, 32, 34, 1, 2, 34]) == "LA"
    with pytest.raises(InputError, match="position 2"):
        masked.tokenizer.encode("LJ")
    assert len(inference.generate(causal, 2, prompts=["", "LAG"], max_length=4)) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_bit", 4), ("moe", True), ("rmsnorm", True), ("untie_head", True), ("glu_activation", "relu"),
     ("add_bias_linear", False)],
)  # fmt: skip
def test_what_would_not_run_alike_is_refused_by_name(key, value, tmp_path):
    with pytest.raises(InputError, match=key):
        PROTEINGLM.config_in(Checkpoint(tmp_path, SHAPE | {key: value}, {}))


@pytest.mark.parametrize(
    ("field", "value"), [("norm", "rms"), ("norm_placement", "post"), ("skip_scale", 1.5), ("activation", "gelu")]
)
def test_what_it_cannot_hold_is_not_written(field, value, tmp_path):
    ours = models.load(written(tmp_path / "theirs", SHAPE, random_tensors(SHAPE)))
    object.__setattr__(ours.backbone.config, field, value)
    with pytest.raises(ConfigError, match=field):
        ours.save(tmp_path / "again", format="proteinglm")


@pytest.mark.parametrize(
    ("billions", "width", "depth", "heads", "inner", "dim"),
    [(1, 2048, 24, 32, 5461, 64), (3, 2560, 36, 40, 6832, 64), (7, 4096, 36, 32, 10922, 128)],
)
def test_parameters_of_the_published_sizes(billions, width, depth, heads, inner, dim, tmp_path):
    (tmp_path / "tokenizer.model").write_text("\n".join(TOKENS))
    shape = {"hidden_size": width, "num_layers": depth, "num_attention_heads": heads}
    config = SHAPE | shape | {"ffn_hidden_size": inner, "kv_channels": dim}
    parts = PROTEINGLM.config_in(Checkpoint(tmp_path, config, {}))
    with torch.device("meta"):
        network = build(config_from_dict(parts["backbone"]))
    attention, gated = 4 * width * heads * dim + 3 * heads * dim + width, 3 * width * inner + 2 * inner + width
    want = 128 * width + depth * (attention + gated + 4 * width) + 2 * width
    assert sum(parameter.numel() for parameter in network.parameters()) == want
    assert round((want + 128 * width + 128) / 1e9) == billions


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_stored_frequencies_tell_their_precision(precision, tmp_path):
    tensors = random_tensors(SHAPE)
    turns = (10000.0 ** (-torch.arange(0, 8, 2) / 8)).to(getattr(torch, precision))
    stored = {f"transformer.encoder.layers.{i}.self_attention.rotary_emb.inv_freq": turns.clone() for i in range(3)}
    ours = models.load(written(tmp_path, SHAPE, tensors | stored))
    assert ours.backbone.config.rotary_precision == precision
    stored["transformer.encoder.layers.1.self_attention.rotary_emb.inv_freq"] = turns * 2
    with pytest.raises(InputError, match=r"layers\.1.*inv_freq"):
        models.load(written(tmp_path, SHAPE, tensors | stored))

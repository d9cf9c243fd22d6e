"""xLSTM-7B and its kind, as the xlstm package and transformers have it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from processive.backbones import config_from_dict, config_to_dict
from processive.backbones.formats.table import Checkpoint, shapes_of_theirs, to_ours, to_theirs
from processive.backbones.formats.xlstm_large import HF_XLSTM, XLSTM_LARGE
from processive.errors import ConfigError, InputError
from processive.models import HeadConfig, LanguageModel, load
from processive.sequences import PackedBatch, tokenizer_from_dict
from safetensors.torch import save_file

pytest.importorskip("xlstm")
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
from xlstm.xlstm_large.utils import convert_single_weights_to_fused_weights

LENGTHS = (1, 70, 7, 64)
EXACT = {  # norms reduce in float32 and kernels run in bfloat16 by default
    "norm_reduction_force_float32": False,
    "autocast_kernel_dtype": "float32",
}
INFERENCE = EXACT | {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
    "return_last_states": True,
}
CHUNKS = INFERENCE | {"mode": "train", "chunk_size": 1}  # in any dtype; in inference states are float32
# Their cells add an epsilon to the normaliser, and ours do not.
RUNS = [(torch.float32, INFERENCE, 1e-4), (torch.float64, CHUNKS | {"eps": 0.0}, 1e-9)]


def sizes(width, heads, depth, **other):
    return {"embedding_dim": width, "num_heads": heads, "num_blocks": depth, "vocab_size": 13, **other}


OTHER_CAPS = {
    "gate_soft_cap": 5.0,
    "output_logit_soft_cap": 2.0,
    "ffn_proj_factor": 1.9,
    "ffn_round_up_to_multiple_of": 8,
}
MODELS = {
    "even": sizes(64, 2, 2),
    "odd": sizes(24, 3, 3, qk_dim_factor=0.75, norm_eps=1e-5),
    "other-caps": sizes(32, 4, 1, **OTHER_CAPS),
    "no-last-norm": sizes(32, 2, 1, add_out_norm=False),
}


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def theirs_of(name, dtype=torch.float32, kernels=INFERENCE, **other):
    return perturbed(xLSTMLarge(xLSTMLargeConfig(**MODELS[name], **kernels, **other))).to(dtype)


def checkpoint_of(weights, config):
    return Checkpoint(Path("absent"), config, {name: tuple(tensor.shape) for name, tensor in weights.items()})


def read(checkpoint, weights, format):
    assert format.recognise(checkpoint.config, set(weights))
    parts = format.config_in(checkpoint)
    table = format.table(parts)
    model = LanguageModel(
        tokenizer_from_dict(parts["tokenizer"]), config_from_dict(parts["backbone"]), HeadConfig(**parts["head"])
    )
    assert shapes_of_theirs(table, model.state_dict()) == checkpoint.shapes
    model.load_state_dict(to_ours(table, weights.__getitem__), assign=True)
    return model.eval(), parts


def full(parts, model):
    """The parts as they are when a model is written."""
    return {
        "tokenizer": parts["tokenizer"],
        "backbone": config_to_dict(model.backbone.config),
        "head": asdict(model.head.config),
        "card": {},
    }


def compare(ours, sequences, theirs, most, *, logits_most=None):
    """``theirs`` gives the hidden layers and the logits of one sequence; transformers' logits are always float32."""
    batch = PackedBatch.from_sequences(sequences)
    layers, (logits, _) = ours.backbone.hidden_layers(batch), ours(batch)
    for sequence, start in zip(sequences, batch.cu_seqlens.tolist(), strict=False):
        place = slice(start, start + len(sequence))
        want, want_logits = theirs(sequence)
        assert len(want) == len(layers)
        for got, layer in zip(layers, want, strict=True):
            assert (got[place] - layer).abs().max() <= most
        assert (logits[place] - want_logits).abs().max() <= (logits_most or most)
    assert logits.std() > 0.1


def logits_of(result):
    """Logits of the first sequence, where a state may come with them."""
    return (result[0] if isinstance(result, tuple) else result)[0]


def watched(modules, run):
    """What modules give in one run, batch and tuples taken off."""
    layers = []
    take = lambda m, i, out: layers.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
    hooks = [module.register_forward_hook(take) for module in modules]
    result = run()
    for hook in hooks:
        hook.remove()
    return [*layers[:-2], layers[-1]], result


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "kernels", "most"), RUNS, ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_layers_and_logits_equal_the_package(name, dtype, kernels, most):
    theirs = theirs_of(name, dtype, kernels)
    ours, _ = read(checkpoint_of(theirs.state_dict(), asdict(theirs.config)), theirs.state_dict(), XLSTM_LARGE)
    modules = [theirs.embedding, *theirs.backbone.blocks, theirs.backbone.out_norm]

    def run(sequence):
        return watched(modules, lambda: logits_of(theirs(sequence[None])))

    compare(ours, [torch.randint(0, 13, (length,)) for length in LENGTHS], run, most)


@torch.no_grad()
def test_streamed_tokens_equal_the_package_stepping():
    theirs = theirs_of("odd")
    ours, _ = read(checkpoint_of(theirs.state_dict(), asdict(theirs.config)), theirs.state_dict(), XLSTM_LARGE)
    state = theirs_state = None
    for position, token in enumerate(torch.randint(0, 13, (9,))):
        batch = PackedBatch.one_each(token[None], positions=torch.tensor([position]))
        logits, state = ours(batch, state, return_state=True)
        want, theirs_state = theirs(token[None, None], theirs_state)
        assert (logits - want[0]).abs().max() <= 1e-4
    for i, block in enumerate(state.blocks):  # both hold the unscaled k
        C, n, m = theirs_state[i]
        assert (block[0] - C * (m[..., None] - block[2][..., None, None]).exp()).abs().max() <= 1e-4
        assert (block[1] - n * (m - block[2][..., None]).exp()).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_written_weights_load_strictly_and_are_the_same_bits(name):
    theirs = theirs_of(name)
    weights = theirs.state_dict()
    ours, parts = read(checkpoint_of(weights, asdict(theirs.config)), weights, XLSTM_LARGE)
    written = to_theirs(XLSTM_LARGE.table(full(parts, ours)), ours.state_dict())
    assert set(written) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(written[key], tensor), key
    config = XLSTM_LARGE.config_out(full(parts, ours))
    again = xLSTMLarge(xLSTMLargeConfig(**config | INFERENCE)).eval()
    again.load_state_dict(written, strict=True)
    tokens = torch.randint(0, 13, (2, 13))
    assert torch.equal(again(tokens)[0], theirs(tokens)[0])


@torch.no_grad()
def test_fused_weights_are_read_and_keep_their_bits():
    theirs = theirs_of("odd")
    fused = convert_single_weights_to_fused_weights(dict(theirs.state_dict()))
    again = theirs_of("odd", weight_mode="fused")
    again.load_state_dict(fused, strict=True)
    ours, parts = read(checkpoint_of(fused, asdict(again.config)), fused, XLSTM_LARGE)
    same, _ = read(checkpoint_of(theirs.state_dict(), asdict(theirs.config)), theirs.state_dict(), XLSTM_LARGE)
    for key, tensor in same.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    assert ours.backbone.config == same.backbone.config
    back = to_theirs(XLSTM_LARGE.table(parts), ours.state_dict())
    assert set(back) == set(fused)
    for key, tensor in fused.items():
        assert torch.equal(back[key], tensor), key


HF_MODELS = {
    "even": sizes(128, 2, 2),
    "wide-heads": sizes(128, 4, 3, norm_eps=1e-5),
    "other-caps": sizes(128, 1, 1, **OTHER_CAPS),
}


def hugging_face(name, dtype=torch.float32, kernels=INFERENCE):
    transformers = pytest.importorskip("transformers")
    values = dict(HF_MODELS[name])
    renamed = {"hidden_size": values.pop("embedding_dim"), "num_hidden_layers": values.pop("num_blocks")}
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**values, **renamed, **kernels, use_cache=False))
    model.backbone.out_norm.force_float32_reductions = False  # whatever the configuration says
    return perturbed(model).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "kernels", "most"), RUNS, ids=["float32", "float64"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_hidden_layers_and_logits_equal_transformers(name, dtype, kernels, most):
    theirs = hugging_face(name, dtype, kernels)
    weights = theirs.state_dict()
    ours, _ = read(checkpoint_of(weights, theirs.config.to_dict()), weights, HF_XLSTM)
    modules = [theirs.backbone.embeddings, *theirs.backbone.blocks, theirs.backbone.out_norm]

    def run(sequence):
        return watched(modules, lambda: theirs(sequence[None], use_cache=False).logits[0])

    compare(ours, [torch.randint(0, 13, (length,)) for length in LENGTHS], run, most, logits_most=max(most, 1e-5))


@torch.no_grad()
@pytest.mark.parametrize("name", HF_MODELS)
def test_transformers_loads_what_is_written(name, tmp_path):
    theirs = hugging_face(name)
    weights = theirs.state_dict()
    ours, parts = read(checkpoint_of(weights, theirs.config.to_dict()), weights, HF_XLSTM)
    written = to_theirs(HF_XLSTM.table(full(parts, ours)), ours.state_dict())
    assert set(written) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(written[key], tensor), key
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = HF_XLSTM.config_out(full(parts, ours))
    assert HF_XLSTM.recognise(config, set(written))
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, 13, (2, 13))
    got, want = (model.eval()(tokens, use_cache=False).logits for model in (again, theirs))
    assert (got - want).abs().max() <= 1e-5  # other kernels, norms in float32


def test_the_two_formats_differ_by_one_name():
    theirs = theirs_of("even")
    large = theirs.state_dict()
    ours, parts = read(checkpoint_of(large, asdict(theirs.config)), large, XLSTM_LARGE)
    written = to_theirs(HF_XLSTM.table(full(parts, ours)), ours.state_dict())
    assert set(large) ^ set(written) == {"embedding.weight", "backbone.embeddings.weight"}
    assert not HF_XLSTM.recognise({}, set(large))
    assert not XLSTM_LARGE.recognise({}, set(written))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_bias": True}, "use_bias"), ({"v_dim_factor": 0.5}, "v_dim_factor"), ({"num_heads": 3}, "num_heads"),
     ({"embedding_dim": 32}, "embedding_dim"), ({"num_blocks": 7}, "num_blocks"), ({"vocab_size": 9}, "vocab_size")],
)  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(change, named):
    theirs = theirs_of("even")
    checkpoint = checkpoint_of(theirs.state_dict(), {**asdict(theirs.config), **change})
    with pytest.raises(InputError, match=named):
        XLSTM_LARGE.config_in(checkpoint)


@pytest.mark.parametrize(
    ("part", "change"),
    [("backbone", {"blocks": ["mlstm-7b", "slstm"]}), ("backbone", {"bias": True}), ("head", {"tied": True}),
     ("backbone", {"direction": "alternating"}), ("backbone", {"norm_offset": True})],
)  # fmt: skip
def test_what_they_have_not_is_not_written(part, change, tmp_path):
    theirs = theirs_of("even")
    ours, parts = read(checkpoint_of(theirs.state_dict(), asdict(theirs.config)), theirs.state_dict(), XLSTM_LARGE)
    parts = full(parts, ours)
    parts[part].update(change)
    model = LanguageModel(ours.tokenizer, config_from_dict(parts["backbone"]), HeadConfig(**parts["head"]))
    for format in ("xlstm-large", "hf-xlstm", "xlstm"):
        with pytest.raises(ConfigError):
            model.save(tmp_path, format=format)
    assert not any(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(("format", "config"), [("xlstm-large", "config.yaml"), ("hf-xlstm", "config.json")])
def test_a_folder_is_loaded_and_written_back(format, config, tmp_path, same):
    theirs = theirs_of("odd")
    weights = theirs.state_dict()
    ours, _ = read(checkpoint_of(weights, asdict(theirs.config)), weights, XLSTM_LARGE)
    ours.save(tmp_path, format=format)
    assert (tmp_path / config).is_file()
    again = load(tmp_path)
    assert again.backbone.config == ours.backbone.config and again.head.config == ours.head.config
    same(dict(again.state_dict()), dict(ours.state_dict()))


@torch.no_grad()
def test_shards_of_the_package_are_one_model(tmp_path, same):
    yaml = pytest.importorskip("yaml")
    theirs = theirs_of("odd")
    names = sorted(theirs.state_dict())
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: theirs.state_dict()[name] for name in part}, tmp_path / f"model_{number}.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(theirs.config)))
    ours, _ = read(checkpoint_of(theirs.state_dict(), asdict(theirs.config)), theirs.state_dict(), XLSTM_LARGE)
    same(dict(load(tmp_path).state_dict()), dict(ours.state_dict()))


def test_the_published_model_has_the_published_size():
    shape = {"family": "xlstm", "vocabulary_size": 50304, "width": 4096, "depth": 32, "heads": 8, "blocks": "mlstm-7b"}
    parts = {"backbone": shape, "head": {"soft_cap": 30.0}}
    with torch.device("meta"):
        network = LanguageModel(tokenizer_from_dict({"name": "ids", "size": 9}), config_from_dict(shape), HeadConfig())
    theirs = shapes_of_theirs(HF_XLSTM.table(parts), network.state_dict())
    assert sum(torch.Size(each).numel() for each in theirs.values()) == 6_865_424_896
    assert theirs["backbone.blocks.31.ffn.proj_up.weight"] == (10944, 4096)

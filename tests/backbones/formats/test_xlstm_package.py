"""The xlstm package's models, read and written: every hidden layer, the logits, the state, each bit of the weights."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from processive.backbones import XLSTMConfig, build, config_from_dict, config_to_dict
from processive.backbones.formats.table import Checkpoint, shapes_of_theirs, to_ours, to_theirs
from processive.backbones.formats.xlstm import XLSTM_PACKAGE, from_block_stack, to_block_stack
from processive.backbones.formats.xlstm_keys import cell_layout
from processive.errors import ConfigError, InputError
from processive.models import HeadConfig, LanguageModel, load
from processive.sequences import PackedBatch, tokenizer_from_dict

pytest.importorskip("xlstm")
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple, recurrent_step_stabilized_simple

LENGTHS = (1, 19, 7, 4)


def settings(kinds="mms", width=32, heads=2, *, taps=4, block=4, factor=2.0, feed_forward=None, **other):
    """The package's configuration: m and s say which block stands where."""
    mlstm = mLSTMLayerConfig(conv1d_kernel_size=taps, qkv_proj_blocksize=block, num_heads=heads, proj_factor=factor)
    slstm = sLSTMLayerConfig(backend="vanilla", num_heads=heads, conv1d_kernel_size=taps)
    return {
        "mlstm_block": mLSTMBlockConfig(mlstm) if "m" in kinds else None,
        "slstm_block": sLSTMBlockConfig(slstm, feed_forward or FeedForwardConfig()) if "s" in kinds else None,
        "slstm_at": [i for i, kind in enumerate(kinds) if kind == "s"],
        "num_blocks": len(kinds),
        "embedding_dim": width,
        "context_length": max(LENGTHS),
        **other,
    }


MODELS = {
    "mlstm": settings("mm", vocab_size=11),
    "slstm": settings("ss", vocab_size=11),
    "mixed": settings("smms", 32, 4, vocab_size=11),
    "odd-width": settings("ms", 40, 2, taps=3, block=8, factor=1.7, vocab_size=11),
    "biases": settings("ms", vocab_size=11, bias=True),
    "no-last-norm": settings("ms", vocab_size=11, add_post_blocks_norm=False),
    "tied": settings("ms", vocab_size=11, tie_weights=True),
    "feed-forward": settings(
        "ms", 40, vocab_size=11, feed_forward=FeedForwardConfig(
            proj_factor=1.1, round_proj_up_dim_up=False, round_proj_up_to_multiple_of=8
        ),
    ),
    "rounded-down": settings("m", 72, vocab_size=11),
}  # fmt: skip
MODELS["rounded-down"]["mlstm_block"].mlstm.round_proj_up_dim_up = False


def theirs_of(name, dtype=torch.float32, *, eps=1e-6):
    """A model of the package with random weights; ``eps`` is what its cells add to the normaliser, and ours do not."""
    model = xLSTMLMModel(xLSTMLMModelConfig(**MODELS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for block in model.xlstm_block_stack.blocks:
        if hasattr(block.xlstm, "mlstm_cell"):
            block.xlstm.mlstm_cell.backend_fn = partial(parallel_stabilized_simple, eps=eps)
            block.xlstm.mlstm_cell.backend_fn_step = partial(recurrent_step_stabilized_simple, eps=eps)
    return model.to(dtype)


def checkpoint_of(model, config=None, **tensors):
    weights = {**model.state_dict(), **tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return Checkpoint(Path(), asdict(model.config) if config is None else config, shapes), weights


def read(checkpoint, weights, format=XLSTM_PACKAGE):
    """Our model of a checkpoint."""
    assert format.recognise(checkpoint.config, set(weights))
    parts = format.config_in(checkpoint)
    table = format.table(parts)
    model = LanguageModel(
        tokenizer_from_dict(parts["tokenizer"]), config_from_dict(parts["backbone"]), HeadConfig(**parts["head"])
    )
    copies = format.copies(parts)
    expected = {name: shape for name, shape in checkpoint.shapes.items() if name not in copies}
    assert shapes_of_theirs(table, model.state_dict()) == expected
    model.load_state_dict(to_ours(table, weights.__getitem__), assign=True)
    return model.eval(), parts


def hidden_layers(model, tokens):
    """What the package's blocks give, for one sequence."""
    layers = []
    hooks = [model.token_embedding, *model.xlstm_block_stack.blocks, model.xlstm_block_stack.post_blocks_norm]
    hooks = [module.register_forward_hook(lambda m, i, out: layers.append(out[0])) for module in hooks]
    logits = model(tokens[None])[0]
    for hook in hooks:
        hook.remove()
    return [*layers[:-2], layers[-1]], logits


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "eps", "most"), [(torch.float32, 1e-6, 1e-4), (torch.float64, 0.0, 1e-9)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_layers_and_logits_equal_the_package(name, dtype, eps, most):
    theirs = theirs_of(name, dtype, eps=eps)
    ours, _ = read(*checkpoint_of(theirs))
    sequences = [torch.randint(0, 11, (length,)) for length in LENGTHS]
    batch = PackedBatch.from_sequences(sequences)
    layers, (logits, _) = ours.backbone.hidden_layers(batch), ours(batch)
    assert layers[-1].dtype == dtype
    for sequence, start in zip(sequences, batch.cu_seqlens.tolist(), strict=False):
        place = slice(start, start + len(sequence))
        want, want_logits = hidden_layers(theirs, sequence)
        assert len(want) == len(layers)
        for got, layer in zip(layers, want, strict=True):
            assert (got[place] - layer).abs().max() <= most
        assert (logits[place] - want_logits).abs().max() <= most
    assert logits.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlstm", "slstm", "mixed"])
def test_streamed_tokens_equal_the_package_stepping(name):
    theirs = theirs_of(name, torch.float64, eps=0.0)
    ours, _ = read(*checkpoint_of(theirs))
    tokens = torch.randint(0, 11, (9,))
    state = theirs_state = None
    for position, token in enumerate(tokens):
        batch = PackedBatch.one_each(token[None], positions=torch.tensor([position]))
        logits, state = ours(batch, state, return_state=True)
        want, theirs_state = theirs.step(token[None, None], theirs_state)
        assert (logits - want[0]).abs().max() <= 1e-9
    for i, block in enumerate(state.blocks):
        cell = theirs_state[f"block_{i}"]
        if "mlstm_state" in cell:
            c, n, m = cell["mlstm_state"]  # their k is scaled
            scale = block.cell[0].shape[-2] ** 0.5
            assert (block.cell[0] * block.cell[2].exp()[..., None, None] - c * m.exp() * scale).abs().max() <= 1e-9
            assert (
                block.cell[1] - n[..., 0] * scale * (m[..., 0] - block.cell[2][..., None]).exp()
            ).abs().max() <= 1e-9
        else:
            for part, want in zip(block.cell, cell["slstm_state"], strict=True):
                assert (part.flatten(1) - want).abs().max() <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_written_weights_load_strictly_and_are_the_same_bits(name):
    theirs = theirs_of(name)
    ours, parts = read(*checkpoint_of(theirs))
    written = with_copies(parts, to_theirs(XLSTM_PACKAGE.table(parts), ours.state_dict()))
    assert set(written) == set(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(written[key], tensor), key
    full = {**parts, "backbone": config_to_dict(ours.backbone.config)}
    del full["foreign"]
    config = XLSTM_PACKAGE.config_out(full)
    again = rebuilt(config)
    again.load_state_dict(with_copies(full, to_theirs(XLSTM_PACKAGE.table(full), ours.state_dict())), strict=True)
    tokens = torch.randint(0, 11, (2, 13))
    assert torch.equal(again.eval()(tokens), xLSTMLMModel.forward(theirs, tokens))
    assert XLSTM_PACKAGE.recognise(config, set(written))


def with_copies(parts, tensors):
    return tensors | {name: tensors[other] for name, other in XLSTM_PACKAGE.copies(parts).items()}


def rebuilt(config):
    """The package's model of a mapping, as its users make it from YAML."""
    values = dict(config)
    if values["mlstm_block"] is not None:
        values["mlstm_block"] = mLSTMBlockConfig(mLSTMLayerConfig(**values["mlstm_block"]["mlstm"]))
    if values["slstm_block"] is not None:
        block = values["slstm_block"]
        values["slstm_block"] = sLSTMBlockConfig(
            sLSTMLayerConfig(**block["slstm"]), FeedForwardConfig(**block["feedforward"])
        )
    return xLSTMLMModel(xLSTMLMModelConfig(**values))


@torch.no_grad()
def test_cuda_cells_are_told_by_the_shape_of_their_kernel(tmp_path):
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCellConfig

    theirs = theirs_of("mixed")
    changed = {}
    for i in (0, 3):
        cell = theirs.xlstm_block_stack.blocks[i].xlstm.slstm_cell
        other = sLSTMCell_cuda(sLSTMCellConfig(hidden_size=32, num_heads=4), skip_backend_init=True)
        for part in ("recurrent_kernel", "bias"):
            getattr(other, part)[:] = getattr(cell, part).clone()
        for key, tensor in other.state_dict().items():
            changed[f"xlstm_block_stack.blocks.{i}.xlstm.slstm_cell.{key}"] = tensor
    assert changed["xlstm_block_stack.blocks.0.xlstm.slstm_cell._bias_"].shape == (4 * 32,)
    checkpoint, weights = checkpoint_of(theirs, **changed)
    ours, parts = read(checkpoint, weights)
    same, _ = read(*checkpoint_of(theirs))
    for key, tensor in same.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    written = to_theirs(XLSTM_PACKAGE.table(parts), ours.state_dict())
    for key, tensor in weights.items():
        assert torch.equal(written[key], tensor), key
    ours.save(tmp_path, format="xlstm-cuda")
    kept = torch.load(tmp_path / "model.pt", weights_only=True)
    for key, tensor in weights.items():
        assert torch.equal(kept[key], tensor), key
    assert "backend: cuda" in (tmp_path / "config.yaml").read_text()


def test_the_gate_named_forget_feeds_the_input_gate():
    theirs = theirs_of("slstm")
    ours, _ = read(*checkpoint_of(theirs))
    cell = theirs.xlstm_block_stack.blocks[0].xlstm
    assert torch.equal(ours.backbone.blocks[0].input_forget.weight[0], cell.fgate.weight)
    assert torch.equal(ours.backbone.blocks[0].input_forget.weight[1], cell.igate.weight)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model.encoder."])
def test_a_stack_of_blocks_in_a_network_of_ones_own(prefix):
    config = settings("ms", 40)
    theirs = xLSTMBlockStack(xLSTMBlockStackConfig(**config)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours = from_block_stack(weights, vocabulary_size=7)
    batch = PackedBatch.from_sequences([torch.randint(0, 7, (n,)) for n in (12, 5)])
    got = ours(batch)[0]
    for sequence, hidden in zip(batch.split(batch.tokens), batch.split(got), strict=True):
        assert (theirs(ours.embedding(sequence)[None])[0] - hidden).abs().max() <= 1e-4
    written = to_block_stack(ours)
    theirs.load_state_dict(written, strict=True)
    for name, tensor in weights.items():
        assert torch.equal(written[name.removeprefix(prefix)], tensor)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_embeddings_2d": "abs"}, "position_embeddings_2d"),
        ({"num_blocks": 5}, "num_blocks"),
        ({"vocab_size": 12}, "vocab_size"),
        ({"slstm_block": {"slstm": {"function": "lstm"}}}, "function"),
        ({"slstm_block": {"slstm": {"num_heads": 2}}}, "num_heads"),
        ({"slstm_block": {"feedforward": {"act_fn": "swish"}}}, "act_fn"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(change, named):
    theirs = theirs_of("mixed")
    checkpoint, _ = checkpoint_of(theirs, {**asdict(theirs.config), **change})
    with pytest.raises(InputError, match=named):
        XLSTM_PACKAGE.config_in(checkpoint)


def test_shapes_that_are_not_ours_are_refused():
    theirs = theirs_of("mixed")
    for name, shape, match in [
        ("xlstm_block_stack.blocks.0.xlstm.slstm_cell._recurrent_kernel_", (4, 8, 8), "_recurrent_kernel_"),
        ("xlstm_block_stack.blocks.1.xlstm.mlstm_cell.igate.weight", (2, 192), "heads"),
        ("xlstm_block_stack.blocks.1.xlstm.proj_down.weight", (32, 96), "inner"),
    ]:
        checkpoint, _ = checkpoint_of(theirs)
        with pytest.raises(InputError, match=match):
            XLSTM_PACKAGE.config_in(Checkpoint(Path(), {}, {**checkpoint.shapes, name: shape}))
    with pytest.raises(ConfigError, match="'vanilla' or 'cuda'"):
        cell_layout("triton", 2, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_offset": False},
        {"direction": "alternating"},
        {"blocks": "mlstm-7b"},
        {"rotary": "head"},
        {"norm_eps": 1e-6},
    ],
    ids=str,
)
def test_what_the_package_has_not_is_not_written(change, tmp_path):
    ours, _ = read(*checkpoint_of(theirs_of("mlstm")))
    config = config_from_dict({**config_to_dict(ours.backbone.config), **change})
    with pytest.raises(ConfigError):
        LanguageModel(ours.tokenizer, config).save(tmp_path, format="xlstm")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        to_block_stack(build(config))


def test_a_tokenizer_goes_with_the_model(tmp_path):
    config = XLSTMConfig(16, 32, 1, heads=2, norm_offset=True)
    model = LanguageModel(tokenizer_from_dict({"name": "dna"}), config)
    model.save(tmp_path, format="xlstm")
    assert load(tmp_path).tokenizer.to_dict() == model.tokenizer.to_dict()
    assert load(tmp_path).vocabulary == model.vocabulary


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed", "tied"])
def test_a_folder_is_loaded_and_written_back(name, tmp_path, same):
    import yaml

    theirs = theirs_of(name)
    config = {key: value for key, value in asdict(theirs.config).items() if key != "_block_map"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(
        {"state_dict": {f"model.{key}": tensor for key, tensor in theirs.state_dict().items()}}, tmp_path / "a.ckpt"
    )
    ours = load(tmp_path)
    ours.save(tmp_path / "written", format="xlstm")
    again = rebuilt(yaml.safe_load((tmp_path / "written" / "config.yaml").read_text())).eval()
    written = torch.load(tmp_path / "written" / "model.pt", weights_only=True)
    same(written, dict(theirs.state_dict()))
    again.load_state_dict(written, strict=True)
    tokens = torch.randint(0, 11, (1, 13))
    assert torch.equal(again(tokens), theirs(tokens))
    assert (ours(PackedBatch.from_sequences([tokens[0]]))[0] - again(tokens)[0]).abs().max() <= 1e-4
    ours.save(tmp_path / "own")
    same(dict(load(tmp_path / "own").state_dict()), dict(ours.state_dict()))


@torch.no_grad()
def test_weights_without_a_configuration_are_enough(tmp_path, same):
    theirs = theirs_of("mixed")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours, _ = read(*checkpoint_of(theirs))
    found = load(tmp_path / "weights.pt")
    assert found.backbone.config == ours.backbone.config
    same(dict(found.state_dict()), dict(ours.state_dict()))
    assert found.tokenizer.encode("3 10 0").tolist() == [3, 10, 0]
    assert found.tokenizer.decode([3, 10, 0]) == "3 10 0"
    for record, position in [("3 11", 2), ("x", 1), ([1, 2, -1], 3)]:
        with pytest.raises(InputError) as error:
            found.tokenizer.encode(record)
        assert error.value.position == position


def test_factors_give_the_widths_that_they_stand_for():
    from processive.backbones.formats.dna_xlstm import _rounded_down
    from processive.backbones.formats.xlstm import feed_forward
    from processive.backbones.formats.xlstm_keys import expansion_of
    from processive.backbones.formats.xlstm_large import _share

    for width in range(4, 1200, 4):
        for inner in (64, 128, 448, 1024):
            expansion = expansion_of(inner, width, 2.0)
            assert XLSTMConfig(9, width, 1, heads=1, expansion=expansion).inner_width(0) == inner
            assert int(_rounded_down(inner, width, 64) * width / 64) * 64 == inner
        for inner in (width - 1, width + 3, 3 * width + 1):
            config = XLSTMConfig(9, width, 1, heads=1, blocks="slstm", feed_forward_width=inner)
            assert FeedForwardConfig(**feed_forward(config), embedding_dim=width)._proj_up_dim == inner
            assert int(_share(inner, width, 0.5) * width) == inner
    with pytest.raises(InputError, match="inner width 96"):
        expansion_of(96, 48, 2.0)

import json
from dataclasses import replace

import pytest
import torch
from processive.backbones import TransformerConfig, XLSTMConfig, build, config_from_dict, config_to_dict
from processive.errors import ConfigError

PUBLISHED = {  # with an untied linear head without bias
    "chem-xlstm": (XLSTMConfig(37, 512, 9, heads=8), 14_816_400),
    "chem-xlstm-small": (XLSTMConfig(37, 256, 4, heads=1), 1_644_296),
    "dna-mlstm": (XLSTMConfig(16, 128, 4, heads=4), 442_016),
    "dna-mlstm-bias": (XLSTMConfig(16, 128, 4, heads=4, bias=True), 447_648),
    "dna-mlstm-256": (XLSTMConfig(16, 256, 4, heads=4), 1_670_432),
    "dna-slstm": (XLSTMConfig(16, 128, 4, heads=4, blocks="slstm", feed_forward_width=136), 350_336),
    "dna-slstm-6": (XLSTMConfig(16, 128, 6, heads=4, blocks="slstm", feed_forward_width=136), 523_392),
    "dna-slstm-256": (XLSTMConfig(16, 256, 4, heads=4, blocks="slstm", feed_forward_width=280), 1_405_184),
    "prot-xlstm": (XLSTMConfig(38, 1024, 16, heads=4), 102_167_680),
    "prot-xlstm-small": (XLSTMConfig(38, 512, 16, heads=4), 25_918_080),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config, expected = PUBLISHED[name]
    with torch.device("meta"):
        network = build(config)
    head = config.vocabulary_size * config.width
    assert sum(parameter.numel() for parameter in network.parameters()) + head == expected


def test_xlstm_7b_has_its_published_size():
    with torch.device("meta"):
        network = build(XLSTMConfig(50304, 4096, 32, heads=8, blocks="mlstm-7b"))
    assert 6.8e9 < sum(parameter.numel() for parameter in network.parameters()) + 50304 * 4096 < 7.0e9


@pytest.mark.parametrize(
    "config",
    [
        XLSTMConfig(9, 32, 3, heads=2, blocks=("slstm", "mlstm", "slstm"), direction="alternating", norm_eps=1e-6),
        XLSTMConfig(9, 32, 3, heads=2, blocks="mlstm-7b", gate_cap=None),
        TransformerConfig(9, 32, 3, heads=4, key_value_heads=2, window=5, positions="none"),
        TransformerConfig(9, 32, 3, heads=3, head_width=7, positions="absolute", max_positions=4, qk_norm="head"),
    ],
    ids=["xlstm", "7b", "transformer", "transformer-absolute"],
)
def test_json_round_trip(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_integers_do_for_real_numbers():
    config = config_from_dict({"family": "xlstm", "vocabulary_size": 9, "width": 32, "depth": 1, "expansion": 3})
    assert config.inner_width(0) == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widht": 3}, "'widht'"),
        ({"family": "mamba"}, "'mamba'"),
        ({"width": "32"}, "width is '32'"),
        ({"width": True}, "width is True"),
        ({"blocks": [0.5, 0.5]}, "blocks"),
        ({"blocks": 1}, "blocks is 1"),
        ({"depth": 0}, "depth is 0"),
        ({"blocks": "nips"}, "nips"),
        ({"direction": "both"}, "both"),
        ({"heads": 5}, "not divisible by 5"),
        ({"projection_block": 5}, "not divisible by 5"),
        ({"blocks": ["slstm"]}, "blocks has 1 entries; there are 2"),
        ({"blocks": ["mlstm", "slstm"], "heads": 64}, "width 32 is not divisible by 64"),
        ({"blocks": "mlstm-7b", "qk_factor": 0.3}, "width of q and k 9"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_bad_xlstm_configuration_says_what_is_wrong(change, words):
    good = {"family": "xlstm", "vocabulary_size": 9, "width": 32, "depth": 2, "heads": 4}
    config_from_dict(good)
    with pytest.raises(ConfigError, match=words):
        config_from_dict(good | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "not divisible by 3"),
        ({"key_value_heads": 3}, "3 key_value_heads"),
        ({"heads": 32}, "a head has 1"),
        ({"window": 0}, "window is 0"),
        ({"token_dropout": 3}, "token_dropout"),
        ({"norm": "batch"}, "batch"),
        ({"activation": "tanh"}, "tanh"),
        ({"direction": "alternating"}, "alternating"),
        ({"vocabulary_size": 0}, "vocabulary_size is 0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"head_width": 0}, "head_width is 0"),
        ({"head_width": 7}, "a head has 7"),
        ({"head_width": 6, "positions": "rotary-2d"}, "each half of a head; a head has 6"),
        ({"norm_placement": "sandwich"}, "pre, post, deep"),
        ({"qk_norm": "rms"}, "qk_norm is 'rms'; it can be None, width, head"),
        ({"positions": "alibi"}, "alibi"),
        ({"rotary_base": 0}, "rotary_base is 0"),
        ({"rotary_base": None}, "rotary_base is None"),
        ({"skip_scale": -1.0}, "skip_scale is -1.0"),
        ({"residual_scale": 0.0}, "residual_scale is 0.0"),
        ({"max_positions": 5}, "positions='absolute'"),
        ({"position_offset": 2}, "positions='absolute'"),
        ({"positions": "absolute"}, "max_positions"),
        ({"positions": "absolute", "max_positions": 2, "position_offset": 2}, "position_offset 2"),
        ({"positions": "absolute", "max_positions": 2, "position_offset": -1}, "position_offset is -1"),
        ({"token_types": -1}, "token_types is -1"),
        ({"cross_width": 0}, "cross_width is 0"),
        ({"token_dropout": 3, "direction": "prefix"}, "token_dropout"),
        ({"complement": list(range(9)), "direction": "prefix"}, "complement"),
    ],
)
def test_a_bad_transformer_configuration_says_what_is_wrong(change, words):
    good = {"family": "transformer", "vocabulary_size": 9, "width": 32, "depth": 2, "heads": 4}
    config_from_dict(good)
    with pytest.raises(ConfigError, match=words):
        config_from_dict(good | change)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="needs width, depth"):
        config_from_dict({"family": "xlstm", "vocabulary_size": 9})


def test_derived_widths_follow_a_changed_width():
    wide = replace(XLSTMConfig(9, 128, 1, blocks="slstm"), width=256)
    assert (wide.inner_width(0), wide.gelu_width, wide.swiglu_width) == (512, 384, 704)


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    mixed = build(XLSTMConfig(9, 64, 3, heads=4, blocks=("mlstm", "mlstm", "slstm")))
    mlstm, slstm = mixed.blocks[0], mixed.blocks[2]
    assert not mlstm.gates.weight.any()
    torch.testing.assert_close(mlstm.gates.bias[4:], torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert 0 < mlstm.gates.bias[:4].abs().max() < 0.5
    assert torch.equal(mlstm.skip, torch.ones(128))
    assert not slstm.recurrent.any()
    x = torch.arange(16) / 15
    torch.testing.assert_close(slstm.bias[1, 3], 5 - 12 * x**1.6)
    assert not slstm.bias[[0, 2, 3]].any()
    capped = build(XLSTMConfig(9, 64, 1, heads=2, blocks="mlstm-7b")).blocks[0]
    assert capped.gates.bias.tolist() == [-10.0, -10.0, 3.0, 6.0]


def test_heads_of_one_channel_start_finite():
    network = build(XLSTMConfig(9, 4, 1, heads=4, blocks="slstm"))
    assert all(parameter.isfinite().all() for parameter in network.parameters())

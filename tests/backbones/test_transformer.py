"""The transformer against a dense one of float64 that reads one sequence, written from the formulas; and its errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from processive.backbones import Memory, TransformerConfig, XLSTMConfig, build
from processive.errors import ConfigError, InputError, ShapeError
from processive.kernels import available_backends, native
from processive.sequences import PackedBatch

NAMES = [
    "decoder", "decoder-window", "decoder-window-1", "decoder-plain", "decoder-wide-heads", "decoder-qk-norm",
    "decoder-glm", "decoder-bert", "decoder-cross", "prefix", "prefix-window", "prefix-glm", "encoder",
    "encoder-window", "encoder-glm", "encoder-bert", "encoder-absolute", "encoder-scaled", "encoder-esmc",
]  # fmt: skip
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu}


def mask(config, tokens, prefix):
    """Which tokens (columns) each token (row) sees."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            near = config.window is None or abs(i - j) < config.window
            seen[i, j] = (near and (j <= i or config.direction == "bidirectional")) or (i < prefix and j < prefix)
    return seen


def turned(x, positions, base, interleaved, precision):
    """Rotary positions as products of complex numbers; x [tokens, heads, dim]."""
    dim = x.shape[-1]
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if precision is not None:  # they are computed in float32, as published code does
        computed = 1 / base ** (torch.arange(0, dim, 2).float() / dim)
        frequencies = computed.to(getattr(torch, precision)).double()
    angles = positions[:, None].double() * frequencies
    z = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)[:, None]
    out = torch.view_as_real(z)
    return (out if interleaved else out.transpose(-1, -2)).flatten(-2)


def dense(config, w, tokens, prefix=0, memory=None, embedded=None):
    """Hidden states [tokens, width] of one sequence: embeddings, every block, the last one after the final norm."""
    c, n = config, len(tokens)

    def norm(x, name):
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias", 0.0)
        if c.norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight + bias

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def attend(q, k, v, seen):
        k, v = (part.repeat_interleave(c.heads // c.kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / c.head_dim**0.5
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", shares, v).flatten(1)

    def positions():
        first = torch.tensor([min(i, max(prefix - 1, 0)) for i in range(n)])
        if c.direction == "bidirectional":
            first = torch.arange(n)
        return first, torch.arange(n) - first

    def rotated(x):
        if c.positions in ("absolute", "none"):
            return x
        if c.positions != "rotary-2d":
            interleaved = c.positions == "rotary-interleaved"
            return turned(x, torch.arange(n), c.rotary_base, interleaved, c.rotary_precision)
        halves = zip(x.chunk(2, -1), positions(), strict=True)
        return torch.cat([turned(half, at, c.rotary_base, False, c.rotary_precision) for half, at in halves], -1)

    def self_attention(x, at):
        q, k, v = (
            linear(x, f"{at}.query_key_value")
            .unflatten(1, (-1, c.head_dim))
            .split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        )
        if c.qk_norm == "head":
            q, k = norm(q, f"{at}.query_norm"), norm(k, f"{at}.key_norm")
        elif c.qk_norm == "width":
            q = norm(q.flatten(1), f"{at}.query_norm").view_as(q)
            k = norm(k.flatten(1), f"{at}.key_norm").view_as(k)
        return linear(attend(rotated(q), rotated(k), v, mask(c, n, prefix)), f"{at}.out")

    def cross_attention(x, at):
        q = linear(x, f"{at}.cross_query").unflatten(1, (-1, c.head_dim))
        k, v = linear(memory, f"{at}.cross_key_value").unflatten(1, (-1, c.head_dim)).chunk(2, dim=1)
        return linear(attend(q, k, v, torch.ones(n, len(memory), dtype=torch.bool)), f"{at}.cross_out")

    def feed_forward(x, at):
        up = linear(x, f"{at}.feed_forward.up")
        if c.activation in ("swiglu", "geglu"):
            gate, up = up.chunk(2, -1)
            return linear(ACTIVATIONS[c.activation](gate) * up, f"{at}.feed_forward.down")
        return linear(ACTIVATIONS[c.activation](up), f"{at}.feed_forward.down")

    def half(x, part, at, name):
        a, s = c.residual_scale, c.skip_scale
        if c.norm_placement == "pre":
            return s * x + a * part(norm(x, f"{at}.{name}"), at)
        if c.norm_placement == "post":
            return norm(s * x + a * part(x, at), f"{at}.{name}")
        normed = norm(x, f"{at}.{name}")
        return s * normed + a * part(normed, at)

    x = w["embedding.weight"][tokens] if embedded is None else embedded
    if c.token_dropout is not None:
        masked = tokens == c.token_dropout
        x = torch.where(masked[:, None], 0.0, x) * 0.88 / (1 - masked.double().mean())
    if c.positions == "absolute":
        x = x + w["positions.weight"][torch.arange(n) + c.position_offset]
    if c.token_types:
        x = x + w["token_types.weight"][0]
    if c.embedding_norm:
        x = norm(x, "embedding_norm")
    layers = [x]
    for i in range(c.depth):
        x = half(x, self_attention, f"blocks.{i}", "norm")
        if memory is not None:
            x = half(x, cross_attention, f"blocks.{i}", "cross_norm")
        x = half(x, feed_forward, f"blocks.{i}", "feed_forward_norm")
        layers.append(x)
    if c.post_blocks_norm:
        layers[-1] = norm(x, "norm")
    return layers


def arguments(inputs, row):
    prefix = 0 if inputs.prefix is None else int(inputs.prefix[row])
    return inputs.tokens[row], prefix, None if inputs.memories is None else inputs.memories[row].double()


def test_every_transformer_of_the_table_is_here(cases):
    assert sorted(NAMES) == sorted(
        name for name, case in cases.items() if case.config.family == "transformer" and not case.config.complement
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_equals_the_dense_reference(name, dtype, tolerance, cases):
    case, lengths = cases[name], [1, 9, 31, 4]
    network, inputs = case.fresh().to(dtype), case.inputs(lengths, seed=5)
    weights = {key: tensor.double() for key, tensor in case.network.state_dict().items()}
    with torch.no_grad():
        layers = network.hidden_layers(inputs.batch(), memory=inputs.memory(dtype))
        for row in range(len(lengths)):
            want = dense(case.config, weights, *arguments(inputs, row))
            assert len(layers) == len(want)
            for layer, expected in zip(layers, want, strict=True):
                assert (layer.split(lengths)[row] - expected).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("name", "prefix"),
    [(n, p) for n in NAMES if not n.startswith("encoder") for p in ((0, 1, 4, 8) if n.startswith("prefix") else (0,))],
)
def test_gradients_equal_the_dense_references_and_are_zero_where_its_mask_is(name, prefix, cases):
    """The gradient of each output by each embedding, in float64 and in float32."""
    case = cases[name]
    inputs = replace(case.inputs([8], seed=3), prefix=torch.tensor([prefix]))
    weights = {key: tensor.double() for key, tensor in case.network.state_dict().items()}
    tokens, _, memory = arguments(inputs, 0)
    embedded = weights["embedding.weight"][tokens].requires_grad_()
    want = jacobian(dense(case.config, weights, tokens, prefix, memory, embedded)[-1], embedded)
    steps = torch.linalg.matrix_power(mask(case.config, 8, prefix).double(), case.config.depth) > 0
    assert torch.equal((want != 0).any(-1), steps)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        network, kept = case.fresh().to(dtype), []
        network.embedding.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        got = jacobian(inputs.run(network)[0], kept[0])
        assert (got - want).abs().max() <= tolerance * want.abs().max()
        assert torch.equal((got != 0).any(-1), steps)


def jacobian(hidden, embedded):
    """Gradient of the weighted sum of each output's channels by each embedding [tokens, tokens, width]."""
    weights = torch.linspace(-1, 2, hidden.shape[1], dtype=hidden.dtype)
    rows = [torch.autograd.grad((row * weights).sum(), embedded, retain_graph=True)[0] for row in hidden]
    return torch.stack(rows)


def test_two_positions_add_up_and_take_turns(cases):
    from processive.backbones.transformer import two_positions

    batch = PackedBatch.from_lengths(torch.zeros(9, dtype=torch.int64), torch.tensor([5, 4]))
    first, second = two_positions(batch, torch.tensor([3, 0]), bidirectional=False)
    assert first.tolist() == [0, 1, 2, 2, 2, 0, 0, 0, 0]
    assert second.tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 3]
    # a mask at 1, one more token, <sop> and a token; and a mask alone, <sop> and two tokens
    given = replace(
        batch,
        positions=torch.tensor([0, 1, 2, 2, 3, 0, 1, 2, 3]),
        block_positions=torch.tensor([0, 0, 0, 1, 2, 0, 1, 2, 3]),
    )
    first, second = two_positions(given, torch.tensor([3, 1]), bidirectional=False)
    assert first.tolist() == [0, 1, 2, 1, 1, 0, 0, 0, 0]
    assert second.tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 3]


def test_a_prefix_as_long_as_the_sequence_is_an_encoder(cases):
    prefix, lengths = cases["prefix"], torch.tensor([7, 1, 12])
    encoder = build(replace(prefix.config, direction="bidirectional"))
    encoder.load_state_dict(prefix.network.state_dict())
    decoder = build(replace(prefix.config, direction="causal"))
    decoder.load_state_dict(prefix.network.state_dict())
    inputs = prefix.inputs(lengths.tolist())
    for other, lead in ((encoder, lengths), (decoder, torch.zeros(3, dtype=torch.int64))):
        hidden = replace(inputs, prefix=lead).run(prefix.network)[0]
        assert (hidden - other(inputs.batch())[0]).abs().max() < 1e-5


def test_a_prefix_that_is_not_read_at_once_is_refused(cases):
    case = cases["prefix"]
    inputs = replace(case.inputs([6, 5, 3]), prefix=torch.tensor([2, 4, 0]))
    with pytest.raises(InputError, match=r"Sequence 1 has a prefix of 4 tokens, and its first piece only 3"):
        inputs.run(case.network, end=torch.tensor([2, 3, 0]), return_state=True)
    _, state = inputs.run(case.network, end=torch.tensor([2, 4, 0]), return_state=True)
    end = torch.tensor([3, 4, 2])
    wrong = replace(inputs, prefix=torch.tensor([3, 4, 0]))
    with pytest.raises(InputError, match="Sequence 0 has a prefix of 3"):
        wrong.run(case.network, state, begin=state.lengths, end=end)
    wrong = replace(inputs, prefix=torch.tensor([2, 4, 3]))
    with pytest.raises(InputError, match="Sequence 2 has a prefix of 3"):
        wrong.run(case.network, state, begin=state.lengths, end=end)


def test_a_prefix_must_be_told_while_it_matters(cases):
    inputs = cases["prefix"].inputs([6, 5])
    untold, ones = replace(inputs, prefix=None), torch.ones(2, dtype=torch.int64)
    for name in ("prefix", "prefix-glm"):
        network = cases[name].network
        with pytest.raises(InputError, match="conditions="):
            untold.run(network)
        _, state = inputs.run(network, end=5 * ones, return_state=True)
        options = {"begin": 5 * ones, "end": torch.tensor([6, 5])}
        if name == "prefix-glm":
            with pytest.raises(InputError, match="conditions="):
                untold.run(network, state, **options)
        else:
            told = inputs.run(network, state, **options)[0]
            assert torch.equal(untold.run(network, state, **options)[0], told)
    with pytest.raises(ShapeError, match="prefix"):
        replace(inputs, prefix=torch.tensor([1])).run(cases["prefix"].network)


def test_a_sequence_longer_than_the_table_of_positions_is_refused(cases):
    for name, most in (("encoder-absolute", 88), ("decoder-bert", 97)):
        case = cases[name]
        inputs = case.inputs([3, most])
        inputs.run(case.network)
        inputs = case.inputs([3, most + 1])
        with pytest.raises(InputError, match=rf"position {most}; with max_positions = \d+ the last one is {most - 1}"):
            inputs.run(case.network)
        if case.config.streams:
            _, state = inputs.run(case.network, end=torch.tensor([3, most]), return_state=True)
            with pytest.raises(InputError, match="max_positions"):
                inputs.run(case.network, state, begin=state.lengths, end=inputs.lengths)


def test_a_memory_must_fit(cases):
    case = cases["decoder-cross"]
    inputs = case.inputs([4, 2])
    batch, memory = inputs.batch(), inputs.memory()
    without = case.network(batch)[0]
    assert (without - case.network(batch, memory=memory)[0]).abs().max() > 1e-2
    plain = build(replace(case.config, cross_width=None))
    plain.load_state_dict({k: v for k, v in case.network.state_dict().items() if ".cross_" not in k})
    assert torch.equal(plain(batch)[0], without)
    with pytest.raises(ShapeError, match="2 sequences"):
        case.network(batch, memory=Memory(memory.hidden, torch.tensor([0, len(memory.hidden)])))
    with pytest.raises(ShapeError, match=r"\[tokens, 7\]"):
        case.network(batch, memory=Memory(memory.hidden[:, :5], memory.cu_seqlens))
    with pytest.raises(ShapeError, match="keys for at least"):
        case.network(batch, memory=Memory(memory.hidden, torch.tensor([0, 0, len(memory.hidden)])))
    with pytest.raises(ConfigError, match="cross_width"):
        plain(batch, memory=memory)
    with pytest.raises(ConfigError, match="'xlstm'"):
        build(XLSTMConfig(19, 16, 1))(batch, memory=memory)


def test_what_the_defaults_are():
    """A decoder as Llama: names and shapes of its parameters."""
    with torch.device("meta"):
        network = build(TransformerConfig(19, 48, 1, heads=4, key_value_heads=2, head_width=10))
    assert {name: tuple(parameter.shape) for name, parameter in network.named_parameters()} == {
        "embedding.weight": (19, 48),
        "blocks.0.norm.weight": (48,),
        "blocks.0.query_key_value.weight": (80, 48),
        "blocks.0.out.weight": (48, 40),
        "blocks.0.feed_forward_norm.weight": (48,),
        "blocks.0.feed_forward.up.weight": (256, 48),
        "blocks.0.feed_forward.down.weight": (48, 128),
        "norm.weight": (48,),
    }


def test_autocast_gives_the_same_with_gradients_and_without(rng):
    """Training reads ahead, and validates, without gradients; inference alone may round attention to bfloat16."""
    torch.manual_seed(0)
    model = build(TransformerConfig(12, 32, 2, heads=2)).eval()
    batch = PackedBatch.from_sequences([rng.integers(0, 12, 70), rng.integers(0, 12, 9)])
    with torch.autocast("cpu", torch.bfloat16):
        recorded = model(batch)[0]
        with torch.no_grad():
            assert torch.equal(model(batch)[0], recorded)
        with torch.inference_mode():
            inferred = model(batch)[0]
    torch.testing.assert_close(inferred, recorded, rtol=0.05, atol=0.05)
    assert torch.equal(inferred, recorded) != (native.has_bfloat16() and "native" in available_backends("attention"))

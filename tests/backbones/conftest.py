"""The table of configurations that every property is checked for, with what a network of each is fed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from processive.backbones import AnyConfig, Backbone, Memory, TransformerConfig, XLSTMConfig, build
from processive.sequences import PackedBatch
from torch import Tensor

V = 19
MIXED = ("mlstm", "slstm", "mlstm")
BERT = {
    "norm": "layer", "norm_placement": "post", "activation": "gelu", "bias": True, "positions": "absolute",
    "max_positions": 100, "embedding_norm": True, "token_types": 2, "post_blocks_norm": False,
}  # fmt: skip
GLM = {"norm": "layer", "norm_placement": "deep", "skip_scale": 2.0, "activation": "geglu", "bias": True}

XLSTMS = {
    "mlstm": XLSTMConfig(V, 32, 2, heads=2),
    "mlstm-bias-odd": XLSTMConfig(V, 20, 2, heads=1, bias=True, convolution=3, post_blocks_norm=False),
    "slstm": XLSTMConfig(V, 24, 2, heads=4, blocks="slstm"),
    "mixed": XLSTMConfig(V, 32, 3, heads=4, blocks=MIXED),
    "7b": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b"),
    "7b-mixed": XLSTMConfig(V, 24, 2, heads=2, blocks=("mlstm-7b", "slstm"), gate_cap=None),
    "mlstm-rotary-width": XLSTMConfig(V, 24, 2, heads=4, rotary="width", norm_offset=True),
    "mlstm-rotary-head": XLSTMConfig(V, 32, 2, heads=2, rotary="head", rotary_base=100.0, bias=True),
    "layer-wise": XLSTMConfig(
        V, 24, 3, heads=2, blocks=("mlstm-7b", "mlstm", "slstm"), expansion=(1, 4.5, 1), norm_offset=True
    ),
    "sinusoidal": XLSTMConfig(V, 24, 2, heads=2, blocks="slstm", positions="sinusoidal"),
    "alternating-first": XLSTMConfig(V, 32, 3, heads=2, blocks=MIXED, direction="alternating-first"),
    "sinusoidal-tied": XLSTMConfig(V, 24, 2, heads=2, direction="tied", positions="sinusoidal"),
    "mlstm-alternating": XLSTMConfig(V, 32, 3, heads=2, direction="alternating"),
    "mlstm-bidirectional": XLSTMConfig(V, 32, 2, heads=2, direction="bidirectional"),
    "mixed-alternating": XLSTMConfig(V, 32, 3, heads=2, blocks=MIXED, direction="alternating"),
    "mixed-bidirectional": XLSTMConfig(V, 32, 3, heads=2, blocks=MIXED, direction="bidirectional"),
    "7b-alternating": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b", direction="alternating"),
    "7b-bidirectional": XLSTMConfig(V, 32, 2, heads=2, blocks="mlstm-7b", direction="bidirectional"),
    "mixed-tied": XLSTMConfig(
        V, 24, 3, heads=2, blocks=("mlstm", "slstm", "mlstm-7b"), direction="tied", rotary="head", bias=True
    ),
    "rotary-width-tied": XLSTMConfig(V, 24, 2, heads=2, direction="tied", rotary="width"),
    "rotary-width-alternating": XLSTMConfig(V, 24, 2, heads=2, direction="alternating", rotary="width"),
}
TRANSFORMERS = {
    "decoder": TransformerConfig(V, 32, 2, heads=4, key_value_heads=2),
    "decoder-window": TransformerConfig(V, 32, 2, heads=2, window=3),
    "decoder-window-1": TransformerConfig(V, 32, 1, heads=2, window=1),
    "decoder-plain": TransformerConfig(V, 24, 2, heads=3, norm="layer", activation="gelu", bias=True, positions="none"),
    "decoder-wide-heads": TransformerConfig(
        V, 24, 2, heads=4, key_value_heads=1, head_width=10, positions="rotary-interleaved", attention_bias=True
    ),
    "decoder-qk-norm": TransformerConfig(
        V,
        24,
        2,
        heads=4,
        key_value_heads=2,
        qk_norm="head",
        activation="geglu",
        feed_forward_width=33,
        window=5,
        feed_forward_bias=True,
        rotary_base=100.0,
        rotary_precision="float32",
    ),
    "decoder-glm": TransformerConfig(V, 24, 2, heads=3, head_width=12, positions="rotary-2d", **GLM),
    "decoder-bert": TransformerConfig(V, 24, 2, heads=4, position_offset=3, cross_width=10, **BERT),
    "decoder-cross": TransformerConfig(V, 24, 2, heads=4, key_value_heads=2, activation="relu", cross_width=7),
    "prefix": TransformerConfig(V, 32, 2, heads=4, key_value_heads=2, direction="prefix"),
    "prefix-window": TransformerConfig(V, 32, 2, heads=2, direction="prefix", window=3, norm="layer", norm_bias=True),
    "prefix-glm": TransformerConfig(V, 24, 2, heads=2, direction="prefix", positions="rotary-2d", **GLM),
    "encoder-esmc": TransformerConfig(
        V,
        24,
        2,
        heads=2,
        direction="bidirectional",
        norm="layer",
        norm_bias=True,
        qk_norm="width",
        post_blocks_norm_bias=False,
        residual_scale=3.0,
        rotary_precision="float16",
    ),
    "encoder": TransformerConfig(
        V, 32, 2, heads=2, direction="bidirectional", norm="layer", activation="gelu", bias=True, token_dropout=3
    ),
    "encoder-window": TransformerConfig(V, 32, 2, heads=2, direction="bidirectional", window=4, activation="geglu"),
    "encoder-glm": TransformerConfig(V, 24, 2, heads=3, direction="bidirectional", positions="rotary-2d", **GLM),
    "encoder-bert": TransformerConfig(V, 24, 2, heads=4, direction="bidirectional", cross_width=10, **BERT),
    "encoder-absolute": TransformerConfig(
        V,
        24,
        2,
        heads=2,
        direction="bidirectional",
        norm="layer",
        activation="gelu",
        bias=True,
        token_dropout=3,
        positions="absolute",
        max_positions=90,
        position_offset=2,
        embedding_norm=True,
    ),
    "encoder-scaled": TransformerConfig(
        V,
        24,
        3,
        heads=4,
        direction="bidirectional",
        norm="layer",
        norm_bias=True,
        qk_norm="width",
        residual_scale=3.5,
        rotary_precision="bfloat16",
    ),
}
COMPLEMENT = (0, 1, 2, 3, 4, *range(10, 15), *range(5, 10), 16, 15, 17, 18)
STRANDS = {
    f"{name}-strands": replace((XLSTMS | TRANSFORMERS)[name], complement=COMPLEMENT)
    for name in ("mixed", "7b", "decoder", "mixed-bidirectional", "mixed-tied", "rotary-width-alternating", "encoder")
}
TABLE: dict[str, AnyConfig] = XLSTMS | TRANSFORMERS | STRANDS


def lively(config: AnyConfig, seed: int = 0) -> Backbone:
    """A network with no parameter at a value that hides a mistake (zero gates, unit norms, zero recurrence)."""
    torch.manual_seed(seed)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


@dataclass(frozen=True)
class Inputs:
    """Sequences, with what a network may need beside them: how many tokens are a prefix, and a memory, of each."""

    tokens: list[Tensor]
    prefix: Tensor | None = None
    memories: list[Tensor] | None = None

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.tokens], dtype=torch.int64)

    def select(self, rows: list[int]) -> Inputs:
        return Inputs(
            [self.tokens[row] for row in rows],
            None if self.prefix is None else self.prefix[rows],
            None if self.memories is None else [self.memories[row] for row in rows],
        )

    def batch(self, begin: Tensor | None = None, end: Tensor | None = None) -> PackedBatch:
        """The tokens from ``begin`` to ``end`` of each sequence; without them, all."""
        begin = torch.zeros_like(self.lengths) if begin is None else begin
        end = self.lengths if end is None else end
        parts = [row[a:b] for row, a, b in zip(self.tokens, begin, end, strict=True)]
        tokens = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        batch = PackedBatch.from_lengths(tokens, end - begin, offsets=begin)
        return batch if self.prefix is None else replace(batch, conditions={"prefix": self.prefix})

    def memory(self, dtype: torch.dtype = torch.float32) -> Memory | None:
        if self.memories is None:
            return None
        edges = torch.tensor([0, *(len(row) for row in self.memories)]).cumsum(0)
        return Memory(torch.cat(self.memories).to(dtype), edges)

    def run(self, network: Backbone, state=None, *, begin=None, end=None, **options):
        """What the network gives for the tokens from ``begin`` to ``end`` of each sequence."""
        memory = self.memory(network.embedding.weight.dtype)
        return network(self.batch(begin, end), state, memory=memory, **options)


@dataclass(frozen=True)
class Case:
    """A named configuration of the table."""

    name: str
    config: AnyConfig

    @cached_property
    def network(self) -> Backbone:
        """A network of it, not to be changed."""
        return lively(self.config)

    def fresh(self) -> Backbone:
        """The same network once more, to do anything with."""
        return lively(self.config)

    def inputs(self, lengths: list[int], seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(V, (sum(lengths),), generator=generator).split(lengths)
        prefix = memories = None
        if self.config.family == "transformer" and self.config.direction == "prefix":
            prefix = (torch.rand(len(lengths), generator=generator) * (torch.tensor(lengths) + 1)).long()
        if self.config.family == "transformer" and self.config.cross_width is not None:
            sizes = torch.randint(1, 9, (len(lengths),), generator=generator).tolist()
            memories = [torch.randn(n, self.config.cross_width, generator=generator) for n in sizes]
        return Inputs(list(tokens), prefix, memories)

    def reach(self, tokens: int, prefix: int = 0) -> Tensor:
        """Which of the tokens (columns) each output (row) of one sequence depends on."""
        if not self.config.streams and (self.config.family == "xlstm" or self.config.complement is not None):
            return torch.ones(tokens, tokens, dtype=torch.bool)
        if self.config.family == "xlstm":
            return torch.ones(tokens, tokens, dtype=torch.bool).tril()
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = torch.ones(tokens, tokens, dtype=torch.bool) if self.config.direction == "bidirectional" else j <= i
        if self.config.window is not None:
            seen = seen & ((i - j).abs() < self.config.window)
        seen = (seen | ((i < prefix) & (j < prefix))).double()
        reached = torch.linalg.matrix_power(seen, self.config.depth) > 0
        return reached if self.config.token_dropout is None else torch.ones_like(reached)


CASES = {name: Case(name, config) for name, config in TABLE.items()}
STREAMING = [name for name, config in TABLE.items() if config.streams]


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """The whole table."""
    return CASES


@pytest.fixture(scope="session", params=TABLE)
def case(request: pytest.FixtureRequest) -> Case:
    """Each configuration of the table."""
    return CASES[request.param]


@pytest.fixture(scope="session", params=STREAMING)
def streaming(request: pytest.FixtureRequest) -> Case:
    """Each configuration that can read a sequence piece by piece."""
    return CASES[request.param]


@pytest.fixture(scope="session", params=[name for name in TABLE if name not in STREAMING])
def whole(request: pytest.FixtureRequest) -> Case:
    """Each configuration that needs a sequence at once."""
    return CASES[request.param]

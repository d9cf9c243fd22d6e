"""Graphs to vectors: message passing, then pooling.

    h_0 = embedding of the node's features
    h_l = h_{l-1} + dropout(conv_l(norm_l(h_{l-1}), edges))
    g   = pool(norm(h_depth))

Normalisation is over the features of one node, so a graph gets the same numbers alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..errors import ConfigError, InputError, ShapeError, needs

with needs("graphs"):
    from torch_geometric.data import Data
    from torch_geometric.nn import GINConv, GINEConv, TransformerConv
    from torch_geometric.nn.aggr import AttentionalAggregation, MeanAggregation, SumAggregation


@dataclass(frozen=True)
class GraphEncoderConfig:
    """A message-passing encoder, in plain values.

    Attributes:
        kind: "gin" (Xu et al. 2019; no edge features), "gine" (Hu et al. 2020; edge features are added to messages)
            or "attention" (Shi et al. 2021; edge features, when there are some, are added to keys and values).
        node_categories: number of values of each integer node column; empty when nodes carry real numbers.
        node_features: number of real node features; 0 when nodes carry categories.
        edge_categories: number of values of each integer edge column.
        edge_features: number of real edge features.
        width: of every hidden layer and of both results.
        depth: rounds of message passing.
        heads: of the attention encoder.
        pooling: how nodes become the graph's vector.
        dropout: share of each round's update that is dropped in training.
    """

    kind: Literal["gin", "gine", "attention"] = "gine"
    node_categories: tuple[int, ...] = ()
    node_features: int = 0
    edge_categories: tuple[int, ...] = ()
    edge_features: int = 0
    width: int = 128
    depth: int = 4
    heads: int = 4
    pooling: Literal["sum", "mean", "attention"] = "sum"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.node_categories) == bool(self.node_features):
            raise ConfigError("A graph encoder takes either node_categories or node_features; give exactly one.")
        if self.edge_categories and self.edge_features:
            raise ConfigError("A graph encoder takes either edge_categories or edge_features, not both.")
        if self.kind not in ("gin", "gine", "attention"):
            raise ConfigError(f"kind is {self.kind!r}; graph encoders are 'gin', 'gine' and 'attention'.")
        if self.kind == "gin" and self.has_edges:
            raise ConfigError("The 'gin' encoder has no use for edge features; take 'gine' or leave them out.")
        if self.kind == "gine" and not self.has_edges:
            raise ConfigError("The 'gine' encoder needs edge_categories or edge_features; take 'gin' without them.")
        if self.kind == "attention" and self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads.")
        if self.pooling not in ("sum", "mean", "attention"):
            raise ConfigError(f"pooling is {self.pooling!r}; it can be 'sum', 'mean' or 'attention'.")

    @property
    def has_edges(self) -> bool:
        """Whether edges carry features."""
        return bool(self.edge_categories or self.edge_features)


class FeatureEmbedding(nn.Module):
    """Sum of one embedding per categorical column, or one linear map of real features."""

    def __init__(self, categories: tuple[int, ...], features: int, width: int, what: str) -> None:
        super().__init__()
        self.what, self.categories = what, categories
        self.columns = len(categories) or features
        self.map = nn.Embedding(sum(categories), width) if categories else nn.Linear(features, width)
        if categories:
            nn.init.normal_(self.map.weight, std=len(categories) ** -0.5)

    def forward(self, values: Shaped[Tensor, "items columns"]) -> Float[Tensor, "items width"]:
        """Embed ``values``: integer categories or real features, as the configuration says."""
        if values.shape[1] != self.columns:
            raise ShapeError(f"{self.what} features", tuple(values.shape), f"[{self.what}s, {self.columns}]")
        if not self.categories:
            return self.map(values.to(self.map.weight.dtype))  # type: ignore[no-any-return]
        if values.is_floating_point():
            raise InputError(f"The {self.what} features are real numbers; this encoder takes integer categories.")
        sizes = torch.tensor(self.categories, device=values.device)
        outside = (values < 0) | (values >= sizes)
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise InputError(
                f"{self.what} {row}, column {column} has category {int(values[row, column])}; "
                f"this encoder knows 0 to {self.categories[column] - 1}."
            )
        return self.map(values + sizes.cumsum(0) - sizes).sum(1)  # type: ignore[no-any-return]


def _convolution(config: GraphEncoderConfig) -> nn.Module:
    width = config.width
    convolution: nn.Module
    if config.kind == "attention":
        edge_dim = width if config.has_edges else None
        convolution = TransformerConv(width, width // config.heads, config.heads, edge_dim=edge_dim)
    else:
        update = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        convolution = (GINConv if config.kind == "gin" else GINEConv)(update, train_eps=True)
    return convolution


def _pooling(config: GraphEncoderConfig) -> nn.Module:
    pooling: nn.Module
    if config.pooling == "attention":
        pooling = AttentionalAggregation(nn.Linear(config.width, 1))
    else:
        pooling = SumAggregation() if config.pooling == "sum" else MeanAggregation()
    return pooling


class GraphEncoder(nn.Module):
    """Node and graph embeddings of a PyG ``Data`` or ``Batch``.

    >>> encoder = GraphEncoder(GraphEncoderConfig("gine", node_categories=(120, 8), edge_categories=(6,)))
    >>> nodes, graphs = encoder(Batch.from_data_list(molecules))
    """

    def __init__(self, config: GraphEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.node_embedding = FeatureEmbedding(config.node_categories, config.node_features, config.width, "node")
        self.edge_embedding = (
            FeatureEmbedding(config.edge_categories, config.edge_features, config.width, "edge")
            if config.has_edges
            else None
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.depth))
        self.convolutions = nn.ModuleList(_convolution(config) for _ in range(config.depth))
        self.last_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.pool = _pooling(config)

    def forward(self, data: Data) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "graphs width"]]:
        """Return the embedding of every node and of every graph.

        ``data.x`` is [nodes, columns], ``data.edge_index`` [2, edges] (each direction is an edge of its own) and
        ``data.edge_attr`` [edges, columns] where the configuration names edge features; ``data.batch`` [nodes] numbers
        the graph of each node and may be absent for one graph. A graph without nodes gets zeros; a node without
        edges only its own features.

        Raises:
            InputError: features are absent, or a category is outside the configuration.
            ShapeError: the number of feature columns is not the configuration's.
        """
        if data.x is None or data.edge_index is None:
            raise InputError("The graph has no x or no edge_index.")
        graph_of_node: Int[Tensor, " nodes"] | None = data.batch
        graphs = 1
        if graph_of_node is None:
            graph_of_node = torch.zeros(len(data.x), dtype=torch.int64, device=data.x.device)
        else:
            graphs = int(data.num_graphs)
        edges: tuple[Tensor, ...] = (data.edge_index,)
        if self.edge_embedding is not None:
            if data.edge_attr is None:
                raise InputError("The graph has no edge_attr; this encoder was configured with edge features.")
            edges = (data.edge_index, self.edge_embedding(data.edge_attr))
        hidden = self.node_embedding(data.x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            hidden = hidden + self.dropout(convolution(norm(hidden), *edges))
        hidden = self.last_norm(hidden)
        return hidden, self.pool(hidden, graph_of_node, dim_size=graphs)

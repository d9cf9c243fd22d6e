"""A small graph network beside a frozen language model, after GraphAdapter (Huang et al. 2024, arXiv 2402.12984).

Nodes carry sequences (a page's text, a cell's genes, a protein). The language model is run once and stays frozen;
what its neighbours say reaches a node's tokens through a narrow network:

    u_i = rms_norm(W2 silu(W1 x_i))                           x_i: one vector per node, narrow u_i
    g_i = mean over neighbours of u, ``hops`` times           silu(W z) between two hops
    f_k = W6 silu(W5 [W_g g_i ; W_h h_k])                     every token k of node i
    p_k = (softmax(head(h_k)) + softmax(head(W_out f_k))) / 2

The residual stands at the level of probabilities: the adapter can add what the neighbours know, and the language
model's own guess never weighs less than half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, InputError, ShapeError, needs

with needs("graphs"):
    from torch_geometric.nn.aggr import MeanAggregation
    from torch_geometric.utils import remove_self_loops

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphAdapterConfig:
    """An adapter, in plain values.

    Attributes:
        hidden_width: width of the language model's hidden states.
        width: of the adapter.
        hops: rounds of averaging over neighbours. With one, a node hears its neighbours and never itself; with two its
            own summary comes back by way of them, which flatters its next-token loss.
        expansion: inner width of the fusion / ``width``.
        dropout: on the fused vector, in training.
    """

    hidden_width: int
    width: int = 64
    hops: int = 1
    expansion: int = 5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.hidden_width, self.width, self.hops, self.expansion) < 1:
            raise ConfigError("hidden_width, width, hops and expansion of a graph adapter are at least 1.")


def node_vectors(
    hidden: Float[Tensor, "tokens hidden_width"], cu_seqlens: Int[Tensor, " boundaries"]
) -> Float[Tensor, "nodes hidden_width"]:
    """Return each node's last hidden state, the summary a causal model has of its sequence.

    Raises:
        InputError: a node has no token.
    """
    empty = (cu_seqlens.diff() == 0).nonzero().flatten()
    if len(empty):
        raise InputError(
            f"Node {int(empty[0])} has no token, so it has no vector ({len(empty)} such nodes).",
            hint="Give each node at least an end token, or hand its vector over as node_vectors.",
        )
    return hidden[cu_seqlens[1:] - 1]


def token_weights(targets: Int[Tensor, " tokens"], cu_seqlens: Int[Tensor, " boundaries"]) -> Float[Tensor, " tokens"]:
    """Weight each token by 1 / (times it occurs in its node), scaled so that every node weighs 1.

    Repeated words then count once, and long sequences no more than short ones.
    """
    nodes = len(cu_seqlens) - 1
    node = torch.repeat_interleave(torch.arange(nodes, device=targets.device), cu_seqlens.diff())
    _, kind = torch.unique(torch.stack([node, targets]), dim=1, return_inverse=True)
    weights = 1.0 / torch.bincount(kind)[kind].float()
    total = torch.zeros(nodes, device=targets.device).index_add_(0, node, weights)
    return weights / total[node]


def next_token_loss(
    log_probabilities: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Return the weighted mean over tokens of the label-smoothed Kullback-Leibler divergence, in nats.

    The smoothed target is ``1 - smoothing`` on the next token and the rest spread evenly over the whole vocabulary.
    """
    vocabulary = log_probabilities.shape[1]
    low = smoothing / vocabulary
    high = 1 - smoothing + low
    entropy = high * math.log(high) + (vocabulary - 1) * (low * math.log(low) if low else 0.0)
    at_target = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    divergence = entropy - (high - low) * at_target - low * log_probabilities.sum(1)
    return (divergence * weights).sum() / weights.sum()


class GraphAdapter(nn.Module):
    """The trainable part: neighbours' vectors, fused into each token's hidden state. The language model stays outside.

    >>> adapter = GraphAdapter(GraphAdapterConfig(hidden_width=model.width))
    >>> log_p = adapter(hidden, batch.cu_seqlens, edge_index, model.logits)
    >>> next_token_loss(log_p, targets, token_weights(targets, batch.cu_seqlens)).backward()
    """

    def __init__(self, config: GraphAdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.narrow = nn.Sequential(
            nn.Linear(config.hidden_width, 2 * width, bias=False),
            nn.SiLU(),
            nn.Linear(2 * width, width, bias=False),
            nn.RMSNorm(width),
        )
        self.between = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(config.hops - 1))
        self.from_graph = nn.Linear(width, width, bias=False)
        self.from_token = nn.Linear(config.hidden_width, width, bias=False)
        self.fusion = nn.Sequential(
            nn.Linear(2 * width, config.expansion * width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.expansion * width, width),
        )
        self.widen = nn.Linear(width, config.hidden_width, bias=False)
        self.mean = MeanAggregation()

    def neighbourhood(
        self, vectors: Float[Tensor, "nodes hidden_width"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes width"]:
        """Return what each node's neighbours say: the mean over the sources of its incoming edges; zeros without any.

        Self loops are left out: a node's own summary knows the tokens that its loss asks for.
        """
        source, target = remove_self_loops(edge_index)[0]
        z = self.narrow(vectors)
        for hop in range(self.config.hops):
            z = self.mean(z[source], target, dim_size=len(vectors)) if len(source) else torch.zeros_like(z)
            if hop < self.config.hops - 1:
                z = F.silu(self.between[hop](z))
        return z  # type: ignore[no-any-return]

    def fuse(
        self, neighbourhood: Float[Tensor, "tokens width"], hidden: Float[Tensor, "tokens hidden_width"]
    ) -> Float[Tensor, "tokens width"]:
        """Fuse each token's hidden state with the neighbourhood of its node."""
        both = torch.cat([self.from_graph(neighbourhood), self.from_token(hidden)], dim=1)
        return self.fusion(both)  # type: ignore[no-any-return]

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden_width"],
        cu_seqlens: Int[Tensor, " boundaries"],
        edge_index: Int[Tensor, "2 edges"],
        head: Head,
        *,
        vectors: Float[Tensor, "nodes hidden_width"] | None = None,
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return log-probabilities of the next token.

        ``hidden`` are the frozen model's last hidden states of every node's tokens, node ``i`` at
        ``cu_seqlens[i]:cu_seqlens[i + 1]``; ``head`` turns hidden states into logits and is not trained here;
        ``vectors`` are one per node, by default each node's last hidden state.

        Raises:
            ShapeError: ``hidden`` does not end where ``cu_seqlens`` does, or ``vectors`` are not one per node.
            InputError: an edge names a node that is not there, or a node has neither token nor vector.
        """
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[-1]) != len(hidden):
            raise ShapeError("hidden", tuple(hidden.shape), f"[{int(cu_seqlens[-1])}, hidden_width]")
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < len(lengths):
            raise InputError(
                f"edge_index names nodes {int(edge_index.min())} to {int(edge_index.max())}; "
                f"the graph has {len(lengths)} nodes, numbered from 0."
            )
        vectors = node_vectors(hidden, cu_seqlens) if vectors is None else vectors
        if len(vectors) != len(lengths):
            raise ShapeError("vectors", tuple(vectors.shape), f"[{len(lengths)}, hidden_width]")
        per_token = self.neighbourhood(vectors, edge_index).repeat_interleave(lengths, dim=0)
        alone = F.log_softmax(head(hidden).float(), dim=1)
        with_graph = F.log_softmax(head(self.widen(self.fuse(per_token, hidden))).float(), dim=1)
        return torch.logaddexp(alone, with_graph) - math.log(2)


class NodeClassifier(nn.Module):
    """Classes of nodes from the fused vector; the adapter, trained on next tokens or fresh, learns with it."""

    def __init__(self, adapter: GraphAdapter, classes: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.classes = nn.Linear(adapter.config.width, classes)

    def forward(
        self, vectors: Float[Tensor, "nodes hidden_width"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes classes"]:
        """Return logits; ``vectors`` are one hidden state per node, such as that after the end of its prompt."""
        fused = self.adapter.fuse(self.adapter.neighbourhood(vectors, edge_index), vectors)
        return self.classes(fused)  # type: ignore[no-any-return]

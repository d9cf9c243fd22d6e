import math
import subprocess
import sys

import pytest
import torch
from processive.errors import ConfigError, InputError, ShapeError
from processive.graphs import (
    GraphAdapter,
    GraphAdapterConfig,
    NodeClassifier,
    next_token_loss,
    node_vectors,
    token_weights,
)
from torch.nn import functional as F

WIDTH, VOCABULARY = 12, 6


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.fixture
def head():
    return torch.nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)


def test_node_vectors_are_last_states():
    hidden = torch.arange(12.0).reshape(6, 2)
    assert node_vectors(hidden, cu([3, 1, 2])).tolist() == [[4, 5], [6, 7], [10, 11]]
    with pytest.raises(InputError, match="Node 1 has no token"):
        node_vectors(hidden, cu([3, 0, 3]))


def test_token_weights():
    weights = token_weights(torch.tensor([7, 7, 3, 7, 3]), cu([3, 0, 2]))
    assert weights.tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_torch(smoothing):
    logits, targets, weights = torch.randn(5, VOCABULARY), torch.tensor([0, 2, 5, 2, 1]), torch.rand(5)
    got = next_token_loss(logits.log_softmax(1), targets, weights, smoothing=smoothing)
    smooth = F.one_hot(targets, VOCABULARY) * (1 - smoothing) + smoothing / VOCABULARY
    each = F.kl_div(logits.log_softmax(1), smooth, reduction="none").sum(1)
    torch.testing.assert_close(got, (each * weights).sum() / weights.sum())


def test_residual_is_at_probability_level(head):
    adapter = GraphAdapter(GraphAdapterConfig(WIDTH, width=4))
    hidden, bounds = torch.randn(7, WIDTH), cu([3, 4])
    log_p = adapter(hidden, bounds, torch.tensor([[0, 1], [1, 0]]), head)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(7))
    alone = head(hidden).softmax(1)
    assert (log_p.exp() >= alone / 2 - 1e-6).all()
    neighbours = adapter.neighbourhood(hidden[[2, 6]], torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(neighbours, adapter.narrow(hidden[[6, 2]]))
    fused = adapter.widen(adapter.fuse(neighbours[[0, 0, 0, 1, 1, 1, 1]], hidden))
    torch.testing.assert_close(log_p.exp(), (alone + head(fused).softmax(1)) / 2)


def test_one_hop_never_hears_itself(head):
    hidden, bounds = torch.randn(6, WIDTH), cu([2, 2, 2])
    edges = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, 1, 2]])  # self loops among them; node 2 has no neighbour
    for hops in (1, 2):
        adapter = GraphAdapter(GraphAdapterConfig(WIDTH, width=4, hops=hops))
        vectors = node_vectors(hidden, bounds).requires_grad_()
        adapter.neighbourhood(vectors, edges)[0].sum().backward()
        assert (vectors.grad[0].abs().max() > 0) == (hops == 2)
        assert (vectors.grad[1].abs().max() > 0) == (hops == 1)
        assert vectors.grad[2].abs().max() == 0
        assert adapter(hidden, bounds, torch.zeros(2, 0, dtype=torch.long), head).isfinite().all()


def test_permutation_of_nodes(head):
    adapter = GraphAdapter(GraphAdapterConfig(WIDTH, width=4, hops=2))
    vectors, edges = torch.randn(5, WIDTH), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 0, 4, 0]])
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(
        adapter.neighbourhood(vectors[order], order.argsort()[edges]), adapter.neighbourhood(vectors, edges)[order]
    )


def made_graph(nodes=60):
    """Pairs of nodes: every token of a node, but the last, is followed by the colour of its partner.

    The hidden states show each node's own colour; the frozen head reads the answer off hidden states that would hold
    it, so the language model alone can only guess.
    """
    generator = torch.Generator().manual_seed(5)
    colour = torch.randint(VOCABULARY, (nodes,), generator=generator)
    partner = torch.arange(nodes) ^ 1
    lengths = torch.randint(2, 6, (nodes,), generator=generator)
    node = torch.arange(nodes).repeat_interleave(lengths)
    hidden = torch.randn(len(node), WIDTH, generator=generator) * 0.3
    hidden[:, :VOCABULARY] += F.one_hot(colour, VOCABULARY)[node] * 2
    edges = torch.stack([torch.arange(nodes), partner])
    return hidden, cu(lengths.tolist()), edges, colour[partner], colour[partner][node]


def test_adapter_beats_the_frozen_model():
    hidden, bounds, edges, _, targets = made_graph()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    frozen = head.weight.clone()
    adapter = GraphAdapter(GraphAdapterConfig(WIDTH, width=16))
    weights = token_weights(targets, bounds)
    held_out = torch.arange(len(targets)) >= bounds[40]  # the last twenty nodes
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    for _ in range(150):
        loss = next_token_loss(adapter(hidden, bounds, edges, head), targets, weights * ~held_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log_p = adapter(hidden, bounds, edges, head)
    alone = F.nll_loss(head(hidden).log_softmax(1)[held_out], targets[held_out])
    with_graph = F.nll_loss(log_p[held_out], targets[held_out])
    right = (log_p.argmax(1) == targets)[held_out].float().mean()
    assert torch.equal(head.weight, frozen)
    assert with_graph < alone - 0.5
    assert with_graph < math.log(VOCABULARY) - 0.5
    assert right > 0.9
    without = adapter(hidden, bounds, torch.zeros(2, 0, dtype=torch.long), head)
    assert (without.argmax(1) == targets)[held_out].float().mean() < 0.5  # it was the neighbours that told


def test_node_classifier_learns_from_neighbours():
    hidden, bounds, edges, labels, _ = made_graph()
    vectors = node_vectors(hidden, bounds)
    classifier = NodeClassifier(GraphAdapter(GraphAdapterConfig(WIDTH, width=16)), VOCABULARY)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=5e-3)
    for _ in range(100):
        loss = F.cross_entropy(classifier(vectors, edges)[:40], labels[:40])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (classifier(vectors, edges).argmax(1) == labels)[40:].float().mean()
    blind = (classifier(vectors, edges[:, :0]).argmax(1) == labels)[40:].float().mean()
    assert right > 0.9
    assert blind < 0.5


def test_bad_input(head):
    adapter = GraphAdapter(GraphAdapterConfig(WIDTH))
    edges = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(ShapeError, match="hidden"):
        adapter(torch.randn(5, WIDTH), cu([2, 2]), edges, head)
    with pytest.raises(InputError, match="nodes 0 to 2; the graph has 2 nodes"):
        adapter(torch.randn(4, WIDTH), cu([2, 2]), torch.tensor([[0], [2]]), head)
    with pytest.raises(ShapeError, match="vectors"):
        adapter(torch.randn(4, WIDTH), cu([2, 2]), edges, head, vectors=torch.randn(3, WIDTH))
    with pytest.raises(ConfigError, match="at least 1"):
        GraphAdapterConfig(WIDTH, hops=0)


def test_import_is_light():
    code = "import sys, processive.graphs; assert 'torch_geometric' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names():
    import processive.graphs as graphs

    for name in graphs.__all__:
        assert getattr(graphs, name).__name__ == name
    assert dir(graphs) == graphs.__all__
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = graphs.Nonsense

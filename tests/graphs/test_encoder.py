import pytest
import torch
from processive.errors import ConfigError, InputError, ShapeError
from processive.graphs import GraphEncoder, GraphEncoderConfig
from torch_geometric.data import Batch, Data

KINDS = ["gin", "gine", "attention"]
POOLINGS = ["sum", "mean", "attention"]


def config(kind="gine", **changes):
    edges = {} if kind == "gin" else {"edge_categories": (4, 2)}
    return GraphEncoderConfig(kind, node_categories=(10, 3), width=16, depth=3, heads=2, **{**edges, **changes})


def graph(nodes, bonds, seed=0):
    """A graph of ``nodes`` with the undirected ``bonds``, random categories."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack(
        [torch.randint(10, (nodes,), generator=generator), torch.randint(3, (nodes,), generator=generator)], 1
    )
    attr = torch.stack([torch.randint(4, (len(bonds),), generator=generator) for _ in range(2)], 1) % 2
    edges = torch.tensor(bonds, dtype=torch.int64).reshape(-1, 2)
    return Data(x=x, edge_index=torch.cat([edges, edges.flip(1)]).T.contiguous(), edge_attr=attr.repeat(2, 1))


RING = graph(5, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)])
PATH = graph(4, [(0, 1), (1, 2), (2, 3)], seed=1)
ATOM = graph(1, [])
LOOSE = graph(4, [(0, 2)], seed=2)  # nodes 1 and 3 stand alone


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_permutation(kind, pooling):
    encoder = GraphEncoder(config(kind, pooling=pooling)).eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    shuffle = torch.tensor([7, 2, 9, 0, 5, 1, 3, 8, 6, 4])
    other = Data(x=RING.x[order], edge_index=place[RING.edge_index][:, shuffle], edge_attr=RING.edge_attr[shuffle])
    nodes, whole = encoder(RING)
    nodes_other, whole_other = encoder(other)
    torch.testing.assert_close(nodes_other, nodes[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole_other, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_equals_in_company(kind):
    encoder = GraphEncoder(config(kind, dropout=0.5)).eval()
    graphs = [RING, ATOM, LOOSE, PATH]
    nodes, whole = encoder(Batch.from_data_list(graphs))
    assert whole.shape == (4, 16)
    alone = [encoder(one) for one in graphs]
    torch.testing.assert_close(nodes, torch.cat([n for n, _ in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, torch.cat([g for _, g in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_structure_and_features_count(kind):
    encoder = GraphEncoder(config(kind)).eval()
    cut = Data(x=RING.x, edge_index=RING.edge_index[:, :-1], edge_attr=RING.edge_attr[:-1])
    assert not torch.allclose(encoder(RING)[1], encoder(cut)[1], atol=1e-4)
    painted = Data(x=RING.x, edge_index=RING.edge_index, edge_attr=1 - RING.edge_attr)
    same = torch.allclose(encoder(RING)[1], encoder(painted)[1], atol=1e-4)
    assert same == (kind == "gin")


@pytest.mark.parametrize("kind", KINDS)
def test_isolated_nodes_keep_to_themselves(kind):
    encoder = GraphEncoder(config(kind)).eval()
    nodes, _ = encoder(LOOSE)
    alone = Data(x=LOOSE.x[1:2], edge_index=torch.zeros(2, 0, dtype=torch.long), edge_attr=torch.zeros(0, 2).long())
    torch.testing.assert_close(nodes[1:2], encoder(alone)[0])
    x = LOOSE.x.clone()
    x[0, 0] = (x[0, 0] + 1) % 10
    changed, _ = encoder(Data(x=x, edge_index=LOOSE.edge_index, edge_attr=LOOSE.edge_attr))
    assert torch.equal(changed[[1, 3]], nodes[[1, 3]])
    assert not torch.allclose(changed[2], nodes[2], atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_graph_without_nodes(pooling):
    empty = Data(x=torch.zeros(0, 2).long(), edge_index=torch.zeros(2, 0).long(), edge_attr=torch.zeros(0, 2).long())
    encoder = GraphEncoder(config(pooling=pooling)).eval()
    nodes, whole = encoder(Batch.from_data_list([RING, empty]))
    assert nodes.shape == (5, 16)
    assert torch.equal(whole[1], torch.zeros(16))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind):
    encoder = GraphEncoder(config(kind, pooling="attention"))
    encoder(Batch.from_data_list([RING, PATH]))[1].square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_real_features():
    encoder = GraphEncoder(GraphEncoderConfig("attention", node_features=3, edge_features=1, width=8, depth=2, heads=2))
    data = Data(x=torch.randn(5, 3), edge_index=RING.edge_index, edge_attr=torch.randn(10, 1))
    assert encoder(data)[1].shape == (1, 8)
    with pytest.raises(ShapeError, match="node features"):
        encoder(Data(x=torch.randn(5, 2), edge_index=RING.edge_index, edge_attr=torch.randn(10, 1)))


def test_categories_are_checked():
    encoder = GraphEncoder(config())
    for value in (10, -1):
        x = RING.x.clone()
        x[3, 0] = value
        with pytest.raises(InputError, match=f"node 3, column 0 has category {value}; this encoder knows 0 to 9"):
            encoder(Data(x=x, edge_index=RING.edge_index, edge_attr=RING.edge_attr))
    with pytest.raises(InputError, match="real numbers"):
        encoder(Data(x=RING.x.float(), edge_index=RING.edge_index, edge_attr=RING.edge_attr))
    with pytest.raises(InputError, match="no edge_attr"):
        encoder(Data(x=RING.x, edge_index=RING.edge_index))
    with pytest.raises(InputError, match="no x"):
        encoder(Data(edge_index=RING.edge_index))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "gine"}, "exactly one"),
        ({"kind": "gine", "node_features": 2, "node_categories": (3,)}, "exactly one"),
        ({"kind": "gine", "node_features": 2}, "needs edge_categories"),
        ({"kind": "gin", "node_features": 2, "edge_features": 1}, "no use for edge"),
        ({"kind": "gine", "node_features": 2, "edge_features": 1, "edge_categories": (3,)}, "not both"),
        ({"kind": "attention", "node_features": 2, "width": 10, "heads": 4}, "not divisible"),
    ],
)
def test_configurations_that_cannot_work(options, reason):
    with pytest.raises(ConfigError, match=reason):
        GraphEncoderConfig(**options)

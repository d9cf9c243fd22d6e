"""The network behind ``PropertyPredictor``: its inputs, its layers and its training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import InputError, needs
from .descriptors import molecule_descriptors
from .graph import ATOM_CATEGORIES, BOND_CATEGORIES, molecule_graph
from .molecules import parse_smiles

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data
else:
    Batch = Data = object

Task = Literal["regression", "classification"]


@dataclass(frozen=True)
class Molecules:
    """The usable molecules of a list.

    Attributes:
        graphs: one per usable molecule.
        descriptors: float64 [usable, descriptors], NaN where undefined.
        rows: their places in the list, from 0.
        problems: place and reason of the others.
    """

    graphs: list[Data]
    descriptors: NDArray[np.float64]
    rows: NDArray[np.int64]
    problems: list[tuple[int, InputError]]


def read_molecules(smiles: Sequence[str | None], names: Sequence[str], *, progress: bool = False) -> Molecules:
    """Return graphs and the named descriptors of every row that is a molecule."""
    with needs("chem"):
        from rdkit import rdBase
    graphs, descriptors, rows, problems = [], [], [], []
    for row, text in enumerate(tqdm(smiles, desc="molecules", unit="mol", disable=not progress, leave=False)):
        try:
            if not isinstance(text, str):
                raise InputError(f"{text!r} is not a SMILES string.")
            molecule = parse_smiles(text)
        except InputError as problem:
            problems.append((row, problem))
            continue
        graphs.append(molecule_graph(molecule))
        with rdBase.BlockLogs():
            descriptors.append(molecule_descriptors(molecule, names))
        rows.append(row)
    table = np.stack(descriptors) if descriptors else np.zeros((0, len(names)))
    return Molecules(graphs, table, np.array(rows, np.int64), problems)


class PropertyNetwork(nn.Module):
    """Graph embedding and scaled descriptors side by side, then three dense layers."""

    def __init__(
        self,
        *,
        encoder: Literal["gine", "attention"],
        width: int,
        depth: int,
        dropout: float,
        descriptors: int,
        tasks: int,
    ) -> None:
        from ..graphs import GraphEncoder, GraphEncoderConfig

        super().__init__()
        self.encoder = GraphEncoder(
            GraphEncoderConfig(
                encoder,
                node_categories=tuple(ATOM_CATEGORIES.values()),
                edge_categories=tuple(BOND_CATEGORIES.values()),
                width=width,
                depth=depth,
                dropout=dropout,
            )
        )
        self.head = nn.Sequential(
            nn.Linear(width + descriptors, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, tasks),
        )

    def forward(
        self, batch: Batch, descriptors: Float[Tensor, "molecules descriptors"]
    ) -> Float[Tensor, "molecules tasks"]:
        """Return standardised targets or logits."""
        graph = self.encoder(batch)[1]
        atoms = torch.bincount(batch.batch, minlength=len(graph))[:, None]
        # The sum over atoms, divided by its root: properties that grow with the molecule stay visible, and tame.
        return self.head(torch.cat([graph / atoms.sqrt(), descriptors], dim=1))  # type: ignore[no-any-return]


def masked_loss(
    outputs: Float[Tensor, "molecules tasks"], targets: Float[Tensor, "molecules tasks"], task: Task
) -> Float[Tensor, ""]:
    """Mean over known targets (NaN is unknown) of the squared error, or of the cross-entropy in nats."""
    known = ~targets.isnan()
    if task == "regression":
        return F.mse_loss(outputs[known], targets[known])
    return F.binary_cross_entropy_with_logits(outputs[known], targets[known])


@dataclass(frozen=True)
class Dataset:
    """Graphs, scaled descriptors [molecules, descriptors] and scaled targets [molecules, tasks]."""

    graphs: list[Data]
    descriptors: Float[Tensor, "molecules descriptors"]
    targets: Float[Tensor, "molecules tasks"] | None = None

    def __len__(self) -> int:
        return len(self.graphs)

    def batches(self, order: Sequence[int], size: int, device: str) -> Iterator[tuple[Batch, Tensor, list[int]]]:
        """Yield batches of graphs, their descriptors and their places, in ``order``."""
        with needs("graphs"):
            from torch_geometric.data import Batch
        for start in range(0, len(order), size):
            places = list(order[start : start + size])
            graphs = Batch.from_data_list([self.graphs[place] for place in places])
            yield graphs.to(device), self.descriptors[places].to(device), places


@torch.no_grad()
def network_outputs(
    network: PropertyNetwork, data: Dataset, *, batch_size: int, device: str
) -> Float[Tensor, "molecules tasks"]:
    """Return the network's outputs for every molecule of ``data``, without dropout."""
    network.eval()
    batches = data.batches(range(len(data)), batch_size, device)
    return torch.cat([network(graphs, descriptors).cpu() for graphs, descriptors, _ in batches])


def train_network(
    network: PropertyNetwork,
    data: Dataset,
    validation: Dataset | None,
    *,
    task: Task,
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    device: str,
    seed: int,
    bar: tqdm[Any],
) -> list[dict[str, float]]:
    """Train in place and return one line of losses per epoch; with ``validation``, keep the best epoch's weights.

    AdamW; the learning rate warms up over a twentieth of the steps and falls to zero as a cosine.
    """
    assert data.targets is not None
    generator = torch.Generator().manual_seed(seed)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(data) / batch_size)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    history: list[dict[str, float]] = []
    best, best_epoch, kept = math.inf, 0, None
    for epoch in range(1, epochs + 1):
        network.train()
        total = torch.zeros(())
        order = torch.randperm(len(data), generator=generator).tolist()
        for graphs, descriptors, places in data.batches(order, batch_size, device):
            loss = masked_loss(network(graphs, descriptors), data.targets[places].to(device), task)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach().cpu() * len(places)
        line = {"epoch": float(epoch), "loss": float(total) / len(data)}
        if validation is not None:
            assert validation.targets is not None
            outputs = network_outputs(network, validation, batch_size=batch_size, device=device)
            line["validation_loss"] = float(masked_loss(outputs, validation.targets, task))
            if line["validation_loss"] < best:
                best, best_epoch, kept = line["validation_loss"], epoch, copy.deepcopy(network.state_dict())
        history.append(line)
        bar.set_postfix({name: f"{value:.4g}" for name, value in line.items()}, refresh=False)
        bar.update()
        if validation is not None and epoch - best_epoch >= patience:
            bar.update(epochs - epoch)
            break
    if kept is not None:
        network.load_state_dict(kept)
    network.eval()
    return history

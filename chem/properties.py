"""Properties of molecules: a graph encoder beside RDKit's descriptors, with scikit-learn's ``fit`` and ``predict``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..estimator import Estimator
from .descriptors import Scaling, descriptor_names
from .property_files import load_predictor, save_predictor
from .property_network import (
    Dataset,
    Molecules,
    PropertyNetwork,
    network_outputs,
    read_molecules,
    train_network,
)

CHUNK = 1024  # molecules whose graphs are in memory at once while predicting


class PropertyPredictor(Estimator):
    """Predict properties of molecules from their graphs and RDKit's descriptors, in the manner of scikit-learn.

    >>> predictor = PropertyPredictor("regression").fit(smiles, solubility, validation=(more, their_solubility))
    >>> predictor.predict(["CCO", "not a molecule"])      # array([1.1, nan]) and a warning
    >>> predictor.save("runs/solubility")

    Args:
        task: "regression", or "classification" with labels 0 and 1. Several tasks are columns of y; NaN is unknown.
        encoder: "gine" or "attention", see ``graphs.GraphEncoderConfig``.
        width: of the graph encoder and the dense layers.
        depth: rounds of message passing.
        dropout: share dropped in training.
        descriptors: put RDKit's 2D descriptors beside the graph embedding. Without them it is a plain graph network.
        ensemble: number of networks, each from its own seed, whose predictions are averaged.
        epochs: passes over the training molecules, at most.
        patience: epochs without a better validation loss before a network stops (only with ``validation``).
        batch_size: molecules per step.
        learning_rate: at its peak; it warms up over a twentieth of the steps and falls to zero as a cosine.
        weight_decay: of AdamW.
        seed: one seed, one result on one machine.
        device: where to compute.
        progress: show progress bars.

    After ``fit``: ``history_`` (one dict per network and epoch), ``tasks_`` (number of tasks).
    """

    def __init__(
        self,
        task: Literal["regression", "classification"] = "regression",
        *,
        encoder: Literal["gine", "attention"] = "gine",
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.2,
        descriptors: bool = True,
        ensemble: int = 3,
        epochs: int = 40,
        patience: int = 10,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
        device: str = "cpu",
        progress: bool = True,
    ) -> None:
        self.task = task
        self.encoder = encoder
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.descriptors = descriptors
        self.ensemble = ensemble
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.device = device
        self.progress = progress

    def __repr__(self) -> str:
        return f"PropertyPredictor({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn (the only caller) what kind of estimator this is."""
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor" if self.task == "regression" else "classifier",
            target_tags=TargetTags(required=True, multi_output=True),
            classifier_tags=ClassifierTags(multi_class=False) if self.task == "classification" else None,
            regressor_tags=RegressorTags() if self.task == "regression" else None,
            input_tags=InputTags(two_d_array=False, string=True),
        )

    def fit(
        self,
        smiles: Sequence[str | None],
        y: ArrayLike,
        validation: tuple[Sequence[str | None], ArrayLike] | None = None,
    ) -> PropertyPredictor:
        """Train on molecules and their properties ``y`` [molecules] or [molecules, tasks]; NaN is unknown.

        With ``validation`` each network keeps the weights of its best epoch there; without, those of the last one.
        Rows that are no molecule, or have no known property, are left out, with a warning that counts and names them.

        Raises:
            ConfigError: a constructor argument cannot work.
            InputError: no row is usable, labels are not 0 and 1, or lengths disagree.
        """
        self._check_params()
        targets = self._targets(smiles, y)
        self.single_ = np.ndim(y) == 1
        self.tasks_ = targets.shape[1]
        self.descriptor_names_ = descriptor_names() if self.descriptors else ()
        molecules, targets = self._usable(smiles, targets, "training")
        self.scaling_ = Scaling.fit(molecules.descriptors)
        self.mean_, self.scale_ = np.zeros(self.tasks_), np.ones(self.tasks_)
        if self.task == "regression":
            known = np.where(np.isnan(targets).all(0), 0.0, targets)
            self.mean_, spread = np.nanmean(known, axis=0), np.nanstd(known, axis=0)
            self.scale_ = np.where(spread > 0, spread, 1.0)
        self.molecules_ = len(targets)
        data = self._dataset(molecules, targets)
        checks = None
        if validation is not None:
            wanted = self._targets(*validation)
            if wanted.shape[1] != self.tasks_:
                raise InputError(f"The validation y has {wanted.shape[1]} tasks, the training y {self.tasks_}.")
            checks = self._dataset(*self._usable(validation[0], wanted, "validation"))
        self.networks_: list[PropertyNetwork] = []
        self.history_: list[dict[str, float]] = []
        with tqdm(total=self.ensemble * self.epochs, desc="fit", unit="epoch", disable=not self.progress) as bar:
            for member in range(self.ensemble):
                self._fit_member(member, data, checks, bar)
        return self

    def _fit_member(self, member: int, data: Dataset, checks: Dataset | None, bar: Any) -> None:
        seed = self.seed * 1000 + member
        with torch.random.fork_rng():  # weights and dropout draw from the global generator; the caller's is given back
            torch.manual_seed(seed)
            network = self.new_network()
            history = train_network(
                network,
                data,
                checks,
                task=self.task,
                epochs=self.epochs,
                patience=self.patience,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                device=self.device,
                seed=seed,
                bar=bar,
            )
        self.networks_.append(network)
        self.history_ += [{"network": float(member), **line} for line in history]

    def predict(self, smiles: Sequence[str | None]) -> NDArray[np.float64]:
        """Return the properties, or the likelier labels: float64 [molecules] or [molecules, tasks], as y was.

        Rows that are no molecule become NaN, with a warning that counts and names them.

        Raises:
            ConfigError: the predictor was not fitted.
        """
        outputs = self._outputs(smiles)
        if self.task == "classification":
            outputs = np.where(np.isnan(outputs), np.nan, outputs >= 0.5)
        return outputs[:, 0] if self.single_ else outputs

    def predict_proba(self, smiles: Sequence[str | None]) -> NDArray[np.float64]:
        """Return probabilities: [molecules, 2] (of 0 and of 1) for one task, [molecules, tasks] (of 1) for several.

        Raises:
            ConfigError: the predictor was not fitted, or not for classification.
        """
        if self.task != "classification":
            raise ConfigError("predict_proba is for task='classification'; this predictor does regression.")
        outputs = self._outputs(smiles)
        return np.concatenate([1 - outputs, outputs], axis=1) if self.single_ else outputs

    def score(self, smiles: Sequence[str | None], y: ArrayLike) -> float:
        """Return R2 (regression) or accuracy, the mean over tasks, from the rows that are molecules and known."""
        wanted = self._targets(smiles, y)
        got = np.asarray(self.predict(smiles)).reshape(wanted.shape)
        known = ~np.isnan(wanted) & ~np.isnan(got)
        scores = []
        for task in range(wanted.shape[1]):
            a, b = wanted[known[:, task], task], got[known[:, task], task]
            if len(a):
                regression = 1 - ((a - b) ** 2).sum() / max(((a - a.mean()) ** 2).sum(), 1e-300)
                scores.append(regression if self.task == "regression" else (a == b).mean())
        if not scores:
            raise InputError("No row is both a molecule and known, so there is nothing to score.")
        return float(np.mean(scores))

    def save(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``; older ones are replaced when all are written.

        Raises:
            ConfigError: the predictor was not fitted.
            OutputError: the folder cannot be written.
        """
        self._check_fitted()
        save_predictor(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> PropertyPredictor:
        """Read a predictor that ``save`` wrote.

        Raises:
            InputError: the folder holds no such predictor, or a damaged one.
        """
        return load_predictor(cls, folder, device=device)

    def _check_params(self) -> None:
        if self.task not in ("regression", "classification"):
            raise ConfigError(f"task is {self.task!r}; it can be 'regression' or 'classification'.")
        for name in ("ensemble", "epochs", "batch_size", "patience", "width", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is at least 1.")

    def _check_fitted(self) -> None:
        if not hasattr(self, "networks_"):
            raise ConfigError("This predictor has not been fitted: call fit or load first.")

    def new_network(self) -> PropertyNetwork:
        """Return one untrained network for the tasks and descriptors of the last ``fit``."""
        return PropertyNetwork(
            encoder=self.encoder,
            width=self.width,
            depth=self.depth,
            dropout=self.dropout,
            descriptors=len(self.descriptor_names_),
            tasks=self.tasks_,
        )

    def _targets(self, smiles: Sequence[str | None], y: ArrayLike) -> NDArray[np.float64]:
        targets = np.asarray(y, dtype=np.float64)
        if targets.ndim not in (1, 2) or len(targets) != len(smiles):
            raise InputError(
                f"y has shape {targets.shape}; {len(smiles)} molecules need [molecules] or [molecules, tasks]."
            )
        targets = targets.reshape(len(targets), -1)
        wrong = np.isinf(targets)
        if self.task == "classification":
            wrong |= ~np.isnan(targets) & (targets != 0) & (targets != 1)
        if wrong.any():
            row, task = (int(place) for place in np.argwhere(wrong)[0])
            allowed = "finite numbers" if self.task == "regression" else "0, 1"
            raise InputError(
                f"y is {targets[row, task]:g}; {self.task} takes {allowed} and NaN for unknown.", record=row + 1
            )
        return targets

    def _usable(
        self, smiles: Sequence[str | None], targets: NDArray[np.float64], what: str
    ) -> tuple[Molecules, NDArray[np.float64]]:
        """Molecules with a known target, and these targets; warns of the rest."""
        unknown = np.asarray(np.isnan(targets).all(axis=1))
        if unknown.any():
            numbers = _numbers(np.flatnonzero(unknown))
            _warn(f"{unknown.sum()} of {len(targets)} {what} rows have no known property and are left out ({numbers}).")
        molecules = read_molecules(
            [None if out else text for text, out in zip(smiles, unknown, strict=True)],
            self.descriptor_names_,
            progress=self.progress,
        )
        bad = [(row, problem) for row, problem in molecules.problems if not unknown[row]]
        if bad:
            _warn(_unusable(bad, len(targets), f"{what} rows are no molecule and are left out"))
        if not molecules.graphs:
            raise InputError(f"None of the {len(targets)} {what} rows is a molecule with a known property.")
        return molecules, targets[molecules.rows]

    def _dataset(self, molecules: Molecules, targets: NDArray[np.float64] | None = None) -> Dataset:
        descriptors = torch.from_numpy(self.scaling_(molecules.descriptors))
        if targets is None:
            return Dataset(molecules.graphs, descriptors)
        return Dataset(molecules.graphs, descriptors, torch.from_numpy((targets - self.mean_) / self.scale_).float())

    def _outputs(self, smiles: Sequence[str | None]) -> NDArray[np.float64]:
        """Mean over networks of values or probabilities, [molecules, tasks], NaN where a row is no molecule."""
        self._check_fitted()
        outputs = np.full((len(smiles), self.tasks_), np.nan)
        problems: list[tuple[int, InputError]] = []
        for start in tqdm(range(0, len(smiles), CHUNK), desc="predict", unit="chunk", disable=not self.progress):
            molecules = read_molecules(smiles[start : start + CHUNK], self.descriptor_names_)
            problems += [(start + row, problem) for row, problem in molecules.problems]
            if molecules.graphs:
                data = self._dataset(molecules)
                each = [
                    network_outputs(network, data, batch_size=self.batch_size, device=self.device).double()
                    for network in self.networks_
                ]
                if self.task == "classification":
                    each = [logits.sigmoid() for logits in each]
                mean = torch.stack(each).mean(0).numpy()
                outputs[start + molecules.rows] = mean * self.scale_ + self.mean_
        if problems:
            _warn(_unusable(problems, len(smiles), "rows are no molecule; their predictions are NaN"))
        return outputs


def _numbers(rows: Sequence[int] | NDArray[np.int64]) -> str:
    return "rows " + ", ".join(str(row + 1) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")


def _unusable(problems: Sequence[tuple[int, InputError]], total: int, what: str) -> str:
    numbers = _numbers([row for row, _ in problems])
    return f"{len(problems)} of {total} {what} ({numbers}); first: {problems[0][1]}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # the caller of fit or predict

"""A predictor of labels with scikit-learn's ``fit`` and ``predict``: a model, tuned on few or many of them.

>>> predictor = pv.SequencePredictor(pv.load("runs/prot"), tuning="lora").fit(sequences, activity)
>>> predictor.predict(others)
>>> predictor.save("runs/activity")         # then pv.load("runs/activity").predict(others)
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .estimator import Estimator

if TYPE_CHECKING:
    from .models import AdapterConfig, LanguageModel
    from .training import Labelled, TrainingConfig

TUNINGS = {"head": 3e-3, "lora": 1e-3, "full": 2e-4}  # learning rates where no configuration is given


class SequencePredictor(Estimator):
    """Tune a copy of a language model on labels, and predict.

    Args:
        base: the model to start from; it is not changed.
        kind: "regression", "binary" (labels 0 and 1, perhaps several columns) or "classes" (numbers from 0); NaN is
            unknown. See ``training.Labelled``.
        level: a label for each "sequence", or for each "token" (residue).
        tuning: what is trained beside the task head: nothing ("head"), an adapter ("lora"), or all ("full").
        names: of the columns, or of the classes.
        config: settings of the training; None: 20 epochs at a learning rate that suits the tuning.
        adapter: what the adapter of "lora" is; None: the default of ``models.AdapterConfig``.
        seed: of the head, the adapter, and the training.
        progress: show progress bars.

    After ``fit``: ``model_``, the tuned model with its task head, and ``history_``, the lines of its metrics.
    """

    def __init__(
        self,
        base: LanguageModel,
        *,
        kind: str = "regression",
        level: str = "sequence",
        tuning: str = "lora",
        names: Sequence[str] = (),
        config: TrainingConfig | None = None,
        adapter: AdapterConfig | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.base = base
        self.kind = kind
        self.level = level
        self.tuning = tuning
        self.names = names
        self.config = config
        self.adapter = adapter
        self.seed = seed
        self.progress = progress

    def fit(self, x: Sequence[Any], y: Any, validation: tuple[Sequence[Any], Any] | None = None) -> SequencePredictor:
        """Train on records and their labels.

        With ``validation``, a pair of both, the weights of the epoch with the least loss there are kept, else those of
        the last one.

        Raises:
            ConfigError: an argument cannot work.
            InputError: a record or a label cannot be used, with its number.
            KeyboardInterrupt: Ctrl-C was pressed; what was fitted before stays.
        """
        from .models import AdapterConfig, add_adapter, add_task, merge_adapter, remove_adapters
        from .training import TrainingConfig, read_metrics, train

        if self.tuning not in TUNINGS:
            raise ConfigError(f"tuning is {self.tuning!r}; it can be {', '.join(TUNINGS)}.")
        model = copy.deepcopy(self.base)
        data = self._labelled(x, y)
        held_out = None if validation is None else self._labelled(*validation)
        config = self.config or TrainingConfig(epochs=20, learning_rate=TUNINGS[self.tuning])
        config = replace(config, seed=self.seed, trained="head" if self.tuning == "head" else "all")
        if held_out is not None:
            epoch = steps_per_epoch(data, config)
            config = replace(config, validate_every=epoch, snapshot_every=epoch)
        add_task(model, data.task(*self.names), seed=self.seed)
        if self.tuning == "lora":
            add_adapter(model, self.adapter or AdapterConfig(), seed=self.seed)
        with tempfile.TemporaryDirectory() as out:
            metrics = train(model, data, config, out=out, validation=held_out, progress=self.progress)
            if metrics["interrupted"]:
                raise KeyboardInterrupt
            self.history_ = read_metrics(out)
            if held_out is not None:
                _keep_best(model, Path(out), self.history_)
        if self.tuning == "lora":
            merge_adapter(model)
            remove_adapters(model)
        model.card.recipe = {**model.card.recipe, "tuning": self.tuning}
        self.model_ = model.eval()
        return self

    def predict(self, x: Sequence[Any]) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return numbers, or the likelier label: float64 [records] or [records, columns]; a list of those of tokens.

        Raises:
            ConfigError: the predictor was not fitted.
        """
        found = self.predict_proba(x) if self.kind != "regression" else self._answers(x)
        if self.kind == "regression":
            return found
        rows = found if isinstance(found, list) else [found]
        if self.kind == "classes":
            labels = [row.argmax(-1).astype(np.float64) for row in rows]
        else:
            labels = [(row >= 0.5).astype(np.float64) for row in rows]
        return labels if isinstance(found, list) else labels[0]

    def predict_proba(self, x: Sequence[Any]) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return probabilities: of yes, [records] or [records, columns], or of each class; see ``inference.predict``.

        Raises:
            ConfigError: the predictor was not fitted, or learns numbers.
        """
        if self.kind == "regression":
            raise ConfigError("predict_proba is for kind='binary' and 'classes'; this predictor does regression.")
        return self._answers(x)

    def save(self, folder: str | Path) -> None:
        """Write the tuned model with its task head; ``processive.load(folder).predict(...)`` says the same.

        Raises:
            ConfigError: the predictor was not fitted.
            OutputError: the folder cannot be written.
        """
        self._fitted().save(folder)

    def _fitted(self) -> LanguageModel:
        if not hasattr(self, "model_"):
            raise ConfigError("This predictor has not been fitted: call fit first.")
        return self.model_

    def _answers(self, x: Sequence[Any]) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        from .inference import predict

        return predict(self._fitted(), x, progress=self.progress)

    def _labelled(self, x: Sequence[Any], y: Any) -> Labelled:
        from .training import Labelled

        classes = len(self.names) or None if self.kind == "classes" else None
        return Labelled.encode(self.base.tokenizer, x, y, kind=self.kind, level=self.level, classes=classes)


def steps_per_epoch(data: Labelled, config: TrainingConfig) -> int:
    """Return the optimiser steps of the first epoch."""
    from .training.data import Pieces

    batches = Pieces(data).batches(batch_tokens=config.batch_tokens, seed=config.seed, epoch=0)
    return -(-len(batches) // config.accumulation)


def _keep_best(model: LanguageModel, out: Path, history: Sequence[dict[str, Any]]) -> None:
    """Put the snapshot with the least validation loss into the model."""
    from .training import read_snapshots

    snapshots = read_snapshots(out)
    losses = {line["step"]: line["validation_loss"] for line in history if "validation_loss" in line}
    best = min((step for step in snapshots if step in losses), key=losses.__getitem__)
    model.load_state_dict(snapshots[best], strict=False)

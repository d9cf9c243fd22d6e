"""The loss on held-out data."""

from __future__ import annotations

import torch

from ..sequences import pack
from .config import TrainingConfig
from .data import Pieces
from .engines import Engine
from .step import VALIDATION, make_objective, read_loss


@torch.no_grad()  # and not inference mode, in which DeepSpeed would gather weights that no gradient can pass any more
def validation_loss(engine: Engine, pieces: Pieces, config: TrainingConfig) -> float:
    """Mean loss per counted token on held-out sequences; masks are the same every time."""
    model, was_training = engine.model, engine.module.training
    engine.module.eval()
    total, weight = 0.0, 0.0
    for n, indices, counted in engine.share(pack(pieces.lengths, config.batch_tokens)):
        batch = pieces.batch(indices, vocabulary_size=model.vocabulary_size)
        objective = engine.own(make_objective(batch, model, config, VALIDATION, n))
        loss = float(read_loss(engine, objective, config))
        if counted:
            total += loss
            weight += objective.weight
    engine.module.train(was_training)
    total, weight = engine.sum([total, weight])
    return total / max(weight, 1.0)

"""Training objectives: token ids and a vocabulary in, inputs, targets and weights out. One file each.

``causal``, ``masked``, ``span_masked``, ``swapped``, ``replaced``, ``fill_in`` and ``glm`` are those of the training
loop, by the names in ``TrainingConfig.objective``, and so are ``answer`` and ``entity_masked``, where the sequences
have spans. What needs more of a model comes to it with its data: labels and views (``training.Labelled``), preferences
(``training.Preferences``), a generator's guesses (``sampled``: ``training.Sampled``) and two towers (contrastive and
matching: ``cells.CellTexts``). ``cluster_replaced`` alone does not: its counts change with the detector's errors, and
the loop carries no such state.
"""

from .answer import answer
from .causal import causal
from .consistency import symmetric_divergence
from .contrastive import contrastive_loss, hard_negatives, matching_loss
from .entity_masked import entity_masked
from .fill_in import fill_in
from .glm import glm
from .masked import masked
from .objective import Objective
from .preference import preference_loss, preference_pairs, sequence_log_likelihoods
from .replaced import cluster_replaced, count_confusions, replaced
from .sampled import DETECTOR_WEIGHT, sampled
from .span_masked import span_masked
from .supervised import balanced_weights, binary_loss, class_loss, regression_loss
from .swapped import swapped

__all__ = [
    "DETECTOR_WEIGHT",
    "Objective",
    "answer",
    "balanced_weights",
    "binary_loss",
    "causal",
    "class_loss",
    "cluster_replaced",
    "contrastive_loss",
    "count_confusions",
    "entity_masked",
    "fill_in",
    "glm",
    "hard_negatives",
    "masked",
    "matching_loss",
    "preference_loss",
    "preference_pairs",
    "regression_loss",
    "replaced",
    "sampled",
    "sequence_log_likelihoods",
    "span_masked",
    "swapped",
    "symmetric_divergence",
]

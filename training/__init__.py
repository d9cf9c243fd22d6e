"""Training: objectives, the one loop, and recipes."""

from . import objectives
from .averaging import average, average_runs, greedy_average, read_snapshots
from .cluster_detector import ClusterDetector, ClusterReplaced
from .config import TrainingConfig
from .data import Mixture
from .detector import add_detector
from .electra import Electra, Sampled
from .engines import EngineConfig
from .folds import Agreement, agreement, cluster_folds, fit_folds, predict_folds
from .labelled import Labelled
from .loop import train
from .metrics import read_metrics
from .preferences import Preferences
from .recipe import Recipe, read_recipe
from .record import describe_file, read_record
from .sequence_parallel import share_objective, sum_gradients
from .ties import ties, ties_adapters, ties_models

__all__ = [
    "Agreement",
    "ClusterDetector",
    "ClusterReplaced",
    "Electra",
    "EngineConfig",
    "Labelled",
    "Mixture",
    "Preferences",
    "Recipe",
    "Sampled",
    "TrainingConfig",
    "add_detector",
    "agreement",
    "average",
    "average_runs",
    "cluster_folds",
    "describe_file",
    "fit_folds",
    "greedy_average",
    "objectives",
    "predict_folds",
    "read_metrics",
    "read_recipe",
    "read_record",
    "read_snapshots",
    "share_objective",
    "sum_gradients",
    "ties",
    "ties_adapters",
    "ties_models",
    "train",
]

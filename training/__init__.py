"""Training: objectives, the one loop, and recipes."""

from . import objectives
from .config import TrainingConfig
from .data import Mixture
from .loop import train
from .metrics import read_metrics
from .recipe import Recipe, read_recipe

__all__ = ["Mixture", "Recipe", "TrainingConfig", "objectives", "read_metrics", "read_recipe", "train"]

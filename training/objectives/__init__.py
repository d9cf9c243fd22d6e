"""Training objectives: token ids and a vocabulary in, inputs, targets and weights out. One file each."""

from .causal import causal
from .entity_masked import entity_masked
from .fill_in import fill_in
from .glm import glm
from .masked import masked
from .objective import Objective
from .replaced import cluster_replaced, count_confusions, replaced
from .sampled import sampled
from .span_masked import span_masked
from .swapped import swapped

__all__ = [
    "Objective",
    "causal",
    "cluster_replaced",
    "count_confusions",
    "entity_masked",
    "fill_in",
    "glm",
    "masked",
    "replaced",
    "sampled",
    "span_masked",
    "swapped",
]

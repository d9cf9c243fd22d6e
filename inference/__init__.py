"""What a trained model is for: embeddings, scores and new sequences."""

from .embed import embed
from .generate import generate
from .logits import logits
from .predict import predict
from .score import log_likelihood, position_log_probabilities, pseudo_log_likelihood, score

__all__ = [
    "embed",
    "generate",
    "log_likelihood",
    "logits",
    "position_log_probabilities",
    "predict",
    "pseudo_log_likelihood",
    "score",
]

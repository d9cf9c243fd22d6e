"""Models: tokenizer + backbone + head, saved to and read from a folder."""

from .card import ModelCard
from .head import HeadConfig
from .language_model import LanguageModel
from .loading import load

__all__ = ["HeadConfig", "LanguageModel", "ModelCard", "load"]

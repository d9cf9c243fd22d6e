"""Models: tokenizer + backbone + head, saved to and read from a folder."""

from .card import ModelCard
from .files import load
from .head import HeadConfig
from .language_model import LanguageModel

__all__ = ["HeadConfig", "LanguageModel", "ModelCard", "load"]

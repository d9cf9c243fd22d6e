"""Backbones: configurations and networks, from packed tokens to hidden states, with a state that streams."""

from .backbone import Backbone, Memory
from .configuration import AnyConfig, build, config_from_dict, config_to_dict, from_plain, to_plain
from .state import BackboneState
from .transformer_config import TransformerConfig
from .xlstm_config import XLSTMConfig

__all__ = [
    "AnyConfig",
    "Backbone",
    "BackboneState",
    "Memory",
    "TransformerConfig",
    "XLSTMConfig",
    "build",
    "config_from_dict",
    "config_to_dict",
    "from_plain",
    "to_plain",
]

"""Models: tokenizer + backbone + head, saved to and read from a folder."""

from .adapter_files import adapter_settings, fingerprint, load_adapter, save_adapter
from .adapters import (
    AdapterConfig,
    adapter_names,
    add_adapter,
    linear_maps,
    merge_adapter,
    remove_adapters,
    trainable_share,
    unmerge_adapter,
    use_adapter,
    used_adapter,
)
from .card import ModelCard, installed_versions
from .head import HeadConfig
from .language_model import LanguageModel, add_task
from .loading import load
from .task import TaskConfig, TaskHead
from .trainable import Trainable

__all__ = [
    "AdapterConfig",
    "HeadConfig",
    "LanguageModel",
    "ModelCard",
    "TaskConfig",
    "TaskHead",
    "Trainable",
    "adapter_names",
    "adapter_settings",
    "add_adapter",
    "add_task",
    "fingerprint",
    "installed_versions",
    "linear_maps",
    "load",
    "load_adapter",
    "merge_adapter",
    "remove_adapters",
    "save_adapter",
    "trainable_share",
    "unmerge_adapter",
    "use_adapter",
    "used_adapter",
]

"""Models of the xlstm package (NX-AI): ``xLSTMLMModel``, and ``xLSTMBlockStack`` inside a network of one's own.

The configuration is the package's dataclass as a mapping (``dataclasses.asdict``, or the YAML it is made from).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import ConfigError, InputError
from ...sequences import IdTokenizer
from ..layers import round_up
from ..xlstm import XLSTM
from ..xlstm_config import XLSTMConfig
from .table import Checkpoint, CheckpointFormat, Parts, setting, to_ours, to_theirs
from .tokenizers import OURS, tokenizer_files
from .values import read_json, refuse, trained_context
from .xlstm_keys import (
    STACK,
    canonical,
    expansion_of,
    gelu_width,
    has_stack,
    stack_entries,
    structure,
    xlstm_entries,
    xlstm_of,
)

Recognise = Callable[[Mapping[str, Any], Collection[str]], bool]
READABLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "slstm_block.slstm": {"function": ("slstm",), "forward_clipval": (), "group_norm_weight": (True,)},
    "slstm_block.feedforward": {"act_fn": ("gelu",), "ff_type": ("ffn_gated",), "bias": (False,)},
}
KNOWN = {
    *("mlstm_block", "slstm_block", "context_length", "num_blocks", "embedding_dim", "add_post_blocks_norm", "bias"),
    *("dropout", "slstm_at", "_block_map", "vocab_size", "tie_weights", "weight_decay_on_embedding"),
    "add_embedding_dropout",
}
FIRST = "blocks.0.xlstm_norm.weight"
CELLS = "vanilla"  # runs everywhere; a checkpoint with the other layout is read by the shape of its kernel


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The package's configuration, at the top or under ``model`` as in the YAML of an experiment."""
    inner = config.get("model")
    return inner if isinstance(inner, Mapping) and "embedding_dim" not in config else config


def _recognise(config: Mapping[str, Any], names: Collection[str]) -> bool:
    others = {"token2label", "position_embeddings", "d_model", "config"} & set(_settings(config))
    return has_stack(names) and not others  # Chem-, Prot- and DNA-xLSTM


def _config_in(checkpoint: Checkpoint) -> Parts:
    settings, shapes = _settings(checkpoint.config), checkpoint.shapes
    unknown = sorted(set(settings) - KNOWN)
    if unknown:
        raise InputError(f"The configuration's {unknown[0]!r} is nothing that the xlstm package has.")
    for place, readable in READABLE.items():
        refuse(nested(settings, place), readable)
    found = structure(shapes, STACK)
    vocabulary_size = shapes["token_embedding.weight"][0]
    check(settings, found, vocabulary_size)
    backbone = {
        **backbone_in(found, vocabulary_size, told=nested(settings, "mlstm_block.mlstm").get("proj_factor") or 2.0),
        "dropout": setting(settings, "dropout", float, 0.0),
    }
    context = setting(settings, "context_length", int, -1)
    return {
        "tokenizer": tokenizer_in(checkpoint, vocabulary_size),
        "backbone": backbone,
        "head": {"kind": "linear", "tied": setting(settings, "tie_weights", bool, False)},
        "card": {"recipe": {"context": context} if context > 0 else {}},
        "foreign": {"cells": found.get("cells", CELLS)},
    }


def backbone_in(found: Mapping[str, Any], vocabulary_size: int, *, told: float | int = 2.0) -> dict[str, Any]:
    """Return our configuration of a stack of blocks whose ``structure`` was ``found``; ``told`` is its proj_factor."""
    return {
        "family": XLSTMConfig.family,
        "vocabulary_size": vocabulary_size,
        **{key: found[key] for key in ("width", "depth", "heads", "blocks", "convolution", "post_blocks_norm")},
        "projection_block": found.get("projection_block", 4),
        "expansion": expansion_of(found.get("inner"), found["width"], told),
        "feed_forward_width": gelu_width(found),
        "bias": found.get("bias", False),
        "norm_offset": True,
    }


def nested(settings: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The mapping at ``a.b``, an empty one where it is absent or null."""
    for key in place.split("."):
        settings = settings.get(key) or {}
    return settings


def check(settings: Mapping[str, Any], found: Mapping[str, Any], vocabulary_size: int) -> None:
    """Refuse weights that are of another model than the configuration."""
    told = {"embedding_dim": found["width"], "num_blocks": found["depth"], "vocab_size": vocabulary_size}
    wrong = [(key, settings[key], value) for key, value in told.items() if settings.get(key) not in (None, value)]
    for kind in ("mlstm", "slstm"):
        heads = nested(settings, f"{kind}_block.{kind}").get("num_heads")
        if kind in (*found["blocks"], found["blocks"]) and heads not in (None, found["heads"]):
            wrong.append((f"{kind}_block.{kind}.num_heads", heads, found["heads"]))
    for key, value, seen in wrong:
        raise InputError(f"The configuration's {key!r} is {value!r}, and the weights have {seen!r}.")


def config_out(config: XLSTMConfig, *, tied: bool, context: int, cells: str) -> dict[str, Any]:
    """Return the package's configuration of a model, whose sLSTM cells are to be of the backend ``cells``.

    Raises:
        ConfigError: a model that the package cannot hold.
    """
    if config.direction != "causal" or config.rotary is not None or not config.norm_offset or not config.causal:
        raise ConfigError("The xlstm package's models are causal, without rotary positions, and have norm_offset.")
    if set(config.kinds) - {"mlstm", "slstm"} or len(set(config.expansions)) > 1:
        raise ConfigError("The xlstm package has blocks mlstm and slstm, all mlstm blocks with one inner width.")
    if config.norm_eps not in (None, 1e-5):
        raise ConfigError(f"The xlstm package's norms have an epsilon of 1e-05, not {config.norm_eps}.")
    mlstm = {
        "conv1d_kernel_size": config.convolution,
        "qkv_proj_blocksize": config.projection_block,
        "num_heads": config.heads,
        "proj_factor": config.expansions[0],
        "round_proj_up_dim_up": True,
        "round_proj_up_to_multiple_of": 64,
    }
    slstm = {
        "backend": cells,
        "num_heads": config.heads,
        "conv1d_kernel_size": config.convolution,
        "bias_init": "powerlaw_blockdependent",
    }
    return {
        "vocab_size": config.vocabulary_size,
        "embedding_dim": config.width,
        "num_blocks": config.depth,
        "context_length": context,
        "add_post_blocks_norm": config.post_blocks_norm,
        "bias": config.bias,
        "dropout": config.dropout,
        "tie_weights": tied,
        "mlstm_block": {"mlstm": mlstm} if "mlstm" in config.kinds else None,
        "slstm_block": {"slstm": slstm, "feedforward": feed_forward(config)} if "slstm" in config.kinds else None,
        "slstm_at": [i for i, kind in enumerate(config.kinds) if kind == "slstm"],
    }


def feed_forward(config: XLSTMConfig) -> dict[str, Any]:
    """Return the package's settings of a gated feed-forward that give it our width."""
    inner = config.gelu_width
    if inner == round_up(1.3 * config.width, 64):
        factor, multiple = 1.3, 64
    else:
        factor, multiple = inner / config.width, 1
        if round_up(factor * config.width, 1) != inner:  # the quotient rounds up
            factor = (inner - 0.5) / config.width
    return {
        "proj_factor": factor,
        "act_fn": "gelu",
        "round_proj_up_dim_up": True,
        "round_proj_up_to_multiple_of": multiple,
    }


def tokenizer_in(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """Return the tokenizer whose file lies beside a checkpoint, or that of token ids as they are."""
    found = read_json(checkpoint.folder / OURS)
    return found or {"name": IdTokenizer.name, "size": size}


def tokenizer_out(parts: Parts) -> dict[str, str | bytes]:
    """Return the files of a tokenizer; token ids as they are need none."""
    return {} if parts["tokenizer"]["name"] == IdTokenizer.name else tokenizer_files(parts)


def plain_head(head: Mapping[str, Any], *, tied: bool = True) -> bool:
    """Return whether a head is tied, having checked that it is one linear map and no more.

    Raises:
        ConfigError: another head.
    """
    odd = [key for key, value in head.items() if key not in ("kind", "tied", "norm_eps", "activation") and value]
    if head.get("kind", "linear") != "linear" or odd or (head.get("tied") and not tied):
        raise ConfigError("This format's head is one linear map without bias, soft cap or conditions.")
    return bool(head.get("tied"))


def _config_out(parts: Parts, cells: str) -> dict[str, Any]:
    return config_out(xlstm_of(parts), tied=plain_head(parts["head"]), context=trained_context(parts), cells=cells)


def cells_of(parts: Parts, default: str) -> str:
    """Return the layout of the sLSTM cells of a checkpoint that was read, or the one to write."""
    cells: str = parts.get("foreign", {}).get("cells", default)
    return cells


def _format(name: str, title: str, cells: str, recognise: Recognise) -> CheckpointFormat:
    return CheckpointFormat(
        name=name,
        title=title,
        recognise=recognise,
        config_in=_config_in,
        config_out=partial(_config_out, cells=cells),
        table=lambda parts: xlstm_entries(parts, cells=cells_of(parts, cells)),
        canonical=canonical,
        copies=lambda parts: {"lm_head.weight": "token_embedding.weight"} if parts["head"].get("tied") else {},
        files=lambda config, tensors: {"config.yaml": config, "model.pt": tensors},
        files_out=tokenizer_out,
    )


XLSTM_PACKAGE = _format("xlstm", "xLSTMLMModel of the xlstm package (NX-AI)", CELLS, _recognise)
# To be asked for when writing; either reads both.
XLSTM_CUDA = _format("xlstm-cuda", "the same, for its sLSTM cells on a GPU", "cuda", lambda config, names: False)


def from_block_stack(weights: Mapping[str, Tensor], *, vocabulary_size: int = 1) -> XLSTM:
    """Return a backbone with the blocks of an ``xLSTMBlockStack``, which has no embedding: that one is new.

    Args:
        weights: its state dict; a prefix of the names is found.
        vocabulary_size: rows of the embedding.

    Raises:
        InputError: they are no block stack, or one that our blocks cannot be.
    """
    stack = next((name.removesuffix(FIRST) for name in weights if name.endswith(FIRST)), None)
    if stack is None:
        raise InputError(f"These are not the weights of an xLSTMBlockStack: {FIRST} is missing.")
    found = structure({name: tuple(tensor.shape) for name, tensor in weights.items()}, stack)
    network = XLSTM(xlstm_of({"backbone": backbone_in(found, vocabulary_size)}))
    own = to_ours(stack_entries(network.config, stack, cells=found.get("cells", CELLS)), weights.__getitem__)
    own = {name.removeprefix("backbone."): tensor for name, tensor in own.items()}
    network.load_state_dict({"embedding.weight": network.embedding.weight.detach(), **own})
    return network.eval()


def to_block_stack(network: XLSTM, *, cells: str = CELLS) -> dict[str, Tensor]:
    """Return the state dict of an ``xLSTMBlockStack`` with a backbone's blocks.

    Args:
        network: with ``norm_offset``, as ``from_block_stack`` makes it.
        cells: "vanilla" or "cuda", the backend of the sLSTM cells that are to read it.

    Raises:
        ConfigError: blocks that the package has not.
    """
    config_out(network.config, tied=False, context=1, cells=cells)  # refuses them
    own = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    return to_theirs(stack_entries(network.config, "", cells=cells), own)

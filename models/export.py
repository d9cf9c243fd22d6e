"""A model as another package's checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import TransformerConfig, XLSTMConfig, config_from_dict, config_to_dict, from_plain, to_plain
from ..backbones.formats import Checkpoint, CheckpointFormat
from ..backbones.formats.table import Parts, to_theirs
from ..errors import ConfigError, InputError, needs
from ..sequences import replacing, tokenizer_from_dict, tokenizer_to_dict
from .foreign import format_named
from .head import HeadConfig
from .language_model import LanguageModel


def save_as(model: LanguageModel, folder: str | Path, format: str) -> None:
    """Write ``model`` to ``folder`` as a package other than ours reads it; older files go when all are written.

    Raises:
        OutputError: the folder cannot be written; what stood there before is untouched.
        ConfigError: there is no such format, or it cannot hold this model.
    """
    chosen = format_named(format)
    parts = {
        "tokenizer": tokenizer_to_dict(model.tokenizer),
        "backbone": config_to_dict(model.backbone.config),
        "head": to_plain(model.head.config),
        "card": asdict(model.card),
    }
    config = chosen.config_out(parts)
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    entries = chosen.table(parts)
    tensors = to_theirs([entry for entry in entries if entry.own in own], own)
    kind = model.backbone.embedding.weight.dtype  # a module of theirs cast to a dtype casts its buffers
    for name, constant in chosen.constants(parts).items():
        cast = constant.to(kind) if constant.is_floating_point() else constant
        tensors[name] = cast if torch.equal(cast.to(constant.dtype), constant) else constant
    copies = chosen.copies(parts)
    tensors.update({name: tensors[other] for name, other in copies.items()})
    _check(chosen, parts, config, tensors)
    odd = sorted({entry.own for entry in entries} ^ set(own))
    if odd:
        raise ConfigError(f"The format {format} and this model do not both have {', '.join(odd)}.")
    files: dict[str, Any] = {**chosen.files(config, tensors), **chosen.files_out(parts)}
    with ExitStack() as stack:
        # Left in reverse order: the weights take their place first and the configuration last, as in files.save.
        places = {name: stack.enter_context(replacing(Path(folder) / name)) for name in files}
        for name, content in files.items():
            _write(places[name], content, copies)


def _check(chosen: CheckpointFormat, parts: Parts, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Read the checkpoint back before it is written: what a format has no place for would be lost without a word.

    Raises:
        ConfigError: a setting would be read as another.
    """
    with TemporaryDirectory() as folder:
        for name, content in chosen.files_out(parts).items():
            _write(Path(folder) / name, content, {})
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            back = chosen.config_in(Checkpoint(Path(folder), config, shapes, tensors.__getitem__))
        except InputError as error:
            raise ConfigError(f"The format {chosen.name} cannot hold this model: {error.reason}") from None
        except KeyError as error:
            raise ConfigError(f"The format {chosen.name} needs {error.args[0]}, which this model has not.") from None
    wanted, found = _effective(parts), _effective(back)
    lost = [
        f"{name} is {value!r} and would become {found[name]!r}"
        for name, value in wanted.items()
        if value != found[name]
    ]
    if lost:
        raise ConfigError(f"The format {chosen.name} cannot hold this model: {'; '.join(lost)}.")


def _effective(parts: Parts) -> dict[str, Any]:
    """What a model computes with, None and defaults resolved; what only training uses is left out."""
    config, head = config_from_dict(parts["backbone"]), from_plain(HeadConfig, parts["head"], what="head")
    plain = config_to_dict(config)
    if isinstance(config, TransformerConfig):
        norms = ("norm", "post_blocks_norm") if config.norm == "layer" else ()  # an RMSNorm never has a bias
        for part in ("attention", "feed_forward", *norms):
            plain[f"{part}_bias"] = config.has_bias(part)
        sizes = {"key_value_heads": config.kv_heads, "head_width": config.head_dim, "feed_forward_width": config.inner}
        plain |= {"bias": None, **sizes}
        # Exact frequencies stay exact in our own format alone; nobody else writes them down or computes in float64.
        plain["rotary_precision"] = config.rotary_precision or "float32"
        if not config.rotates:
            plain |= {"rotary_base": None, "rotary_precision": None}
    if isinstance(config, XLSTMConfig):
        plain |= _effective_xlstm(config)
    plain["dropout"] = None
    end = asdict(head) | {"tied": head.is_tied, "bias": head.has_bias}
    if head.kind == "linear":
        end |= {"norm_eps": None, "activation": None}
    tokens = tokenizer_from_dict(parts["tokenizer"]).vocabulary.tokens
    return {**plain, **{f"head.{name}": value for name, value in end.items()}, "vocabulary": tokens}


def _effective_xlstm(config: XLSTMConfig) -> dict[str, Any]:
    """What the blocks of an xLSTM compute with; None for what none of them has."""
    kinds = set(config.kinds)
    capped, plain, cell = (kind in kinds for kind in ("mlstm-7b", "mlstm", "slstm"))
    inner = [config.inner_width(i) for i, kind in enumerate(config.kinds) if kind == "mlstm"]
    feed_forward = [config.swiglu_width if capped else None, config.gelu_width if cell else None]
    return {
        "blocks": config.kinds,
        "expansion": inner,
        "feed_forward_width": feed_forward,
        "norm_eps": [config.eps(kind) for kind in sorted(kinds)],
        "convolution": config.convolution if plain or cell else None,
        "projection_block": config.projection_block if plain else None,
        "bias": config.bias if plain or capped else None,
        "rotary": config.rotary if plain else None,
        "rotary_base": config.rotary_base if plain and config.rotary is not None else None,
        "qk_factor": config.qk_width if capped else None,
        "gate_cap": config.gate_cap if capped else None,
    }


def _write(path: Path, content: Any, copies: dict[str, str]) -> None:
    suffix = path.suffix
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    elif suffix == ".yaml":
        with needs("hub"):
            import yaml  # comes with huggingface_hub
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    elif suffix == ".safetensors":
        save_file({name: part for name, part in content.items() if name not in copies}, path, metadata={"format": "pt"})
    else:
        torch.save(_alone(content), path)


def _alone(content: Any) -> Any:
    """Each tensor in memory of its own, as ``torch.save`` writes all the memory that a tensor is part of."""
    if isinstance(content, Tensor):
        return content if content.untyped_storage().nbytes() == content.nbytes else content.clone()
    return {name: _alone(part) for name, part in content.items()} if isinstance(content, dict) else content

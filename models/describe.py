"""What a model is, in words and numbers, from its configuration and the headers of its files: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backbones import AnyConfig, TransformerConfig, XLSTMConfig, config_from_dict, from_plain
from ..errors import ConfigError, InputError
from ..sequences import Tokenizer, check_file, tokenizer_from_dict
from .card import ModelCard
from .files import CONFIG, KIND, WEIGHTS, read_config
from .foreign import foreign_parts, read_settings
from .head import HeadConfig
from .hub import cached, hub_name, licence, whole
from .language_model import LanguageModel
from .published import FAIR_ESM, LICENCES, downloaded, published_parts
from .weights import open_weights

BLOCKS = {"mlstm": "mLSTM", "slstm": "sLSTM", "mlstm-7b": "mLSTM of the 7B kind"}
READING = {
    "causal": "causal",
    "alternating": "in alternating directions",
    "bidirectional": "both ways in each cell",
    "tied": "both ways in each block",
}
NORMS = {"rms": "RMSNorm", "layer": "LayerNorm"}
PLACEMENTS = {"pre": "before each branch", "post": "after each branch", "deep": "as in DeepNorm"}
POSITIONS = {
    "rotary": "rotary positions",
    "rotary-interleaved": "interleaved rotary positions",
    "rotary-2d": "2D rotary positions",
    "absolute": "learned positions",
    "none": "no positions",
}
UNKNOWN = "not stated"


class StateBytes(NamedTuple):
    """Memory that a model keeps of a sequence between two calls.

    Attributes:
        sequence: bytes, whatever the length.
        token: bytes for each token seen.
        tokens: the most tokens that are kept; None: all.
    """

    sequence: int
    token: int
    tokens: int | None = None


@dataclass(frozen=True)
class Description:
    """A model described.

    Attributes:
        name: what it is called.
        format: "processive", or another package's by name.
        architecture: backbone and head in words.
        parameters: how many; None where the vocabulary is not known before training.
        context: how long a sequence may be; "" where the model reads none.
        state: memory of a sequence at float32 and with bfloat16 activations; None where the model keeps none.
        tokenizer: its name and the number of its tokens.
        licence: of the weights.
        source: where they come from.
        description: what the model is for.
    """

    name: str
    format: str
    architecture: str
    parameters: int | None
    context: str
    state: tuple[StateBytes, StateBytes] | None
    tokenizer: str
    licence: str = ""
    source: str = ""
    description: str = ""

    def table(self) -> dict[str, str]:
        """Return label -> text, for people; what is not known is left out, but for the licence."""
        rows = {
            "name": self.name,
            "description": self.description,
            "format": self.format,
            "architecture": self.architecture,
            "parameters": "" if self.parameters is None else _parameters(self.parameters),
            "context": self.context,
            "memory per sequence": _memory(self.state) if self.context else "",
            "tokenizer": self.tokenizer,
            "licence": self.licence or UNKNOWN,
            "source": self.source,
        }
        return {label: text for label, text in rows.items() if text}


def describe(path: str | Path) -> Description:
    """Describe a model: a folder, a file of weights, ``hf://owner/name`` in the cache, or a name of fair-esm's.

    Raises:
        InputError: there is no such model here, or it is of no known format.
    """
    named = hub_name(path)
    if named is not None:
        snapshot = cached(named)
        if snapshot is None or not whole(snapshot.path / named.folder):
            hint = f"pv.load('{named}') fetches it."
            raise InputError(f"{named} is not in the cache, and a description fetches nothing.", hint=hint)
        place, name = snapshot.path / named.folder, named.repository.rpartition("/")[2]
        terms = licence(place) or licence(snapshot.path)
        return _of_place(place, name=name, source=str(named.at(snapshot.name.revision)), terms=terms)
    if str(path) in FAIR_ESM and not Path(path).exists():
        file, terms = downloaded(str(path)), LICENCES[str(path)]
        if file is not None:
            return _of_place(file, name=str(path), source="fair-esm", terms=terms)
        parts = published_parts(str(path))
        source = "fair-esm; not downloaded yet"
        return of_parts(parts, name=str(path), format="fair-esm", source=source, licence=terms)
    if not Path(path).exists():
        hint = "Name a folder, a file of weights, hf://owner/name, a name of fair-esm's or a recipe."
        raise InputError("There is no such model.", path=path, hint=hint)
    return _of_place(Path(path), name=Path(path).resolve().stem if Path(path).is_file() else Path(path).resolve().name)


def of_parts(
    parts: Mapping[str, Any],
    *,
    name: str,
    format: str,
    parameters: int | None = None,
    source: str = "",
    licence: str = "",
) -> Description:
    """Describe what the dicts of a ``config.json`` mean; without ``parameters`` they are counted.

    Raises:
        ConfigError: a value is unknown or wrong.
    """
    card = from_plain(ModelCard, parts.get("card", {}), what="card")
    described = of_backbone(
        config_from_dict(parts["backbone"]),
        from_plain(HeadConfig, parts["head"], what="head"),
        tokenizer_from_dict(parts["tokenizer"]),
        name=name,
        format=format,
        parameters=parameters,
    )
    return replace(
        described,
        context=described.context + _trained(card.recipe),
        licence=card.licence or licence,
        source=card.source or source,
        description=card.description,
    )


def of_backbone(
    backbone: AnyConfig,
    head: HeadConfig,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    format: str,
    parameters: int | None = None,
) -> Description:
    """Describe a backbone, a head and a tokenizer; None: it is made from the training data. Parameters are counted."""
    if tokenizer is None:
        words = "made from the training data"
    else:
        if parameters is None:
            with torch.device("meta"):
                parameters = LanguageModel(tokenizer, backbone, head).parameters_count
        tokens, rows = len(tokenizer.vocabulary), backbone.vocabulary_size
        padded = f", {rows:,} rows in the embedding" if rows != tokens else ""
        words = f"{tokenizer.name}, {tokens:,} tokens{padded}"
    return Description(
        name=name,
        format=format,
        architecture=f"{backbone_in_words(backbone)}; {head_in_words(head)}",
        parameters=parameters,
        context=context_in_words(backbone),
        state=(state_bytes(backbone, 4), state_bytes(backbone, 2)) if backbone.streams else None,
        tokenizer=words,
    )


def _of_place(path: Path, *, name: str, source: str = "", terms: str = "") -> Description:
    """Describe a folder or a file of weights."""
    settings = read_settings(path) if path.is_dir() else {}
    if {"format", "kind"} <= settings.keys():
        return _of_own(path, settings, source=source, terms=terms)
    chosen, parts, parameters = foreign_parts(path)
    terms = terms or (licence(path) if path.is_dir() else "")
    return of_parts(
        parts, name=name, format=f"{chosen.name} ({chosen.title})", parameters=parameters, source=source, licence=terms
    )


def _of_own(folder: Path, settings: Mapping[str, Any], *, source: str, terms: str) -> Description:
    with open_weights([check_file(folder / WEIGHTS)]) as weights:
        parameters = sum(map(prod, weights.shapes.values()))
    if settings["kind"] == KIND:
        config = read_config(folder / CONFIG)
        try:
            return of_parts(
                config, name=config["name"], format="processive", parameters=parameters, source=source, licence=terms
            )
        except ConfigError as error:
            raise InputError(str(error), path=folder / CONFIG) from None
    told = settings.get("card")
    card: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    return Description(
        name=str(settings.get("name", folder.name)),
        format="processive",
        architecture=str(settings["kind"]).replace("-", " "),
        parameters=parameters,
        context="",
        state=None,
        tokenizer="",
        licence=str(card.get("licence", "")) or terms,
        source=str(card.get("source", "")) or source,
        description=str(card.get("description", "")),
    )


def backbone_in_words(config: AnyConfig) -> str:
    """Return the network of a configuration as a phrase."""
    words = _xlstm_in_words(config) if isinstance(config, XLSTMConfig) else _transformer_in_words(config)
    if config.complement is not None:
        words.append("one set of parameters for both strands")
    return ", ".join(words)


def _xlstm_in_words(config: XLSTMConfig) -> list[str]:
    kinds = Counter(config.kinds)
    blocks = " and ".join(f"{count} {BLOCKS[kind]}" for kind, count in kinds.items())
    plural = "s" if config.depth > 1 else ""
    words = [f"xLSTM, {READING[config.direction]}", f"width {config.width:,}", f"{blocks} block{plural}"]
    words.append(f"{config.heads} heads")
    if "mlstm" in kinds:
        inner = sorted({config.inner_width(i) for i, kind in enumerate(config.kinds) if kind == "mlstm"})
        words.append(f"inner width {' to '.join(f'{width:,}' for width in {inner[0]: 0, inner[-1]: 0})}")
    if config.rotary is not None and "mlstm" in kinds:
        words.append("rotary positions")
    if config.positions is not None:
        words.append(f"{config.positions} positions")
    return words


def _transformer_in_words(config: TransformerConfig) -> list[str]:
    heads = f"{config.heads} heads of {config.head_dim}"
    if config.kv_heads != config.heads:
        heads += f" ({config.kv_heads} of keys and values)"
    words = [
        f"transformer, {config.direction}" if config.direction != "prefix" else "transformer, causal behind a prefix",
        f"width {config.width:,}",
        f"{config.depth} blocks",
        heads,
        f"{NORMS[config.norm]} {PLACEMENTS[config.norm_placement]}",
        f"{config.activation} feed-forward of {config.inner:,}",
        POSITIONS[config.positions],
    ]
    if config.qk_norm is not None:
        words.append("norms of q and k")
    if config.cross_width is not None:
        words.append(f"cross-attention to width {config.cross_width:,}")
    return words


def head_in_words(config: HeadConfig) -> str:
    """Return a head as a phrase."""
    words = ["head with a dense layer" if config.kind == "esm" else "linear head"]
    words.append("tied to the embedding" if config.is_tied else "untied")
    words += ["with contacts"] if config.contacts else []
    words += [f"conditions {', '.join(f'{name} ({count})' for name, count in config.conditions)}"] * bool(
        config.conditions
    )
    return ", ".join(words)


def context_in_words(config: AnyConfig) -> str:
    """Return how long a sequence may be."""
    if isinstance(config, TransformerConfig):
        if config.positions == "absolute" and config.max_positions is not None:
            return f"{config.max_positions - config.position_offset:,} tokens, the rows of its positions"
        if config.window is not None:
            return f"no fixed limit; a token sees {config.window:,} tokens" + (
                "" if config.streams else " on each side"
            )
    return "no fixed limit"


def _trained(recipe: Mapping[str, Any]) -> str:
    """How long the sequences of the training were, where a card says so."""
    training = recipe.get("training")
    length = recipe.get("context") or (training.get("max_length") if isinstance(training, Mapping) else None)
    return f"; trained on up to {length:,} tokens" if isinstance(length, int) else ""


def state_bytes(config: AnyConfig, itemsize: int) -> StateBytes:
    """Return the memory of a sequence's state with activations of ``itemsize`` bytes; cells are float32 in any case."""
    if isinstance(config, TransformerConfig):
        token = 2 * config.kv_heads * config.head_dim * config.depth * itemsize
        return StateBytes(0, token, None if config.window is None else config.window - 1)
    cells = convolved = 0
    for i, kind in enumerate(config.kinds):
        if kind == "slstm":
            cells += 4 * config.width
            convolved += (config.convolution - 1) * config.width
            continue
        qk, v = (config.qk_width, config.width) if kind == "mlstm-7b" else (config.inner_width(i),) * 2
        cells += qk * (v // config.heads) + qk + config.heads
        convolved += (config.convolution - 1) * v if kind == "mlstm" else 0
    return StateBytes(4 * cells + itemsize * convolved, 0)


def _parameters(count: int) -> str:
    return f"{count:,} ({in_bytes(4 * count)} in float32, {in_bytes(2 * count)} in bf16)"


def _memory(state: tuple[StateBytes, StateBytes] | None) -> str:
    if state is None:
        return "none is kept: a sequence is read at once"
    full, half = state
    if full.token:
        most = f" for the last {full.tokens:,} tokens" if full.tokens is not None else ""
        return f"{in_bytes(full.token)} per token in float32, {in_bytes(half.token)} in bf16 (keys and values){most}"
    return f"{in_bytes(full.sequence)} in float32, {in_bytes(half.sequence)} in bf16, for any length (state)"


def in_bytes(count: int) -> str:
    """Return a number of bytes with a unit."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} B"

"""The tensors of the xlstm package (NX-AI, 2024) and of the code that grew from it (Prot-, DNA-, Chem-xLSTM).

What a tensor's name or layout does not say, in four places:

* Every norm weight is stored minus one: the effective weight is ``1 + weight``. Ours is stored alike (``norm_offset``).
* The gates of the sLSTM block are swapped in name: ``fgate`` feeds the input gate and ``igate`` the forget gate.
* ``_recurrent_kernel_`` is [heads, gate and out, in] in the package's "vanilla" cells and [heads, in, gate and out] in
  its "cuda" cells; ``_bias_`` is gate by gate in the first and head by head in the second, in the same shape. So the
  shape of the kernel says how the bias lies.
* The cells scale k, not q, by 1 / sqrt(head_dim). The output is the same; a state differs by that factor.

Structure is read from the shapes, so that no rule of rounding (inner width, feed-forward) is applied twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...errors import ConfigError, InputError
from ..configuration import config_from_dict
from ..layers import round_up
from ..xlstm_config import XLSTMConfig
from .table import STACKED, Entry, Join, Parts, entries, reshaped, rows

Shapes = Mapping[str, tuple[int, ...]]
ROUNDING = 64  # our inner width of an mLSTM block is a multiple of it
STACK = "xlstm_block_stack."
MLSTM: dict[str, str | tuple[str, ...]] = {
    "norm.weight": "xlstm_norm.weight",
    "up.weight": "xlstm.proj_up.weight",
    "convolution.weight": "xlstm.conv1d.conv.weight",
    "convolution.bias": "xlstm.conv1d.conv.bias",
    "query_key.weight": ("xlstm.q_proj.weight", "xlstm.k_proj.weight"),
    "value.weight": "xlstm.v_proj.weight",
    "gates.*": ("xlstm.mlstm_cell.igate.*", "xlstm.mlstm_cell.fgate.*"),
    "head_norm.weight": "xlstm.mlstm_cell.outnorm.weight",
    "skip": "xlstm.learnable_skip",
    "down.weight": "xlstm.proj_down.weight",
}
MLSTM_BIASES: dict[str, str | tuple[str, ...]] = {
    "up.bias": "xlstm.proj_up.bias",
    "query_key.bias": ("xlstm.q_proj.bias", "xlstm.k_proj.bias"),
    "value.bias": "xlstm.v_proj.bias",
    "down.bias": "xlstm.proj_down.bias",
}
SLSTM: dict[str, str | tuple[str, ...]] = {
    "norm.weight": "xlstm_norm.weight",
    "convolution.weight": "xlstm.conv1d.conv.weight",
    "convolution.bias": "xlstm.conv1d.conv.bias",
    "input_forget.weight": ("xlstm.fgate.weight", "xlstm.igate.weight"),  # as swapped
    "cell_output.weight": ("xlstm.zgate.weight", "xlstm.ogate.weight"),
    "recurrent": "xlstm.slstm_cell._recurrent_kernel_",
    "bias": "xlstm.slstm_cell._bias_",
    "head_norm.weight": "xlstm.group_norm.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "feed_forward.up.weight": "ffn.proj_up.weight",
    "feed_forward.down.weight": "ffn.proj_down.weight",
}
TABLES = {"mlstm": MLSTM, "slstm": SLSTM}
ENDS = {"backbone.embedding.weight": "token_embedding.weight", "head.weight": "lm_head.weight"}
SHARED_ENDS = {
    "backbone.embedding.weight": "token_embedding.embedding.weight",
    "head.weight": "lm_head.lm_head.weight",
}


def canonical(name: str) -> str:
    """Return the name of a tensor in an ``xLSTMLMModel``, which may stand inside other modules."""
    found = re.search(r"(^|\.)((xlstm_block_stack|token_embedding|lm_head)\..*)", name)
    return found[2] if found else name


def has_stack(names: Collection[str]) -> bool:
    """Return whether these are the names of a model with a stack of xLSTM blocks, as they stand in its files."""
    return any(re.search(r"(^|\.)xlstm_block_stack\.blocks\.0\.xlstm_norm\.", name) for name in names)


def structure(shapes: Shapes, stack: str) -> dict[str, Any]:
    """Return what the shapes say of the blocks, in the words of an ``XLSTMConfig``.

    Raises:
        InputError: blocks that differ where ours cannot, or a tensor that every block has is missing.
    """
    wrap = ".submodule" if f"{stack}blocks.0.xlstm_norm.submodule.weight" in shapes else ""
    kinds: list[str] = []
    seen: dict[str, list[Any]] = {}
    while (norm := f"{stack}blocks.{len(kinds)}.xlstm_norm{wrap}.weight") in shapes:
        block = norm.removesuffix(f"xlstm_norm{wrap}.weight")
        cell = f"{block}xlstm{wrap}."
        kinds.append("slstm" if f"{cell}slstm_cell._recurrent_kernel_" in shapes else "mlstm")
        describe = _slstm if kinds[-1] == "slstm" else _mlstm
        for key, value in describe(shapes, block, cell, wrap):
            seen.setdefault(key, []).append(value)
    for key, found in seen.items():
        if len(set(found)) > 1:
            raise InputError(f"Blocks with unequal {key} ({found}) cannot be one backbone.")
    return {
        **{key: found[0] for key, found in seen.items()},
        "width": shapes[f"{stack}blocks.0.xlstm_norm{wrap}.weight"][0],
        "depth": len(kinds),
        "blocks": kinds[0] if len(set(kinds)) == 1 else kinds,
        "post_blocks_norm": f"{stack}post_blocks_norm{wrap}.weight" in shapes,
    }


def _mlstm(shapes: Shapes, block: str, cell: str, wrap: str) -> Iterator[tuple[str, Any]]:
    yield "heads", _shape(shapes, f"{cell}mlstm_cell.igate.weight")[0]
    yield "convolution", _shape(shapes, f"{cell}conv1d.conv.weight")[2]
    yield "projection_block", _shape(shapes, f"{cell}q_proj.weight")[1]
    yield "bias", f"{cell}proj_up.bias" in shapes
    yield "inner", _shape(shapes, f"{cell}proj_down.weight")[1]


def _slstm(shapes: Shapes, block: str, cell: str, wrap: str) -> Iterator[tuple[str, Any]]:
    if f"{cell}conv1d.conv.weight" not in shapes:
        raise InputError(f"{block}xlstm has no convolution (conv1d_kernel_size 0); our sLSTM block has one.")
    if f"{block}ffn{wrap}.proj_up.bias" in shapes:
        raise InputError(f"{block}ffn has biases; ours has none.")
    for name in (f"{cell}group_norm.weight", f"{block}ffn_norm{wrap}.weight"):
        _shape(shapes, name)
    heads, second, third = _shape(shapes, f"{cell}slstm_cell._recurrent_kernel_")
    yield "heads", heads
    yield "convolution", _shape(shapes, f"{cell}conv1d.conv.weight")[2]
    yield "feed_forward_width", _shape(shapes, f"{block}ffn{wrap}.proj_down.weight")[1]
    if second == 4 * third:
        yield "cells", "vanilla"
    elif third == 4 * second:
        yield "cells", "cuda"
    else:
        raise InputError(
            f"{cell}slstm_cell._recurrent_kernel_ has shape {[heads, second, third]}, which is no sLSTM's."
        )


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"The weights have no {name}.")
    return shapes[name]


def expansion_of(inner: int | None, width: int, told: float | int) -> float | int:
    """Return the ``expansion`` that gives an inner width: ``told`` where it does, or where there is no such width.

    Raises:
        InputError: no expansion gives it, because ours are multiples of 64.
    """
    if inner is None:
        return told
    if inner % ROUNDING:
        raise InputError(f"The inner width {inner} is no multiple of {ROUNDING}, as ours are.")
    candidates = (told, inner / width, (inner - 1) / width)  # the last where the quotient rounds up
    return next(factor for factor in candidates if round_up(factor * width, ROUNDING) == inner)


def gelu_width(structure: Mapping[str, Any]) -> int | None:
    """Return the feed-forward width for an ``XLSTMConfig``: None where it follows from the published rule."""
    width: int | None = structure.get("feed_forward_width")
    return None if width in (None, round_up(1.3 * structure["width"], ROUNDING)) else width


def xlstm_entries(parts: Parts, *, cells: str) -> list[Entry]:
    """Return the table of a model; ``cells`` is the layout of their sLSTM cells, "vanilla" or "cuda"."""
    config = xlstm_of(parts)
    ends = dict(ENDS if config.complement is None else SHARED_ENDS)
    if parts["head"].get("tied"):
        del ends["head.weight"]
    return entries(ends) + stack_entries(config, STACK, cells=cells)


def stack_entries(config: XLSTMConfig, stack: str, *, cells: str) -> list[Entry]:
    """Return the entries of the blocks and the norm behind them; ``stack`` is what their names begin with."""
    wrapped = config.complement is not None
    heads, head_dim, block = config.heads, config.width // config.heads, config.projection_block
    recurrent, cell_bias = cell_layout(cells, heads, head_dim)
    joins = {
        "convolution.weight": reshaped((-1, config.convolution), (-1, 1, config.convolution)),
        "query_key.weight": STACKED,
        "value.weight": STACKED,
        "query_key.bias": stacked((-1, block)),
        "value.bias": stacked((-1, block)),
        "gates.*": rows(heads, heads),
        "head_norm.weight": reshaped((heads, -1), (-1,)),
        "input_forget.weight": STACKED,
        "cell_output.weight": STACKED,
        "recurrent": recurrent,
        "bias": cell_bias,
    }
    found = []
    for i, kind in enumerate(config.kinds):
        if kind not in TABLES:
            raise ConfigError(f"The format has blocks mlstm and slstm, not {kind}.")
        table = TABLES[kind] | (MLSTM_BIASES if config.bias and kind == "mlstm" else {})
        own = f"backbone.blocks.{i}."
        found += entries(
            {f"{own}{name}": _names(f"{stack}blocks.{i}.", theirs, wrapped) for name, theirs in table.items()},
            joins={f"{own}{name}": join for name, join in joins.items()},
        )
    if config.positions is not None:
        found += entries({"backbone.position_scale": f"{stack}absolute_pos_embeds.scale"})
    if config.post_blocks_norm:
        found += entries({"backbone.norm.weight": _names(stack, "post_blocks_norm.weight", wrapped)})
    return found


def _names(prefix: str, names: str | tuple[str, ...], wrapped: bool) -> tuple[str, ...]:
    """Names of theirs; where both strands share parameters, each part of a block stands in a wrapper."""
    found = (names,) if isinstance(names, str) else names
    return tuple(prefix + (name.replace(".", ".submodule.", 1) if wrapped else name) for name in found)


def cell_layout(cells: str, heads: int, head_dim: int) -> tuple[Join, Join]:
    """Return how the recurrent weight [gate, head, out, in] and bias [gate, head, out] lie in sLSTM cells of theirs.

    Raises:
        ConfigError: no such layout.
    """
    if cells == "vanilla":
        return (
            permuted((heads, 4, head_dim, head_dim), (1, 0, 2, 3), (heads, 4 * head_dim, head_dim)),
            reshaped((4, heads, head_dim), (-1,)),
        )
    if cells == "cuda":
        return (
            permuted((heads, head_dim, 4, head_dim), (2, 0, 3, 1), (heads, head_dim, 4 * head_dim)),
            permuted((heads, 4, head_dim), (1, 0, 2), (-1,)),
        )
    raise ConfigError(f"sLSTM cells are laid out as 'vanilla' or 'cuda', not {cells!r}.")


def permuted(theirs: tuple[int, ...], order: tuple[int, ...], flat: tuple[int, ...]) -> Join:
    """Join one tensor: theirs, ``flat``, has the axes ``theirs``, and ours has those in ``order``."""
    back = [order.index(axis) for axis in range(len(order))]
    return Join(
        lambda parts: parts[0].reshape(*theirs).permute(*order),
        lambda own: (own.permute(*back).reshape(*flat),),
    )


def stacked(own: tuple[int, ...]) -> Join:
    """Join vectors of theirs on a new first axis, each of shape ``own``."""
    return Join(
        lambda theirs: torch.stack([part.reshape(*own) for part in theirs]),
        lambda tensor: [part.flatten() for part in tensor.unbind()],
    )


def xlstm_of(parts: Parts) -> XLSTMConfig:
    """Return the configuration of an xLSTM.

    Raises:
        ConfigError: the backbone is of another family.
    """
    config = config_from_dict(parts["backbone"])
    if not isinstance(config, XLSTMConfig):
        raise ConfigError(f"This format holds xLSTMs, and the backbone is a {config.family}.")
    return config

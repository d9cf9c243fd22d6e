"""Generation: a token at a time for many sequences at once, the backbone's state carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import BackboneState
from ..errors import ConfigError, InputError
from ..models import LanguageModel
from ..sequences import PackedBatch
from .batches import conditioned, evaluating
from .sampling import check_sampling, draw, filtered, uniforms

CROWDED = 0.875  # finished sequences are dropped when fewer than this share of the batch still runs


def generate(
    model: LanguageModel,
    count: int | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
    max_length: int = 512,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    conditions: Mapping[str, int] | None = None,
    progress: bool = False,
) -> list[str]:
    """Sample sequences from a causal model.

    A sequence ends with the end token, at a ``stop`` token or after ``max_length`` new tokens. Special tokens other
    than the end are never sampled. Each draw is a function of ``seed``, the number of the sequence and the step, so the
    result depends on ``batch_size`` only where rounding moves a probability across a draw (about one token in 10^5).
    An xLSTM's memory stays the same however long a sequence becomes.

    Args:
        model: a causal model.
        count: sequences for each prompt; 1 if not given.
        prompts: beginnings to continue, one or several; without any, sequences start from the begin token.
        temperature: below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest likeliest tokens whose probabilities sum to at least p.
        min_p: sample from tokens at least this share as likely as the likeliest.
        max_length: most new tokens of a sequence; one that reaches it is returned as far as it came.
        stop: tokens of the vocabulary that end a sequence and are not part of it.
        seed: of the draws.
        batch_size: sequences that run at once.
        conditions: ids of conditions that the head of the model knows, for all sequences, such as ``{"species": 3}``.
        progress: show a progress bar.

    Returns:
        the decoded sequences, prompts included: all of the first prompt, then all of the second, and so on.

    Raises:
        ConfigError: the model is not causal, an option cannot work, or the head knows no such condition.
        InputError: a prompt cannot be encoded, or a condition has no such id.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    if not model.causal:
        raise ConfigError("Only a causal model generates; this one is bidirectional.")
    for name, value in (
        ("count", 1 if count is None else count),
        ("max_length", max_length),
        ("batch_size", batch_size),
    ):
        if value < (0 if name == "count" else 1):
            raise ConfigError(f"{name} is {value}, and that is too few.")
    starts = [start for start in _starts(model, prompts) for _ in range(1 if count is None else count)]
    ends = np.isin(np.arange(len(model.vocabulary)), _ends(model, stop))
    forbidden = _forbidden(model)
    results: list[str] = []
    with evaluating(model), tqdm(total=len(starts), disable=not progress, desc="generating", unit=" sequences") as bar:
        for first in range(0, len(starts), batch_size):
            group = starts[first : first + batch_size]
            running = np.arange(first, first + len(group))  # number of each sequence in the batch
            written: list[list[int]] = [[] for _ in group]
            alive = np.ones(len(group), bool)
            logits, state = _prefill(model, group, conditions)
            for step in range(max_length):
                logits = logits.float().masked_fill(forbidden, -torch.inf)
                chances = filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
                numbers = torch.from_numpy(uniforms(seed, running, step)).to(model.device)
                tokens = draw(chances, numbers)
                drawn = tokens.cpu().numpy()
                ending = alive & ends[drawn]
                alive &= ~ending
                for row in np.flatnonzero(alive):
                    written[running[row] - first].append(int(drawn[row]))
                bar.update(int(ending.sum()))
                if not alive.any() or step + 1 == max_length:
                    break
                if alive.mean() < CROWDED:
                    kept = torch.from_numpy(np.flatnonzero(alive)).to(model.device)
                    state, tokens = state.select(kept), tokens[kept]
                    running, alive = running[alive], alive[alive]
                batch = conditioned(model, PackedBatch.one_each(tokens, positions=state.lengths), conditions)
                hidden, state = model.backbone(batch, state, return_state=True, reuse_state=True)
                logits = model.logits(hidden, batch)
            bar.update(int(alive.sum()))
            results += [model.tokenizer.decode([*start, *new]) for start, new in zip(group, written, strict=True)]
    return results


def _starts(model: LanguageModel, prompts: str | Sequence[str] | None) -> list[tuple[int, ...]]:
    """Token ids of each beginning, without an end token."""
    if prompts is None:
        return [(model.vocabulary.require("bos"),)]
    end = model.vocabulary.role("eos")
    starts = []
    for number, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts, 1):
        try:
            ids = [int(i) for i in model.tokenizer.encode(prompt)]
        except InputError as error:
            raise error.at(name=f"prompt {number}") from None
        start = tuple(ids[:-1] if ids and ids[-1] == end else ids)
        if not start:
            raise InputError("There is nothing to continue.", name=f"prompt {number}")
        starts.append(start)
    return starts


def _ends(model: LanguageModel, stop: str | Sequence[str] | None) -> list[int]:
    """Ids of the tokens that end a sequence."""
    tokens = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    unknown = [token for token in tokens if token not in model.vocabulary.ids]
    if unknown:
        raise ConfigError(f"stop names tokens of the vocabulary, and {unknown[0]!r} is none.")
    end = model.vocabulary.role("eos")
    return [model.vocabulary.ids[token] for token in tokens] + ([] if end is None else [end])


def _forbidden(model: LanguageModel) -> Tensor:
    """Tokens that are never sampled: every special one but the end."""
    special = model.vocabulary.special_ids - {model.vocabulary.role("eos")}
    return torch.tensor([i in special for i in range(len(model.vocabulary))], device=model.device)


def _prefill(
    model: LanguageModel, starts: Sequence[tuple[int, ...]], conditions: Mapping[str, int] | None
) -> tuple[Tensor, BackboneState]:
    """Read the beginnings, equal ones once; return the logits after each of them and the state."""
    unique = list(dict.fromkeys(starts))
    batch = conditioned(model, PackedBatch.from_sequences(unique, device=model.device), conditions)
    hidden, state = model.backbone(batch, return_state=True)
    numbers = {start: number for number, start in enumerate(unique)}
    copies = torch.tensor([numbers[start] for start in starts], device=model.device)
    return model.logits(hidden, batch, batch.cu_seqlens[1:] - 1)[copies], state.select(copies)

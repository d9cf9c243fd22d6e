"""Generation: a token at a time for many sequences at once, the backbone's state carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..backbones import BackboneState
from ..errors import ConfigError
from ..models import LanguageModel
from ..sequences import PackedBatch
from .batches import conditioned, evaluating, laid_out
from .sampling import check_sampling, draw, filtered, uniforms
from .starts import Start, ends_of, require_writing, starts_of

CROWDED = 0.875  # finished sequences are dropped when fewer than this share of the batch still runs


def generate(
    model: LanguageModel,
    count: int | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    suffixes: str | Sequence[str] | None = None,
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
    """Sample sequences from a causal model, or from one that reads a prefix (GLM, xTrimoPGLM).

    A sequence ends with the end token, at a ``stop`` token or after ``max_length`` new tokens. Special tokens other
    than the end are never sampled. Each draw is a function of ``seed``, the number of the sequence and the step, so the
    result depends on ``batch_size`` only where rounding moves a probability across a draw (about one token in 10^5).
    An xLSTM's memory stays the same however long a sequence becomes.

    A model that reads a prefix sees a prompt, ``<gmask>`` and its end token both ways and writes behind ``<sop>`` until
    ``<eop>``, with the positions of its training (``sequences.blanked``). With a suffix it sees ``<smask>`` between
    prompt and suffix, and fills in what it puts there.

    Args:
        model: a causal model, or one that reads a prefix.
        count: sequences for each prompt; 1 if not given.
        prompts: beginnings to continue, one or several; without any, sequences start from the begin token.
        suffixes: for a model that reads a prefix, what is to follow what it writes: one for all prompts, or one each.
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
        the decoded sequences, prompts and suffixes included: all of the first prompt, then all of the second, ...

    Raises:
        ConfigError: the model is bidirectional, or causal and there is a suffix; it reads a prefix and lacks the tokens
            for blanks; an option cannot work, or the head knows no such condition.
        InputError: a prompt or a suffix cannot be encoded, or a condition has no such id.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    require_writing(model)
    for name, value in (
        ("count", 1 if count is None else count),
        ("max_length", max_length),
        ("batch_size", batch_size),
    ):
        if value < (0 if name == "count" else 1):
            raise ConfigError(f"{name} is {value}, and that is too few.")
    starts = [start for start in starts_of(model, prompts, suffixes) for _ in range(1 if count is None else count)]
    ends = np.isin(np.arange(len(model.vocabulary)), ends_of(model, stop))
    forbidden = _forbidden(model)
    results: list[str] = []
    with evaluating(model), tqdm(total=len(starts), disable=not progress, desc="generating", unit=" sequences") as bar:
        for first in range(0, len(starts), batch_size):
            group = starts[first : first + batch_size]
            running = np.arange(first, first + len(group))  # number of each sequence in the batch
            written: list[list[int]] = [[] for _ in group]
            alive = np.ones(len(group), bool)
            logits, state, places = _prefill(model, group, conditions)
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
                    places = places[:, kept]
                    running, alive = running[alive], alive[alive]
                places = places + 1
                batch = PackedBatch.one_each(tokens, positions=places[0], block_positions=places[1])
                batch = conditioned(model, batch, conditions)
                hidden, state = model.backbone(batch, state, return_state=True, reuse_state=True)
                logits = model.logits(hidden, batch)
            bar.update(int(alive.sum()))
            for start, new in zip(group, written, strict=True):
                results.append(model.tokenizer.decode([*start.before.tolist(), *new, *start.after.tolist()]))
    return results


def _forbidden(model: LanguageModel) -> Tensor:
    """Tokens that are never sampled: every special one but the end."""
    special = model.vocabulary.special_ids - set(ends_of(model, None))
    return torch.tensor([i in special for i in range(len(model.vocabulary))], device=model.device)


def _prefill(
    model: LanguageModel, starts: Sequence[Start], conditions: Mapping[str, int] | None
) -> tuple[Float[Tensor, "sequences vocabulary"], BackboneState, Int[Tensor, "2 sequences"]]:
    """Read the beginnings, equal ones once.

    Return the logits after each of them, the state, and of the last tokens the position and that in their blank.
    """
    unique = {start.read.tokens.tobytes(): start.read for start in starts}
    batch = conditioned(model, laid_out(model, list(unique.values())), conditions)
    hidden, state = model.backbone(batch, return_state=True)
    assert batch.block_positions is not None
    numbers = {key: number for number, key in enumerate(unique)}
    copies = torch.tensor([numbers[start.read.tokens.tobytes()] for start in starts], device=model.device)
    last = batch.cu_seqlens[1:] - 1
    places = torch.stack((batch.positions[last], batch.block_positions[last]))
    return model.logits(hidden, batch, last)[copies], state.select(copies), places[:, copies]

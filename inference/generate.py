"""Generation: a token at a time for many sequences at once, the backbone's state carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count as count_up

import numpy as np
import torch
from jaxtyping import Float
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
    gaps: int | Sequence[int] | None = None,
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
    """Sample sequences from a causal model, or from one that reads a prefix (GLM, xTrimoPGLM), or fill gaps in them.

    A sequence ends with the end token, at a ``stop`` token or after ``max_length`` new tokens. Special tokens other
    than the end are never sampled. Each draw is a function of ``seed``, the number of the sequence and the step, so the
    result depends on ``batch_size`` only where rounding moves a probability across a draw (about one token in 10^5).
    An xLSTM's memory stays the same however long a sequence becomes.

    A model that reads a prefix sees a prompt, ``<gmask>`` and its end token both ways and writes behind ``<sop>`` until
    ``<eop>``, with the positions of its training (``sequences.blanked``). With a suffix it sees ``<smask>`` between
    prompt and suffix, and fills in what it puts there.

    A causal model whose tokenizer has ``<mask-1>`` and ``<eos>`` (Prot-xLSTM, trained with the objective "fill-in")
    fills a gap between prompt and suffix in: it reads the prompt, ``<mask-1>``, the suffix, ``<eos>`` and ``<mask-1>``
    and goes on from there (``sequences.move_spans_behind``). The suffix has the positions behind the gap, so ``gaps``
    must say how long that is; it is filled to the last token. A model that knows no positions needs no ``gaps``:
    without them it ends as any other sequence does.

    Args:
        model: a causal model, or one that reads a prefix.
        count: sequences for each prompt; 1 if not given.
        prompts: beginnings to continue, one or several; without any, sequences start from the begin token.
        suffixes: for a model that fills in, what is to follow what it writes: one for all prompts, or one each.
        gaps: for a causal model that fills in, how many tokens (residues) to put between: one for all, or one each.
        temperature: below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest likeliest tokens whose probabilities sum to at least p.
        min_p: sample from tokens at least this share as likely as the likeliest.
        max_length: most new tokens of a sequence; one that reaches it is returned as far as it came. ``gaps`` have
            their own lengths.
        stop: tokens of the vocabulary that end a sequence and are not part of it.
        seed: of the draws.
        batch_size: sequences that run at once.
        conditions: ids of conditions that the head of the model knows, for all sequences, such as ``{"species": 3}``.
        progress: show a progress bar.

    Returns:
        the decoded sequences, prompts and suffixes included: all of the first prompt, then all of the second, ...

    Raises:
        ConfigError: the model is bidirectional, or does not fill in and there is a suffix or a gap; it reads a prefix
            and lacks the tokens for blanks; it must be told how long a gap is, or need not be; there are not as many
            prompts as suffixes or gaps; an option cannot work, or the head knows no such condition.
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
    unlike = starts_of(model, prompts, suffixes, gaps, max_length)
    starts = [start for start in unlike for _ in range(1 if count is None else count)]
    ends = np.isin(np.arange(len(model.vocabulary)), ends_of(model, stop, gaps))
    never = model.vocabulary.special_ids - set(ends_of(model, None, gaps))
    forbidden = torch.tensor([i in never for i in range(len(model.vocabulary))], device=model.device)
    results: list[str] = []
    with evaluating(model), tqdm(total=len(starts), disable=not progress, desc="generating", unit=" sequences") as bar:
        for first in range(0, len(starts), batch_size):
            group = starts[first : first + batch_size]
            running = np.arange(first, first + len(group))  # number of each sequence in the batch
            written: list[list[int]] = [[] for _ in group]
            alive = np.ones(len(group), bool)
            begin, end, most, mask = np.array([_places(start) for start in group]).T
            logits, state = _prefill(model, group, conditions)
            for step in count_up():
                logits = logits.float().masked_fill(forbidden, -torch.inf)
                chances = filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
                numbers = torch.from_numpy(uniforms(seed, running, step)).to(model.device)
                tokens = draw(chances, numbers)
                drawn = tokens.cpu().numpy()
                ending = alive & ends[drawn]
                alive &= ~ending
                for row in np.flatnonzero(alive):
                    written[running[row] - first].append(int(drawn[row]))
                full = alive & (most[running - first] == step + 1)
                alive &= ~full
                bar.update(int((ending | full).sum()))
                if not alive.any():
                    break
                if alive.mean() < CROWDED:
                    kept = torch.from_numpy(np.flatnonzero(alive)).to(model.device)
                    state, tokens = state.select(kept), tokens[kept]
                    running, alive = running[alive], alive[alive]
                rows = running - first
                at = np.minimum(begin[rows] + step, end[rows])  # one that is full stays at its last place
                positions, in_block = (torch.from_numpy(part).to(model.device) for part in (at, at - mask[rows]))
                batch = PackedBatch.one_each(tokens, positions=positions, block_positions=in_block)
                batch = conditioned(model, batch, conditions)
                hidden, state = model.backbone(batch, state, return_state=True, reuse_state=True)
                logits = model.logits(hidden, batch)
            for start, new in zip(group, written, strict=True):
                results.append(model.tokenizer.decode([*start.before.tolist(), *new, *start.after.tolist()]))
    return results


def _places(start: Start) -> tuple[int, int, int, int]:
    """The first and the last place of the tokens that may be drawn, how many these are, and where their mask stands."""
    mask = int(start.read.positions[-1] - start.read.block_positions[-1])
    return start.places[0], start.places[-1], len(start.places), mask


def _prefill(
    model: LanguageModel, starts: Sequence[Start], conditions: Mapping[str, int] | None
) -> tuple[Float[Tensor, "sequences vocabulary"], BackboneState]:
    """Read the beginnings, equal ones once; return the logits after each of them, and the state."""
    keys = [(start.read.tokens.tobytes(), start.read.positions.tobytes()) for start in starts]
    unique = {key: start.read for key, start in zip(keys, starts, strict=True)}
    batch = conditioned(model, laid_out(model, list(unique.values())), conditions)
    hidden, state = model.backbone(batch, return_state=True)
    numbers = {key: number for number, key in enumerate(unique)}
    copies = torch.tensor([numbers[key] for key in keys], device=model.device)
    return model.logits(hidden, batch, batch.cu_seqlens[1:] - 1)[copies], state.select(copies)

"""Replaced-token detection with a generator (RTD, ELECTRA, Clark et al. 2020, arXiv:2003.10555, section 2).

A small masked model is trained by ``masked`` and the large one by what it puts in the place of the masks:

    loss = masked loss of the generator + 50 * binary loss of the detector
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ShapeError
from ...sequences import Vocabulary
from .corruption import Ordinary, with_tokens
from .objective import Objective

DETECTOR_WEIGHT = 50.0  # of the detector's loss beside the generator's (table 6)


def sampled(
    guess: Objective, logits: Float[Tensor, "chosen vocabulary"], vocabulary: Vocabulary, generator: torch.Generator
) -> Objective:
    """Put the generator's guesses in the place of the chosen tokens and ask of each ordinary token if it is another.

    The targets are 1 where the guess differs from the token that stood there: a right guess is not called replaced.
    No gradient flows through the guesses.

    Args:
        guess: what ``masked`` made of the batch.
        logits: the generator's, at the tokens with weight, in order.
        vocabulary: special tokens are never guessed.
        generator: of random numbers.

    Raises:
        ShapeError: there are not as many logits as chosen tokens.
    """
    at = guess.weights.nonzero()[:, 0]
    if logits.shape != (len(at), len(vocabulary)):
        raise ShapeError("logits", tuple(logits.shape), (len(at), len(vocabulary)))
    ordinary = Ordinary.of(vocabulary, guess.targets.device)
    tokens = guess.targets.clone()
    if len(at):
        chances = logits.detach().float()[:, ordinary.ids.to(logits.device)].softmax(1)
        drawn = torch.multinomial(chances.to(generator.device), 1, generator=generator)[:, 0]
        tokens[at] = ordinary.ids[drawn.to(tokens.device)]
    labels = (tokens != guess.targets).long()
    return Objective(with_tokens(guess.batch, tokens), labels, ordinary.among(guess.targets).float())

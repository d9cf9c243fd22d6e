"""What a run says while it runs: a line of metrics now and then, and a bar."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ProcessiveError
from .checkpoint import Standing, find_checkpoint


class Window:
    """Losses since the last line of metrics; read only there, so that a GPU is not waited for at each step."""

    def __init__(self, standing: Standing) -> None:
        self.losses: list[Tensor] = []
        self.norm, self.rate = torch.zeros(()), 0.0
        self.tokens, self.time = standing.tokens, time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Take in a step: its loss, its gradient norm and its learning rate."""
        self.losses.append(loss)
        self.norm, self.rate = norm, rate

    def close(self, standing: Standing, out: Path) -> dict[str, Any]:
        """Return the line of metrics and begin the next window."""
        loss, norm = float(torch.stack(self.losses).mean()), float(self.norm)
        if not math.isfinite(loss + norm):
            kept = find_checkpoint(out)
            raise ProcessiveError(
                f"Training failed at step {standing.step}: the loss is {loss} and the gradient norm {norm}. "
                + (f"The last checkpoint is in {kept}. " if kept else "")
                + "Train with a lower learning rate."
            )
        now = time.monotonic()
        line = {
            "step": standing.step,
            "epoch": standing.epoch,
            "loss": loss,
            "learning_rate": self.rate,
            "gradient_norm": norm,
            "tokens": standing.tokens,
            "tokens_per_second": round((standing.tokens - self.tokens) / max(now - self.time, 1e-9), 1),
            "seconds": round(standing.seconds, 3),
        }
        self.losses, self.tokens, self.time = [], standing.tokens, now
        return line


def _live() -> bool:
    """Whether somebody watches the bar: a terminal or a notebook, not a log file."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(shown: bool) -> tqdm[Any]:
    """A bar over the share of the run that is done, whatever limits it."""
    return tqdm(
        total=1.0,
        disable=not shown,
        mininterval=0.5 if _live() else 10.0,
        bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        desc="training ",
    )


def show_metrics(bar: tqdm[Any], metrics: dict[str, Any]) -> None:
    """Write the last line of metrics behind the bar."""
    if not metrics:
        return
    values = [f"step {metrics['step']}", f"loss {metrics['loss']:.3f}"]
    if "validation_loss" in metrics:
        values.append(f"validation {metrics['validation_loss']:.3f}")
    values.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    bar.set_postfix_str(", ".join(values), refresh=_live())

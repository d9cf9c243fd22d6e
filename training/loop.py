"""The one training loop."""

from __future__ import annotations

import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..backbones import TransformerConfig, config_to_dict, to_plain
from ..errors import ConfigError, ProcessiveError
from ..kernels import keep_freed_memory
from ..models import LanguageModel, ModelCard, adapter_settings, fingerprint, save_adapter, used_adapter
from ..models.adapters import is_task
from ..sequences import check_writable, tokenizer_to_dict
from .checkpoint import NAME as CHECKPOINT
from .checkpoint import (
    Standing,
    clear_leftovers,
    find_checkpoint,
    frozen_tensors,
    read_checkpoint,
    write_checkpoint,
    write_snapshot,
)
from .config import OBJECTIVES, TrainingConfig
from .data import Mixture, Order, Pieces, Sequences
from .metrics import NAME as METRICS
from .metrics import append_metrics, keep_metrics, read_metrics
from .optimizer import make_optimizer, set_learning_rate
from .record import begin_record, finish_record
from .schedule import warmup_cosine
from .step import chosen_precision, gradient_step, validation_loss
from .taught import Taught, check_taught

CHECKPOINT_SECONDS = 300
REPORTED = ("step", "epoch", "tokens", "seconds", "loss", "validation_loss", "precision", "device")  # in the model card
WITHOUT_EFFECT = (
    "log_every",
    "validate_every",
    "checkpoint_every",
    "snapshot_every",
    "gradient_checkpointing",
)  # on the weights


class Step(NamedTuple):
    """One step of the plan: its epoch, its place there, the steps of that epoch, the sequences of its batches."""

    epoch: int
    position: int
    of: int
    batches: Sequence[Order]


def plan(pieces: Pieces, config: TrainingConfig, standing: Standing) -> Iterator[Step]:
    """Yield the steps that come after ``standing``, without end."""
    position = standing.position
    for epoch in itertools.count(standing.epoch):
        batches = pieces.batches(batch_tokens=config.batch_tokens, seed=config.seed, epoch=epoch)
        of = -(-len(batches) // config.accumulation)
        for number in range(position, of):
            yield Step(epoch, number, of, batches[number * config.accumulation : (number + 1) * config.accumulation])
        position = 0


def share_done(config: TrainingConfig, standing: Standing, step: Step) -> float:
    """Share of the run that is done when ``step`` is taken (with ``minutes``: that is done now)."""
    if config.steps is not None:
        return (standing.step + 1) / config.steps
    if config.epochs is not None:
        return (step.epoch + (step.position + 1) / step.of) / config.epochs
    assert config.minutes is not None
    return standing.seconds / (60 * config.minutes)


def train(
    model: LanguageModel,
    sequences: Sequences | Mixture | Taught,
    config: TrainingConfig,
    *,
    out: str | Path,
    validation: Sequences | Taught | None = None,
    resume: bool = False,
    progress: bool = True,
    card: ModelCard | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place and leave it in the folder ``out``.

    The folder holds ``metrics.jsonl`` and ``checkpoint/`` from the first minutes on and, at the end, the model itself
    (``config.json``, ``model.safetensors``, ``README.md``), or of a model with an adapter in use that adapter alone
    (``adapter.json``, ``adapter.safetensors``). ``record.json`` says what was run, from the start on. A run that was
    stopped or killed goes on with ``resume=True`` from its last checkpoint as if nothing had happened: on a CPU the
    weights are the same bit for bit.
    Ctrl-C (or SIGTERM) stops after the step under way and writes a checkpoint; a second Ctrl-C stops at once.

    Args:
        model: the model; its weights are where a new run starts.
        sequences: token sequences: arrays, a ``TokenStore``, or a ``Mixture`` of several of these, which are taught by
            the objective of ``config``; or ``Labelled`` or ``Preferences``, which say themselves what is taught.
        config: the settings.
        out: folder of the run.
        validation: held-out data, of the same kind.
        resume: go on with the run in ``out``; where there is no checkpoint yet, start it.
        progress: show a progress bar.
        card: what the caller knows of the data, for the model card (``describe_file`` hashes a file).

    Returns:
        ``step``, ``epoch`` (begun), ``tokens``, ``seconds``, ``loss`` (nats per counted token, mean since the last
        line of ``metrics.jsonl``), ``validation_loss`` (where there is one), ``precision``, and ``interrupted``.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is False; the settings do not fit the model or the run;
            nothing is trained.
        InputError: there is nothing to train on, or it was made by another tokenizer.
        OutputError: the disk is full or the folder cannot be written.
        ProcessiveError: the loss is no longer a finite number.
    """
    out = Path(out)
    direction, backbone = "causal" if model.causal else "bidirectional", model.backbone.config
    if isinstance(backbone, TransformerConfig) and backbone.direction == "prefix":
        direction = "prefix"
    taught = check_taught(sequences, validation, model, max_length=config.max_length)
    if not taught and OBJECTIVES[config.objective] != direction:
        raise ConfigError(f"The objective is {config.objective!r}, and the backbone is {direction}; they do not fit.")
    pieces = Pieces(sequences, max_length=config.max_length)
    held_out = None if validation is None else Pieces(validation, max_length=config.max_length)
    if used_adapter(model) is not None:
        _refuse_more_than_adapter(model, config)
    with _only(config.trained, model, pieces.taught):
        return _train(
            model, pieces, held_out, config, out=out, resume=resume, progress=progress, card=card or model.card
        )


def _train(
    model: LanguageModel,
    pieces: Pieces,
    held_out: Pieces | None,
    config: TrainingConfig,
    *,
    out: Path,
    resume: bool,
    progress: bool,
    card: ModelCard,
) -> dict[str, Any]:
    """Train the parameters that require gradients."""
    identity: dict[str, Any] = {
        "settings": {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT},
        "data": pieces.fingerprint(),
        "model": {"backbone": config_to_dict(model.backbone.config), "tokenizer": tokenizer_to_dict(model.tokenizer)},
    }
    if model.task_config is not None:
        identity["model"]["task"] = to_plain(model.task_config)
    kept = frozen_tensors(model)
    if kept:  # they are in no checkpoint
        identity |= {"frozen": fingerprint(kept), "adapter": adapter_settings(model, used_adapter(model))}
    check_writable(out / METRICS)
    optimizer = make_optimizer(model, config)
    standing = _start(out, model, optimizer, identity, resume=resume)
    record = begin_record(out, model, config, card, data=identity["data"], resumed=standing.step > 0)
    if model.device.type == "cpu":
        keep_freed_memory()
    devices = [model.device] if model.device.type == "cuda" else []
    was_training, was_checkpointing = model.training, model.backbone.gradient_checkpointing
    try:
        model.train()
        model.backbone.gradient_checkpointing = config.gradient_checkpointing
        with torch.random.fork_rng(devices), _stop_asked() as stop_asked, _bar(progress) as bar:
            metrics = _run(
                model,
                optimizer,
                pieces,
                config,
                held_out=held_out,
                out=out,
                standing=standing,
                identity=identity,
                stop_asked=stop_asked,
                bar=bar,
            )
    finally:
        model.train(was_training)
        model.backbone.gradient_checkpointing = was_checkpointing
    run = finish_record(out, record, metrics)
    if not metrics["interrupted"]:
        described = replace(
            card,
            recipe={**card.recipe, "training": asdict(config)},
            metrics={**card.metrics, **{name: metrics[name] for name in REPORTED if name in metrics}},
            run=run,
        )
        if used_adapter(model) is None:
            model.card = described
            model.save(out)
        else:
            save_adapter(model, out, card=described)
    return metrics


def _refuse_more_than_adapter(model: LanguageModel, config: TrainingConfig) -> None:
    """Raise where something would be trained that an adapter's file does not hold."""
    if config.trained == "head":
        raise ConfigError('An adapter is trained with trained="all": the base is frozen already.')
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not is_task(name)]
    more = [name for name in trained if ".adapters." not in name]
    if more:
        raise ConfigError(f"Beside the adapter {more[0]} requires gradients, and the adapter's file would not hold it.")


@contextmanager
def _only(trained: str, model: LanguageModel, taught: Taught | None) -> Iterator[None]:
    """Freeze the backbone where the head alone is trained, and the heads that the data does not reach."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if trained == "head":
        model.backbone.requires_grad_(False)
    idle = [model.task] if taught is None else taught.untaught(model)
    for head in idle:
        if head is not None:
            head.requires_grad_(False)
    if model.task is not None and model.task not in idle:  # an adapter froze it with the base
        model.task.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _start(
    out: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, identity: dict[str, Any], *, resume: bool
) -> Standing:
    """Return where the run starts: from a checkpoint, or from nothing."""
    taken = [
        name
        for name in (CHECKPOINT, f"{CHECKPOINT}.old", METRICS, "config.json", "adapter.json")
        if (out / name).exists()
    ]
    if taken and not resume:
        raise ConfigError(
            f"{out} holds a run already ({taken[0]}). Resume it (resume=True, --resume), or choose another folder."
        )
    clear_leftovers(out)
    folder = find_checkpoint(out)
    standing = Standing() if folder is None else read_checkpoint(folder, model, optimizer, identity)
    keep_metrics(out, until=standing.step)
    return standing


def _run(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    pieces: Pieces,
    config: TrainingConfig,
    *,
    held_out: Pieces | None,
    out: Path,
    standing: Standing,
    identity: dict[str, Any],
    stop_asked: Callable[[], bool],
    bar: tqdm[Any],
) -> dict[str, Any]:
    """Take steps until the run is done or asked to stop; return the last metrics."""
    precision = chosen_precision(config.precision, model.device)
    metrics: dict[str, Any] = (read_metrics(out) or [{}])[-1]
    interrupted = False
    window = _Window(standing)
    began = time.monotonic() - standing.seconds
    saved = time.monotonic()
    for step in plan(pieces, config, standing):
        standing.seconds = time.monotonic() - began
        done = share_done(config, standing, step)
        if done > 1:
            break
        interrupted = stop_asked()
        if interrupted:
            break
        batches = [pieces.batch(indices, vocabulary_size=len(model.vocabulary)) for indices in step.batches]
        rate = config.learning_rate * warmup_cosine(done, warmup=config.warmup, floor=config.floor)
        set_learning_rate(optimizer, rate)
        window.add(*gradient_step(model, optimizer, batches, config, step=standing.step, precision=precision), rate)
        ends_epoch = step.position + 1 == step.of
        standing.step += 1
        standing.epoch, standing.position = (step.epoch + 1, 0) if ends_epoch else (step.epoch, step.position + 1)
        standing.tokens += sum(len(batch.tokens) for batch in batches)
        standing.seconds = time.monotonic() - began
        bar.update(done - bar.n)
        if config.snapshot_every is not None and standing.step % config.snapshot_every == 0:
            write_snapshot(out, model, standing.step)
        validates = ends_epoch if config.validate_every is None else standing.step % config.validate_every == 0
        saves = (
            time.monotonic() - saved > CHECKPOINT_SECONDS
            if config.checkpoint_every is None
            else standing.step % config.checkpoint_every == 0
        )
        if done == 1 or not (validates or saves or standing.step % config.log_every == 0):
            continue
        metrics = window.close(standing, out)
        if validates and held_out is not None:
            metrics["validation_loss"] = validation_loss(model, held_out, config, precision)
        append_metrics(out, metrics)
        _show(bar, metrics)
        if saves:
            write_checkpoint(out, model, optimizer, standing, identity)
            saved = time.monotonic()
    if window.losses:
        metrics = window.close(standing, out)
        if held_out is not None and not interrupted:
            metrics["validation_loss"] = validation_loss(model, held_out, config, precision)
        append_metrics(out, metrics)
    _show(bar, metrics)
    write_checkpoint(out, model, optimizer, standing, identity)
    return {**metrics, "precision": precision, "device": str(model.device), "interrupted": interrupted}


class _Window:
    """Losses since the last line of metrics; read only there, so that a GPU is not waited for at each step."""

    def __init__(self, standing: Standing) -> None:
        self.losses: list[Tensor] = []
        self.norm, self.rate = torch.zeros(()), 0.0
        self.tokens, self.time = standing.tokens, time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> None:
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


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question that the loop asks between steps."""
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _live() -> bool:
    """Whether somebody watches the bar: a terminal or a notebook, not a log file."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _bar(shown: bool) -> tqdm[Any]:
    """A bar over the share of the run that is done, whatever limits it."""
    return tqdm(
        total=1.0,
        disable=not shown,
        mininterval=0.5 if _live() else 10.0,
        bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        desc="training ",
    )


def _show(bar: tqdm[Any], metrics: dict[str, Any]) -> None:
    if not metrics:
        return
    values = [f"step {metrics['step']}", f"loss {metrics['loss']:.3f}"]
    if "validation_loss" in metrics:
        values.append(f"validation {metrics['validation_loss']:.3f}")
    values.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    bar.set_postfix_str(", ".join(values), refresh=_live())

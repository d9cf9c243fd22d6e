"""The one training loop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigError, InputError
from ..kernels import keep_freed_memory
from ..models import ModelCard, Trainable, adapter_settings, fingerprint, save_adapter, used_adapter
from ..models.adapters import is_task
from ..sequences import check_writable
from .carried import Carried, check_carried
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
from .config import OBJECTIVES, WITH_SPANS, TrainingConfig
from .data import Mixture, Pieces, Sequences
from .detector import check_detector
from .engines import Engine, EngineConfig, barrier, make_engine, prepare
from .long import check_causal
from .metrics import NAME as METRICS
from .metrics import append_metrics, keep_metrics, read_metrics
from .plan import ready_steps, share_done
from .record import begin_record, finish_record
from .report import Window, progress_bar, show_metrics
from .schedule import SCHEDULES
from .step import MASKS, make_objective, untaught
from .taught import AnyObjective, Taught, check_taught, language_model
from .validation import validation_loss

CHECKPOINT_SECONDS = 300
REPORTED = ("step", "epoch", "tokens", "seconds", "loss", "validation_loss", "precision", "device")  # in the model card
WITHOUT_EFFECT = (
    "log_every",
    "validate_every",
    "checkpoint_every",
    "snapshot_every",
    "gradient_checkpointing",
)  # on the weights


def train(
    model: Trainable,
    sequences: Sequences | Mixture | Taught,
    config: TrainingConfig,
    *,
    out: str | Path,
    validation: Sequences | Taught | None = None,
    resume: bool = False,
    progress: bool = True,
    card: ModelCard | None = None,
    engine: EngineConfig | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place and leave it in the folder ``out``.

    The folder holds ``metrics.jsonl`` and ``checkpoint/`` from the first minutes on and, at the end, the model itself
    (``config.json``, ``model.safetensors``, ``README.md``), or of a model with an adapter in use that adapter alone
    (``adapter.json``, ``adapter.safetensors``). ``record.json`` says what was run, from the start on. A run that was
    stopped or killed goes on with ``resume=True`` from its last checkpoint as if nothing had happened: on a CPU the
    weights are the same bit for bit.
    Ctrl-C (or SIGTERM) stops after the step under way and writes a checkpoint; a second Ctrl-C stops at once.

    With the engine "deepspeed" the processes that ``torchrun``, ``deepspeed`` or ``processive train --processes`` has
    started call this together, with the same arguments, and train one model; a process that none of these has started
    is alone. The first of them writes the files, and all see the same folder. Ctrl-C at any of them stops them all
    after the same step. An error in one ends that process; it is for the launcher to end the others, as all three do.
    DeepSpeed takes the weights over meanwhile: after an error ``model`` has none, and the checkpoint has them.

    Args:
        model: the model; its weights are where a new run starts.
        sequences: token sequences: arrays, a ``TokenStore``, or a ``Mixture`` of several of these, which are taught by
            the objective of ``config``; or ``Labelled``, ``Preferences``, ``Sampled`` (for an ``Electra``),
            ``ClusterReplaced`` (for a ``ClusterDetector``) or ``cells.CellTexts`` (for a ``cells.LangCell``), which say
            themselves what is taught.
        config: the settings.
        out: folder of the run.
        validation: held-out data, of the same kind.
        resume: go on with the run in ``out``; where there is no checkpoint yet, start it.
        progress: show a progress bar.
        card: what the caller knows of the data, for the model card (``describe_file`` hashes a file).
        engine: with what to train; None: torch, in this process. A run may be resumed with another.

    Returns:
        ``step``, ``epoch`` (begun), ``tokens``, ``seconds``, ``loss`` (nats per counted token, mean since the last
        line of ``metrics.jsonl``), ``validation_loss`` (where there is one), ``precision``, and ``interrupted``.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is False; the settings do not fit the model or the run;
            the batches of a step cannot be shared out among the processes; nothing is trained.
        MissingExtra: the engine is DeepSpeed and it is not installed.
        InputError: there is nothing to train on, or it was made by another tokenizer.
        OutputError: the disk is full or the folder cannot be written.
        ProcessiveError: the loss is no longer a finite number.
    """
    out = Path(out)
    _check_fits(model, sequences, validation, config)
    longest = config.max_length if config.long == "cut" else None
    pieces = Pieces(sequences, max_length=longest)
    held_out = None if validation is None else Pieces(validation, max_length=longest)
    _check_spans(config, *(p for p in (pieces, held_out) if p is not None))
    if used_adapter(model) is not None:
        _refuse_more_than_adapter(model, config)
    settings = engine or EngineConfig()
    if settings.name != "plain" and pieces.taught is not None and pieces.taught.in_order:
        raise ConfigError(
            f"{type(pieces.taught).__name__} counts batch after batch, in one process: it needs the engine plain."
        )
    rank, world_size = prepare(settings, config, model.device)
    with _only(config, model, pieces.taught):
        return _train(
            model,
            pieces,
            held_out,
            config,
            settings,
            rank=rank,
            world_size=world_size,
            out=out,
            resume=resume,
            progress=progress,
            card=card or model.card,
        )


def _train(
    model: Trainable,
    pieces: Pieces,
    held_out: Pieces | None,
    config: TrainingConfig,
    settings: EngineConfig,
    *,
    rank: int,
    world_size: int,
    out: Path,
    resume: bool,
    progress: bool,
    card: ModelCard,
) -> dict[str, Any]:
    """Train the parameters that require gradients."""
    identity: dict[str, Any] = {
        "settings": {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT},
        "data": pieces.fingerprint(),
        "model": model.parts(),
    }
    kept = frozen_tensors(model)
    if kept:  # they are in no checkpoint
        identity |= {"frozen": fingerprint(kept), "adapter": adapter_settings(model, used_adapter(model))}
    check_writable(out / METRICS)
    standing, moments = _start(out, model, identity, resume=resume)
    barrier(settings)  # all have read what the first one changes now
    record: dict[str, Any] = {}
    if rank == 0:
        clear_leftovers(out)
        keep_metrics(out, until=standing.step)
        engine_used = {**asdict(settings), "processes": world_size}
        record = begin_record(
            out, model, config, card, data=identity["data"], engine=engine_used, resumed=standing.step > 0
        )
    if model.device.type == "cpu":
        keep_freed_memory()
    devices = [model.device] if model.device.type == "cuda" else []
    was_training, was_checkpointing = model.training, [network.gradient_checkpointing for network in model.networks]
    try:
        model.train()
        for network in model.networks:
            network.gradient_checkpointing = config.gradient_checkpointing
        with torch.random.fork_rng(devices), _stop_asked() as stop_asked, progress_bar(progress and rank == 0) as bar:
            carried = Carried.read(find_checkpoint(out), model)
            example = partial(_example, model, pieces, config)
            engine = make_engine(model, config, settings, example=example, carried=carried)
            engine.load_optimizer(moments)
            metrics = _run(
                engine,
                pieces,
                config,
                held_out=held_out,
                out=out,
                standing=standing,
                identity=identity,
                stop_asked=stop_asked,
                bar=bar,
            )
            engine.close()
    finally:
        model.train(was_training)
        for network, was in zip(model.networks, was_checkpointing, strict=True):
            network.gradient_checkpointing = was
    if rank == 0:
        _finish(out, model, config=config, card=card, record=record, metrics=metrics)
    barrier(settings)
    return metrics


def _finish(
    out: Path,
    model: Trainable,
    *,
    config: TrainingConfig,
    card: ModelCard,
    record: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write how the run ended and, where it is done, the model or its adapter."""
    run = finish_record(out, record, metrics)
    if metrics["interrupted"]:
        return
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


def _example(model: Trainable, pieces: Pieces, config: TrainingConfig) -> AnyObjective:
    """The objective of the shortest piece that teaches anything, which shows an engine what the gradients reach.

    Of a piece of one token there is no next one, and nothing would be reached.

    Raises:
        InputError: no piece teaches anything.
    """
    for index in pieces.lengths.argsort(kind="stable"):
        batch = pieces.batch([int(index)], vocabulary_size=model.vocabulary_size)
        objective = make_objective(batch, model, config, MASKS, 0, 0)
        if objective.weight > 0:
            return objective
    raise InputError("There is nothing to learn in the data: no sequence has anything to predict.")


def _check_fits(
    model: Trainable,
    sequences: Sequences | Mixture | Taught,
    validation: Sequences | Taught | None,
    config: TrainingConfig,
) -> None:
    """Raise where the model cannot learn what the settings or the data say."""
    if check_taught(sequences, validation, model, max_length=config.max_length):
        if config.long != "cut":
            raise ConfigError(f'long="{config.long}" is of plain sequences; those with labels are read whole.')
        if config.layer_decay < 1 and len(model.networks) > 1:
            raise ConfigError(f"layer_decay goes down one network, and {model.name} has {len(model.networks)}.")
        return
    model = language_model(model)
    direction = "causal" if model.causal else "prefix" if model.backbone.config.prefixed else "bidirectional"
    if OBJECTIVES[config.objective] != direction:
        raise ConfigError(f"The objective is {config.objective!r}, and the backbone is {direction}; they do not fit.")
    if config.objective == "replaced":
        check_detector(model)
    if config.long != "cut":
        (check_carried if config.long == "carry" else check_causal)(model)


def _check_spans(config: TrainingConfig, *data: Pieces) -> None:
    """Raise where the objective looks at spans that the data does not have."""
    if config.objective in WITH_SPANS and not all(pieces.has_spans or pieces.taught for pieces in data):
        raise ConfigError(f"The objective {config.objective!r} needs data with spans (--spans FILE, or instructions).")


def _refuse_more_than_adapter(model: Trainable, config: TrainingConfig) -> None:
    """Raise where something would be trained that an adapter's file does not hold."""
    if config.trained == "head":
        raise ConfigError('An adapter is trained with trained="all": the base is frozen already.')
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not is_task(name)]
    more = [name for name in trained if ".adapters." not in name]
    if more:
        raise ConfigError(f"Beside the adapter {more[0]} requires gradients, and the adapter's file would not hold it.")


@contextmanager
def _only(config: TrainingConfig, model: Trainable, taught: Taught | None) -> Iterator[None]:
    """Freeze the networks where heads alone are trained, and the heads that what is taught does not reach."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if config.trained == "head":
        for network in model.networks:
            network.requires_grad_(False)
    idle = untaught(model, config) if taught is None else taught.untaught(model)
    for head in idle:
        head.requires_grad_(False)
    task = getattr(model, "task", None)
    if task is not None and task not in idle:  # an adapter froze it with the base
        task.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _start(
    out: Path, model: Trainable, identity: dict[str, Any], *, resume: bool
) -> tuple[Standing, dict[str, Tensor]]:
    """Return where the run starts, from a checkpoint or from nothing, and the optimiser's moments there."""
    taken = [
        name
        for name in (CHECKPOINT, f"{CHECKPOINT}.old", METRICS, "config.json", "adapter.json")
        if (out / name).exists()
    ]
    if taken and not resume:
        raise ConfigError(
            f"{out} holds a run already ({taken[0]}). Resume it (resume=True, --resume), or choose another folder."
        )
    folder = find_checkpoint(out)
    return (Standing(), {}) if folder is None else read_checkpoint(folder, model, identity)


def _run(
    engine: Engine,
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
    metrics: dict[str, Any] = (read_metrics(out) or [{}])[-1]
    interrupted = False
    window = Window(standing)
    began = time.monotonic() - standing.seconds
    saved = standing.seconds
    for step, tokens, objectives in ready_steps(pieces, config, standing, engine):
        # Each process may be asked to stop, and the clock of the first one is that of all.
        stops, now = engine.sum([float(stop_asked()), time.monotonic() - began if engine.rank == 0 else 0.0])
        standing.seconds = now
        done = share_done(config, standing, step)
        if done > 1:
            break
        interrupted = stops > 0
        if interrupted:
            break
        rate = config.learning_rate * SCHEDULES[config.schedule](done, warmup=config.warmup, floor=config.floor)
        engine.set_learning_rate(rate)
        window.add(*engine.gradient_step(objectives, step=standing.step), rate)
        ends_epoch = step.position + 1 == step.of
        standing.step += 1
        standing.epoch, standing.position = (step.epoch + 1, 0) if ends_epoch else (step.epoch, step.position + 1)
        standing.tokens += tokens
        standing.seconds = time.monotonic() - began
        bar.update(done - bar.n)
        if config.snapshot_every is not None and standing.step % config.snapshot_every == 0:
            weights = engine.tensors()
            if engine.rank == 0:
                write_snapshot(out, weights, standing.step)
        validates = ends_epoch if config.validate_every is None else standing.step % config.validate_every == 0
        saves = (
            now - saved > CHECKPOINT_SECONDS
            if config.checkpoint_every is None
            else standing.step % config.checkpoint_every == 0
        )
        if done == 1 or not (validates or saves or standing.step % config.log_every == 0):
            continue
        metrics = window.close(standing, out)
        if validates and held_out is not None:
            metrics["validation_loss"] = validation_loss(engine, held_out, config)
        _report(engine, out, metrics, bar)
        if saves:
            _save(engine, out, standing, identity)
            saved = now
    if window.losses:
        metrics = window.close(standing, out)
        if held_out is not None and not interrupted:
            metrics["validation_loss"] = validation_loss(engine, held_out, config)
        _report(engine, out, metrics, bar)
    show_metrics(bar, metrics)
    _save(engine, out, standing, identity)
    device = str(engine.model.device)
    return {**metrics, "precision": engine.precision, "device": device, "interrupted": interrupted}


def _report(engine: Engine, out: Path, metrics: dict[str, Any], bar: tqdm[Any]) -> None:
    """Write a line of metrics and show it; the first process does."""
    if engine.rank == 0:
        append_metrics(out, metrics)
        show_metrics(bar, metrics)


def _save(engine: Engine, out: Path, standing: Standing, identity: dict[str, Any]) -> None:
    """Write a checkpoint: all processes give their parts, the first one writes."""
    weights, moments, carried = engine.tensors(), engine.optimizer_tensors(), Carried(engine.states())
    if engine.rank == 0:
        write_checkpoint(out, weights, moments, standing, identity, carried=carried)


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

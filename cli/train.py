"""processive train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, OutputError
from .inputs import (
    COMMAND,
    DeviceOption,
    InputArgument,
    OnError,
    OnErrorOption,
    check_device,
    domain_module,
    local_device,
    process_number,
    read_records,
    tokenize_options,
)
from .report import Stopped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..sequences import Tokenizer, TokenStore
    from ..training import Recipe


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file, or a name that `models` lists.")],
    data: InputArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; the model ends up in it.")],
    size: Annotated[str, typer.Option(help="Size of the recipe: tiny, published, or another that it has.")] = "tiny",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    validation: Annotated[Path | None, typer.Option(help="Held-out records, in the format of INPUT.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train so long.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Train so many passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same weights on one CPU.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: training.learning_rate=3e-4. Repeatable."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="What a property model learns, in a .csv. Repeatable.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from this model in place of a new one.")
    ] = None,
    adapt: Annotated[
        Literal["full", "head", "lora"],
        typer.Option(help="What of the --base is trained: all, its head, or an adapter (--set adapt.rank=8)."),
    ] = "full",
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA=WEIGHT",
            help="Train on this too, with so many tokens for each one of INPUT: old=0.1 replays old data. Repeatable.",
        ),
    ] = None,
    spans: Annotated[
        Path | None,
        typer.Option(help="Spans of DNA or proteins (BED, GFF, GenBank), which entity-masked training looks at first."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default that of the folder.")] = None,
    engine: Annotated[
        Literal["plain", "deepspeed"] | None,
        typer.Option(help="With what to train: torch, or DeepSpeed (--set engine.zero_stage=3), for many processes."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Train in so many processes of this machine; torchrun starts them on several.")
    ] = 1,
    on_error: OnErrorOption = "raise",
    device: DeviceOption = "cpu",
) -> None:
    """Train a model by a recipe on your data."""
    _check_folder(out)
    check_device(device)
    from ..training import read_recipe

    changes: dict[str, Any] = {**parse_settings(settings or [])}
    limits = {"minutes": minutes, "epochs": epochs, "steps": steps}
    changes |= {f"training.{key}": value for key, value in limits.items() if value is not None}
    if adapt != "full" and base is None:
        raise ConfigError(f"--adapt {adapt} needs a model to start from: --base MODEL.")
    changes |= {"training.trained": "head"} if adapt == "head" else {}
    changes |= {"engine.name": engine} if engine is not None else {}
    plan = read_recipe(recipe, size, changes)
    if plan.predictor:
        from .train_property import train_property

        if resume or validation or base or mix or spans or not target:
            raise ConfigError(
                f"The recipe {plan.name} trains a property model: name the column with --target; it takes no --resume "
                "(it trains in minutes), no --base, --mix, --spans, and no --validation (it splits INPUT by scaffold)."
            )
        train_property(plan, data, target, out, seed=seed, on_error=on_error, device=device)
        return
    if target:
        raise ConfigError(f"The recipe {plan.name} trains a language model, which has no --target.")
    if seed is not None:
        plan = read_recipe(recipe, size, {**changes, "training.seed": seed})
    if processes > 1:
        _start_processes(plan, processes)
    _train_language_model(
        plan,
        data,
        mix=parse_mix(mix or []),
        spans=spans,
        validation=validation,
        out=out,
        base=base,
        lora=adapt == "lora",
        name=name or out.resolve().name,
        resume=resume,
        on_error=on_error,
        device=local_device(device),
    )


def _start_processes(plan: Recipe, processes: int) -> None:
    """Run this command again in each of the processes and end with their status; in one of them, go on."""
    from ..training.engines import check_share
    from ..training.engines.processes import launch, launched

    if launched():
        return
    assert plan.training is not None
    check_share(plan.engine, plan.training, processes)
    raise typer.Exit(launch(COMMAND.get(), processes))


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` texts.

    Raises:
        ConfigError: one has no ``=``.
    """
    wrong = [setting for setting in settings if "=" not in setting]
    if wrong:
        raise ConfigError(f"--set {wrong[0]!r} has no '='. Write --set training.learning_rate=3e-4")
    return dict(setting.split("=", 1) for setting in settings)


def parse_mix(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """Split ``data=weight`` texts.

    Raises:
        ConfigError: one has no ``=``, or its weight is no number.
    """
    found = []
    for text in texts:
        path, _, weight = text.rpartition("=")
        try:
            found.append((Path(path), float(weight)))
        except ValueError:
            found.append((Path(), 0.0))
        if not path or not found[-1][1] > 0:
            raise ConfigError(f"--mix {text!r} is not DATA=WEIGHT with a weight above 0. Write --mix old.store=0.1")
    return found


def _check_folder(out: Path) -> None:
    """Refuse a folder that could not be written later, without making it."""
    from ..sequences import check_writable

    if out.is_file():
        raise OutputError(f"{out} is a file. Name a folder for the run.")
    check_writable(out / "config.json" if out.is_dir() else out)


def _train_language_model(
    plan: Recipe,
    data: Path,
    *,
    mix: Sequence[tuple[Path, float]],
    spans: Path | None,
    validation: Path | None,
    out: Path,
    base: str | None,
    lora: bool,
    name: str,
    resume: bool,
    on_error: OnError,
    device: str,
) -> None:
    import torch

    from .. import training
    from ..models import ModelCard, add_adapter, load, trainable_share

    assert plan.training is not None
    started = None if base is None else load(base, device=device, dtype=torch.float32)
    if started is not None and started.tokenizer.domain != plan.domain:
        raise ConfigError(f"{base} reads {started.tokenizer.domain}, and the recipe {plan.name} is for {plan.domain}.")
    options = tokenize_options(plan, spans)
    tokenizer, sequences, counts = _read_and_tokenize(
        plan, data, on_error, options, None if started is None else started.tokenizer
    )
    described = training.describe_file(data, **counts)
    if spans is not None:
        described["spans"] = training.describe_file(spans)
    mixed: Any = sequences
    if mix:
        others = [_read_and_tokenize(plan, path, on_error, options, tokenizer)[1:] for path, _ in mix]
        mixed = training.Mixture((sequences, *(other for other, _ in others)), (1.0, *(weight for _, weight in mix)))
        described["mix"] = [
            {**training.describe_file(path, **counts), "weight": weight}
            for (path, weight), (_, counts) in zip(mix, others, strict=True)
        ]
    held_out = None
    if validation is not None:
        _, held_out, counts = _read_and_tokenize(plan, validation, on_error, options, tokenizer)
        described["validation"] = training.describe_file(validation, **counts)
    recipe = plan.to_dict()
    if base is not None:
        recipe["base"] = base
    if not lora:
        del recipe["adapt"]
    card = ModelCard(description=plan.description, data=described, recipe=recipe)
    model = started or plan.build(tokenizer, card=card).to(device)
    if plan.training.objective == "replaced" and model.task_config is None:
        training.add_detector(model, seed=plan.training.seed)
    if lora:
        add_adapter(model, plan.adapt, seed=plan.training.seed)
    else:
        model.name = name
    metrics = training.train(
        model, mixed, plan.training, out=out, validation=held_out, resume=resume, card=card, engine=plan.engine
    )
    if metrics["interrupted"]:
        raise Stopped(
            f"Training stopped at step {metrics.get('step', 0)}; the checkpoint is in {out}. "
            "Run the same command with --resume to go on."
        )
    if process_number() > 0:  # the first one says it
        return
    if lora:
        share = trainable_share(model)
        print(f"Trained {share:.2%} of {model.parameters_count:,} parameters, loss {metrics['loss']:.3f}: {out}.")
        print(f"Next, in Python: processive.load({base!r}, adapter={str(out)!r})")
        return
    verb = "generate" if model.generates and plan.domain != "cells" else "embed"
    print(f"{model.parameters_count:,} parameters, loss {metrics['loss']:.3f}: the model is in {out}.")
    print(f"Next: processive {verb} {out} --help")


def _read_and_tokenize(
    plan: Recipe, path: Path, on_error: OnError, options: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, Sequence[NDArray[np.integer]], dict[str, int]]:
    """The tokenizer (made from this file if not given), its tokens, and counts for the model card."""
    domain = domain_module(plan.domain)
    if (path / "store.json").is_file():
        if "spans" in options:
            raise ConfigError(f"{path} is a token store, which has its own spans: give --spans to processive tokenize.")
        return _open_store(plan, path, tokenizer)
    if plan.domain == "cells":
        adata = domain.read(path)
        tokenizer = tokenizer or domain.make_tokenizer(plan.tokenizer, adata)
        sequences = domain.tokenize(adata, tokenizer)
        counts = {"cells": adata.n_obs, "unusable": sum(len(cell) == 0 for cell in sequences)}
    else:
        tokenizer = tokenizer or domain.make_tokenizer(plan.tokenizer, [])  # no tokenizer of text learns from it
        # What is read in frames is cut to what the tokenizer takes, so it is not held against the tokenizer as a whole.
        records = domain.read(path, "dna").checked(on_error) if plan.data else read_records(path, tokenizer, on_error)
        sequences = domain.tokenize(records, tokenizer, **options)
        counts = {"records": len(records), "unusable": len(records.rejected)}
    return tokenizer, sequences, {**counts, "tokens": sum(map(len, sequences))}


def _open_store(plan: Recipe, path: Path, tokenizer: Tokenizer | None) -> tuple[Tokenizer, TokenStore, dict[str, int]]:
    """A token store, the tokenizer in it, and counts for the model card."""
    from ..sequences import TokenStore, tokenizer_from_dict, tokenizer_to_dict

    store = TokenStore(path)
    if "tokenizer" not in store.meta:
        raise ConfigError(f"{path} does not say by which tokenizer it was made. Make it with processive tokenize.")
    made = tokenizer_from_dict(store.meta["tokenizer"])
    wanted = tokenizer
    if wanted is None and plan.domain != "cells":
        wanted = domain_module(plan.domain).make_tokenizer(plan.tokenizer, [])
    if made.domain != plan.domain or (
        wanted is not None and json.dumps(tokenizer_to_dict(wanted)) != json.dumps(tokenizer_to_dict(made))
    ):
        asked = "the other data" if tokenizer is not None else f"the recipe {plan.name} at size {plan.size}"
        raise ConfigError(
            f"{path} was made by another tokenizer ({made.name}) than that of {asked}. Tokenize the input again."
        )
    if store.meta.get("data", {}) != plan.data:
        raise ConfigError(
            f"{path} was made with data settings {store.meta.get('data', {})}, and the recipe {plan.name} at size "
            f"{plan.size} has {dict(plan.data)}. Tokenize the input again."
        )
    counts = list(store.meta.get("records", {}).values())
    described = {name: sum(count[name] for count in counts) for name in ("records", "unusable")} if counts else {}
    return made, store, {**described, "tokens": len(store.tokens)}

"""What test_deepspeed.py looks at: runs of small models, made by one process or by several together.

Called with a phase and a folder. Each run leaves its folder there; a phase is many runs, since starting processes takes
longer than they do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from conftest import LetterTokenizer
from processive import cells
from processive.backbones import TransformerConfig, XLSTMConfig
from processive.errors import ConfigError
from processive.models import AdapterConfig, HeadConfig, LanguageModel, add_adapter
from processive.sequences import TextTokenizer
from processive.training import Electra, EngineConfig, Sampled, TrainingConfig, add_detector, train

RANK = int(os.environ.get("RANK", "0"))
KINDS = ("xlstm", "transformer")
STOPS = {"two": 6, "one": 13}  # the steps after which the run that changes its processes is stopped
CHANGES = "changes"
LONG = {
    "whole": {"long": "whole", "max_length": 7, "batch_tokens": 25, "accumulation": 2, "steps": 2},
    "carry": {"long": "carry", "max_length": 4, "batch_tokens": 8},
}


def words(count: int = 100) -> list[np.ndarray]:
    """Epochs of 18 batches: the last step of each has two of four."""
    rng = np.random.default_rng(0)
    texts = ["".join("abcdefgh"[i] for i in rng.integers(0, 8, rng.integers(1, 13))) for _ in range(count)]
    return [LetterTokenizer().encode(text) for text in texts]


def model(kind: str, *, seed: int = 0, contacts: bool = False, dropout: float = 0.1) -> LanguageModel:
    tokenizer = LetterTokenizer()
    torch.manual_seed(seed)
    size = len(tokenizer.vocabulary)
    if kind == "xlstm":
        config = XLSTMConfig(size, 32, 2, heads=2, blocks=("mlstm", "slstm"), dropout=dropout)
    else:
        config = TransformerConfig(size, 32, 2, heads=2, direction="bidirectional", dropout=dropout)
    return LanguageModel(tokenizer, config, HeadConfig(contacts=contacts), name="letters")


def settings(kind: str, **changes) -> TrainingConfig:
    objective = "causal" if kind == "xlstm" else "masked"
    given = {"steps": 20, "batch_tokens": 50, "accumulation": 4, "log_every": 1, "objective": objective}
    return TrainingConfig(**{**given, **changes})


def fit(trained: LanguageModel, config: TrainingConfig, out: Path, engine: EngineConfig, *, resume=False) -> dict:
    data = words()
    held_out = data[:15] if config.steps == 20 else None
    return train(trained, data, config, out=out, engine=engine, resume=resume, progress=False, validation=held_out)


def stopped_in(step: int, rank: int) -> None:
    """Ctrl-C at process ``rank`` while it takes a step."""
    from processive.training.engines.deepspeed import DeepSpeedEngine

    taken = DeepSpeedEngine.gradient_step

    def wrapper(self, objectives, *, step: int):
        if step == at and self.rank == rank:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(self, objectives, step=step)

    at = step
    DeepSpeedEngine.gradient_step = wrapper


def check_in_place(trained: LanguageModel, out: Path) -> None:
    """Every process has the model that the first one has written."""
    from safetensors.torch import load_file

    written = load_file(out / "model.safetensors")
    own = trained.state_dict()
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)


def frozen_runs(folder: Path, name: str, engine: EngineConfig) -> None:
    few = {"steps": 4}
    adapted = model("xlstm")
    add_adapter(adapted, AdapterConfig(rank=2, dropout=0.2))
    fit(adapted, settings("xlstm", **few), folder / f"lora-{name}", engine)
    head = model("transformer")
    fit(head, settings("transformer", trained="head", **few), folder / f"head-{name}", engine)


def electra_run(folder: Path, name: str, engine: EngineConfig) -> None:
    """A model of two networks, which is written without one of them."""
    detector = model("transformer")
    add_detector(detector)
    both, config = Electra(detector, model("transformer", seed=1)), settings("transformer", steps=4)
    train(both, Sampled(words()), config, out=folder / f"electra-{name}", engine=engine, progress=False)


def detector_run(folder: Path, name: str, engine: EngineConfig) -> None:
    detector = model("transformer")
    add_detector(detector)
    fit(detector, settings("transformer", objective="replaced", steps=2), folder / f"detector-{name}", engine)


def pairs_run(folder: Path, name: str, engine: EngineConfig) -> None:
    """Cells find their texts among those of their batch, and one network reads twice in a step."""
    rng = np.random.default_rng(0)
    genes = cells.GeneVocabulary(("<pad>", "<cls>", *"ABCDEFGH"), np.array([np.nan, np.nan, *[1.0] * 8]), ("",) * 10)
    texts = TextTokenizer.from_pieces()
    size = len(texts.vocabulary)
    torch.manual_seed(0)
    cell = TransformerConfig(10, 16, 1, heads=2, direction="bidirectional", dropout=0.1)
    text = TransformerConfig(size, 16, 1, heads=2, direction="bidirectional", dropout=0.1, cross_width=16)
    both = cells.LangCell(cells.RankTokenizer(genes), texts, cell, text, channels=8)
    read = [np.array([1, *rng.permutation(8)[: rng.integers(2, 8)] + 2]) for _ in range(40)]
    data = cells.CellTexts(read, [texts.encode("abcd"[i]) for i in rng.integers(0, 4, 40)])
    train(both, data, settings("xlstm", steps=2), out=folder / f"pairs-{name}", engine=engine, progress=False)


def long_texts() -> list[np.ndarray]:
    """Epochs of eleven steps of carried lanes; in the last three those of the last batch alone go on."""
    rng = np.random.default_rng(0)
    return [rng.integers(4, 12, length) for length in (30, 29, 0, 28, 27, 26, 2, 25, 24, 23, 1, 22)]


def long_run(how: str, kind: str, out: Path, engine: EngineConfig, *, seed: int = 0, resume: bool = False) -> dict:
    tokenizer = LetterTokenizer()
    torch.manual_seed(seed)
    given = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.1}
    if kind == "xlstm":
        config = XLSTMConfig(12, blocks=("mlstm", "slstm"), **given)
    else:
        config = TransformerConfig(12, direction="causal", window=6 if how == "carry" else None, **given)
    trained, data = LanguageModel(tokenizer, config, name="letters"), long_texts()
    again = engine.name == "deepspeed" and engine.zero_stage == 3  # which changes no curve
    chosen = settings(
        "xlstm", **{"steps": 10 if kind == "transformer" else 20, **LONG[how]}, gradient_checkpointing=again
    )
    return train(trained, data, chosen, out=out, engine=engine, resume=resume, progress=False, validation=data[:3])


@contextmanager
def all_shared() -> Iterator[None]:
    """Have weights shared out too that DeepSpeed would leave whole since they are small."""
    from processive.training.engines import deepspeed

    made = deepspeed.deepspeed_settings

    def changed(*args, **kwargs):
        given = made(*args, **kwargs)
        given["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return given

    deepspeed.deepspeed_settings = changed
    yield
    deepspeed.deepspeed_settings = made


def two(folder: Path) -> None:
    for stage in range(4):
        engine = EngineConfig("deepspeed", zero_stage=stage)
        for kind in KINDS:
            trained = model(kind)
            fit(trained, settings(kind), folder / f"{kind}-{stage}", engine)
            check_in_place(trained, folder / f"{kind}-{stage}")
        with all_shared():
            frozen_runs(folder, str(stage), engine)
            electra_run(folder, str(stage), engine)
            long_run("whole", "xlstm", folder / f"whole-xlstm-{stage}", engine)
            if stage in (0, 3):
                detector_run(folder, str(stage), engine)
                pairs_run(folder, str(stage), engine)
            if stage == 3:
                long_run("whole", "transformer", folder / "whole-transformer-3", engine)
                long_run("carry", "transformer", folder / "carry-transformer-3", engine)
    for stage in (0, 2, 3):
        shared = EngineConfig("deepspeed", zero_stage=stage, sequence_processes=2)
        for kind in KINDS:
            fit(
                model(kind, dropout=0.0),
                settings(kind, steps=8, accumulation=1),
                folder / f"{kind}-shared-{stage}",
                shared,
            )
    offloaded = EngineConfig("deepspeed", zero_stage=2, offload_optimizer=True)
    fit(model("xlstm"), settings("xlstm"), folder / "xlstm-offloaded", offloaded)
    deepest = EngineConfig("deepspeed", zero_stage=3)
    fit(
        model("transformer", contacts=True),
        settings("transformer", steps=4),
        folder / "contacts-2",
        EngineConfig("deepspeed"),
    )
    fit(model("xlstm"), settings("xlstm", steps=4, precision="bf16"), folder / "bf16-3", deepest)
    fit(
        model("xlstm"),
        settings("xlstm", steps=4, clip=0.0, learning_rate=1e-2),
        folder / "unclipped-2",
        EngineConfig("deepspeed"),
    )
    try:
        fit(model("xlstm"), settings("xlstm", accumulation=3), folder / "odd", deepest)
    except ConfigError as error:
        if RANK == 0:
            (folder / "odd.txt").write_text(str(error))
    stopped_in(STOPS["two"], rank=1)
    metrics = fit(model("xlstm"), settings("xlstm"), folder / CHANGES, EngineConfig("deepspeed"))
    assert metrics["interrupted"] and metrics["step"] == STOPS["two"] + 1, metrics
    assert long_run("carry", "xlstm", folder / f"carry-{CHANGES}", EngineConfig("deepspeed"))["interrupted"]
    for stage in (1, 3):
        engine = EngineConfig("deepspeed", zero_stage=stage)
        assert fit(model("xlstm"), settings("xlstm"), folder / f"resumed-{stage}", engine)["interrupted"]
        resumed = model("xlstm", seed=1)
        assert not fit(resumed, settings("xlstm"), folder / f"resumed-{stage}", engine, resume=True)["interrupted"]


def one(folder: Path) -> None:
    """Without a launcher, as in a notebook."""
    assert "RANK" not in os.environ
    stopped_in(STOPS["one"], rank=0)
    engine = EngineConfig("deepspeed", zero_stage=3)
    metrics = fit(model("xlstm", seed=1), settings("xlstm"), folder / CHANGES, engine, resume=True)
    assert metrics["interrupted"] and metrics["step"] == STOPS["one"] + 1, metrics
    metrics = long_run("carry", "xlstm", folder / f"carry-{CHANGES}", engine, seed=1, resume=True)
    assert metrics["interrupted"] and metrics["step"] == STOPS["one"] + 1, metrics


def two_again(folder: Path) -> None:
    engine = EngineConfig("deepspeed", zero_stage=1)
    metrics = fit(model("xlstm", seed=2), settings("xlstm"), folder / CHANGES, engine, resume=True)
    assert not metrics["interrupted"] and metrics["step"] == 20, metrics
    metrics = long_run("carry", "xlstm", folder / f"carry-{CHANGES}", engine, seed=2, resume=True)
    assert not metrics["interrupted"] and metrics["step"] == 20, metrics


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"two": two, "one": one, "two_again": two_again}[sys.argv[1]](Path(sys.argv[2]))

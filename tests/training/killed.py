"""Kill training runs in children of this process, resume them, and compare; run by test_killed.py.

A child is killed by SIGKILL just before its n-th step or file operation, so that every moment of writing a checkpoint
is met, among them the middle of a file. Under DeepSpeed there are two; the second one is killed with the first.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from conftest import LetterTokenizer
from processive.backbones import XLSTMConfig
from processive.models import LanguageModel
from processive.training import EngineConfig, TrainingConfig, checkpoint, loop, read_metrics, train
from processive.training.engines import PlainEngine
from processive.training.engines.processes import environments
from safetensors.torch import load_file

STEPS = 8
LONG = sys.argv[3]
ENGINE = EngineConfig(sys.argv[4], zero_stage=int(sys.argv[5])) if len(sys.argv) > 4 else EngineConfig()
PROCESSES = 1 if ENGINE.name == "plain" else 2
SETTINGS = {"cut": {"batch_tokens": 60}, "carry": {"long": "carry", "max_length": 4, "batch_tokens": 12}}


def run(out: Path, *, resume: bool) -> None:
    tokenizer = LetterTokenizer()
    rng = np.random.default_rng(0)
    words = ["".join("abcdefgh"[i] for i in rng.integers(0, 8, rng.integers(1, 13))) for _ in range(30)]
    torch.manual_seed(0)
    config = XLSTMConfig(len(tokenizer.vocabulary), 16, 1, heads=2, dropout=0.2)
    model = LanguageModel(tokenizer, config)
    settings = TrainingConfig(steps=STEPS, accumulation=2, log_every=1, checkpoint_every=2, **SETTINGS[LONG])
    data = [tokenizer.encode(word) for word in words]
    train(model, data, settings, out=out, resume=resume, progress=False, engine=ENGINE)


def counted(kill_at: int) -> list[str]:
    """Wrap every step and file operation of a run; the one numbered ``kill_at`` is its last."""
    done: list[str] = []

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            done.append(name)
            if len(done) == kill_at:
                if name in ("save_file", "write_text"):  # leave half a file
                    path = Path(args[1] if name == "save_file" else args[0])
                    original(*args, **kwargs)
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    wrap(engine_class(), "gradient_step")
    wrap(loop, "append_metrics")
    wrap(checkpoint, "save_file")
    wrap(Path, "write_text")
    wrap(Path, "rename")
    wrap(os, "replace")
    wrap(os, "fsync")
    wrap(shutil, "rmtree")
    return done


def engine_class() -> type:
    if ENGINE.name == "plain":
        return PlainEngine
    from processive.training.engines.deepspeed import DeepSpeedEngine, import_deepspeed

    import_deepspeed(torch.device("cpu"))  # once here, so that no child spends its time on it
    return DeepSpeedEngine


def in_child(out: Path, *, resume: bool, kill_at: int = 0) -> tuple[int, list[str]]:
    """Run in a child, or one for each process; return how the first ended and what it did."""
    read, write = os.pipe()
    children = []
    for number, environment in enumerate(environments(PROCESSES)):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                if PROCESSES > 1:
                    os.environ.update(environment)
                done = counted(kill_at if number == 0 else 0)
                run(out, resume=resume)
                if number == 0:
                    os.write(write, json.dumps(done).encode())
                code = 0
            finally:
                os._exit(code)
    os.close(write)
    status = os.waitpid(children[0], 0)[1]
    for other in children[1:]:
        if status != 0:
            os.kill(other, signal.SIGKILL)
        ended = os.waitpid(other, 0)[1]
        status = status or ended
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return status, json.loads(text or "[]")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, or to 1e-6 with several processes, whose sums may go in another order."""
    return torch.equal(one, other) if PROCESSES == 1 else torch.allclose(one, other, rtol=0, atol=1e-6)


def main(folder: Path, kills: int) -> None:
    engine_class()
    if PROCESSES == 1:
        run(folder / "warm", resume=False)  # once here, so that no child spends its time on importing
    status, done = in_child(folder / "whole", resume=False)
    assert status == 0
    wanted = load_file(folder / "whole" / "model.safetensors")
    lines = [(line["step"], line["loss"]) for line in read_metrics(folder / "whole")]
    assert [step for step, _ in lines] == list(range(1, STEPS + 1))
    # One kill before each kind of operation, within the second half of the run, and others anywhere.
    middle = len(done) // 2
    moments = {middle + done[middle:].index(name) + 1 for name in set(done[middle:])}
    moments.add(middle + done[middle:].index("rename") + 2)  # the old one is away, the new one not yet there
    moments |= set(random.Random(0).sample(range(2, len(done) + 1), kills))
    for moment in sorted(moments):
        out = folder / f"killed-{moment}"
        status, _ = in_child(out, resume=False, kill_at=moment)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
        found = checkpoint.find_checkpoint(out)
        if found is not None:  # a whole one, whatever was under way
            load_file(found / "model.safetensors")
            load_file(found / "optimizer.safetensors")
            assert (found / "state.safetensors").is_file() == (LONG == "carry")
        else:  # the first one was not yet put in its place
            assert "rename" not in done[: moment - 1], f"no checkpoint after {done[: moment - 1]}"
        status, _ = in_child(out, resume=True)
        assert status == 0, (moment, done[moment - 1])
        resumed = load_file(out / "model.safetensors")
        assert wanted.keys() == resumed.keys()
        assert all(same(wanted[name], resumed[name]) for name in wanted), (moment, done[moment - 1])
        again = [(line["step"], line["loss"]) for line in read_metrics(out)]
        assert same(torch.tensor(again), torch.tensor(lines)), (moment, done[moment - 1])
        assert not list(out.glob(".checkpoint.*")), "scratch folders are left"
    sys.stdout.write(f"{len(moments)} kills of {len(done)} moments: {sorted(set(done))}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))

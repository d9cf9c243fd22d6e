"""Who shares what, and how local processes are started, stopped and heard."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processive.cli import main
from processive.errors import ConfigError
from processive.training.batches import even_share, rank_share
from processive.training.engines import processes

posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in for Python is a shell script")


@given(st.integers(1, 30), st.integers(1, 9))
def test_all_have_as_many_batches_and_each_counts_once(count, world_size):
    batches = [f"batch {n}" for n in range(count)]
    shares = [even_share(batches, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-count // world_size)}
    counted = sorted((n, batch) for share in shares for n, batch, counts in share if counts)
    assert counted == list(enumerate(batches))
    for rank, share in enumerate(shares):
        own = [(n, batch) for n, batch, counts in share if counts]
        assert own == rank_share(batches, rank=rank, world_size=world_size)
        assert all((n, batch) == (0, batches[0]) for n, batch, counts in share if not counts)


def test_local_processes_are_told_who_they_are():
    environments = processes.environments(3)
    assert [e["RANK"] for e in environments] == [e["LOCAL_RANK"] for e in environments] == ["0", "1", "2"]
    assert {e["WORLD_SIZE"] for e in environments} == {"3"}
    assert len({e["MASTER_PORT"] for e in environments}) == 1


def test_half_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        processes.join(torch.device("cpu"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a shell script in the place of Python."""

    def use(script: str) -> Path:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(processes.sys, "executable", str(program))
        monkeypatch.setattr(processes, "GRACE", 0.3)
        return tmp_path

    return use


@posix
def test_all_end_well(stand_in):
    folder = stand_in('echo "$@" > said-$RANK')
    assert processes.launch(["train", "chem-xlstm"], 3) == 0
    assert [(folder / f"said-{n}").read_text() for n in range(3)] == ["-m processive.cli train chem-xlstm\n"] * 3


@posix
def test_one_that_fails_stops_the_others_and_is_heard(stand_in, capfd):
    folder = stand_in('[ $RANK = 1 ] && { echo "out of memory" >&2; exit 3; }; echo $$ > pid; exec sleep 60')
    began = time.monotonic()
    assert processes.launch([], 2) == 3
    assert time.monotonic() - began < 20
    assert "process 2 of 2 failed. out of memory" in capfd.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_once(stand_in, number):
    folder = stand_in(
        'trap "echo asked >> asked-$RANK; sleep 1; exit 130" INT TERM; touch ready-$RANK\n'
        "while true; do sleep 0.1; done"
    )
    before = signal.getsignal(number)

    def send() -> None:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert processes.launch([], 2) == 130
    thread.join()
    assert [(folder / f"asked-{n}").read_text() for n in range(2)] == ["asked\n"] * 2
    assert signal.getsignal(number) is before


def test_the_command_refuses_what_cannot_be_shared_out_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "launch", lambda arguments, count: 7)
    data = tmp_path / "molecules.smi"
    data.write_text("CCO\nCCN\n")
    command = ["train", "chem-xlstm", str(data), "--out", str(tmp_path / "run"), "--processes", "3"]
    assert main(command) == 1
    assert "plain engine" in capsys.readouterr().err
    assert main([*command, "--engine", "deepspeed", "--set", "training.accumulation=4"]) == 1
    assert "accumulation is 4" in capsys.readouterr().err
    assert main([*command, "--engine", "deepspeed", "--set", "training.accumulation=6"]) == 7
    assert not (tmp_path / "run").exists()


def test_the_launcher_of_deepspeed_may_say_the_rank(capsys):
    assert main(["--local_rank=0", "--version"]) == 0
    assert "processive" in capsys.readouterr().out

"""What the user sees of an error: one line, a fitting exit status, a traceback only on request."""

from __future__ import annotations

import errno
import logging
import warnings

import pytest
from processive.cli import main
from processive.cli.report import Stopped, exit_status, explain, messages_as_lines
from processive.errors import ConfigError, InputError, MissingExtra


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("'J' is no residue.", path="a.fasta", record=3), "a.fasta, record 3: 'J' is no residue."),
        (ConfigError("two\nlines  here"), "two lines here"),
        (MissingExtra("rdkit", "chem"), "rdkit is needed here and is not installed: pip install 'processive[chem]'"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (chained(RuntimeError("cannot close"), OSError(errno.ENOSPC, "full")), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied."),
        (MemoryError("7 GB"), "Not enough memory (7 GB)"),
        (KeyError("layer"), "Unexpected KeyError: 'layer'. Run again with --debug"),
        (KeyboardInterrupt(), "Interrupted."),
    ],
)
def test_one_line(error: BaseException, line: str) -> None:
    assert explain(error).startswith(line)
    assert "\n" not in explain(error)


def test_exit_status() -> None:
    assert [exit_status(e) for e in (ConfigError(""), KeyboardInterrupt(), Stopped(""))] == [1, 130, 130]


def test_warnings_and_messages_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_as_lines(debug=False):
        warnings.warn("3 of 300 records\ncannot be used", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("processive.cells.tasks").info("counts found in X")
        logging.getLogger("processive.cells.tasks").debug("detail")
    logging.getLogger("processive.cells.tasks").info("after")
    assert capsys.readouterr().err.splitlines() == [
        "processive: warning: 3 of 300 records cannot be used",
        "processive: counts found in X",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["generate", "--tempreture", "1"], "No such option"),
        (["generate", "m", "-n", "0", "-o", "x.smi"], "Invalid value for '-n' / '--count'"),
        (["embed"], "Missing argument 'MODEL'. See: processive embed --help"),
        (["embed", "m", "x", "-o", "y.npz", "--pooling", "max"], "'max' is not one of 'mean', 'last'"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("processive: ")
    assert said in line


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "/no/such/folder"]) == 1
    assert capsys.readouterr().err == (
        "processive: /no/such/folder: There is no such folder. Name the folder that holds your models.\n"
    )
    assert main(["models", "/no/such/folder", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("processive 0.")


def test_no_verb_shows_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out

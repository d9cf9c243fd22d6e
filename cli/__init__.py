"""The command line: one file per verb, each a thin call of what Python offers under the same name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from .embed import embed
from .generate import generate
from .inputs import COMMAND
from .models import models
from .predict import predict
from .report import exit_status, messages_as_lines, say, say_error
from .score import score
from .tokenize import tokenize
from .train import train

__all__ = ["main"]

EXAMPLES: dict[Callable[..., None], str] = {
    train: "processive train chem-xlstm molecules.smi --out runs/chem",
    tokenize: "processive tokenize molecules.smi.gz --recipe chem-xlstm --out molecules.store --workers 8",
    generate: "processive generate runs/chem -n 1000 -o designs.smi --temperature 0.9",
    embed: "processive embed runs/protein proteins.fasta -o embeddings.npz",
    score: "processive score runs/protein proteins.fasta -o scores.csv --variants A42G,K7E",
    predict: "processive predict runs/solubility molecules.smi -o predictions.csv",
}

LAUNCHER = ("--local_rank=", "--local-rank=")  # DeepSpeed's launcher puts it before the verb; LOCAL_RANK says it too

app = typer.Typer(
    name="processive",
    help="Foundation models for DNA, proteins, small molecules and single cells.",
    epilog="Each verb shows an example: processive generate --help",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb, example in EXAMPLES.items():
    app.command(epilog=f"Example: {example}")(verb)
app.add_typer(models, name="models", epilog="Example: processive models runs, processive models describe runs/chem")


def _show_version(asked: bool) -> bool:
    if asked:
        from importlib import metadata

        print(f"processive {metadata.version('processive')}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; may stand anywhere.")] = False,
) -> None:
    """Take the options that stand before the verb; ``main`` has acted on them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    An error is one line on stderr; ``--debug``, wherever it stands, puts the traceback before it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    ours = [a for a in arguments if a != "--debug" and not a.startswith(LAUNCHER)]
    arguments = ours or ["--help"]
    COMMAND.set(tuple(arguments))
    try:
        with messages_as_lines(debug=debug):
            status = app(arguments, prog_name="processive", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "format_message"):  # typer's own errors; which class that is depends on its version
            command = getattr(getattr(error, "ctx", None), "command_path", "processive")
            say(f"{error.format_message().rstrip('.')}. See: {command} --help")
            return 2
        say_error(error, debug=debug)
        return exit_status(error)
    if status == exit_status(KeyboardInterrupt()):  # newer versions of typer turn Ctrl-C into a status
        say("Interrupted.")
    return int(status or 0)

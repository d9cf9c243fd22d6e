"""processive generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .inputs import DeviceOption, ModelArgument, domain_module, load_model


def generate(
    model: ModelArgument,
    *,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many sequences.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Result: .smi, .fasta, .txt, .csv, .tsv, .parquet.")],
    temperature: Annotated[float, typer.Option(help="Below 1: likelier and less varied. Above 1: the contrary.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of this joint share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one.")] = None,
    prefix: Annotated[str, typer.Option(help="How every sequence begins.")] = "",
    suffix: Annotated[
        str, typer.Option(help="How every sequence ends; a model that fills in writes what lies between.")
    ] = "",
    gap: Annotated[
        int | None, typer.Option(min=1, help="Residues (tokens) between the two, for a causal model that fills in.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same sequences.")] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Generate new molecules or sequences and write them to a file."""
    from .outputs import SEQUENCES, check_output, write_sequences

    check_output(output, SEQUENCES)
    loaded = load_model(model, device)
    domain = loaded.tokenizer.domain
    if domain == "cells":
        raise ConfigError(f"{model} is a model of cells, which cannot be generated. Try: processive embed")
    sequences = domain_module(domain).generate(
        loaded,
        count,
        prompts=[prefix] if prefix else None,
        suffixes=suffix or None,
        gaps=gap,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_length=max_length,
        seed=seed,
        progress=True,
    )
    write_sequences(output, sequences, prefix=loaded.name, column="smiles" if domain == "chem" else "sequence")
    print(f"{len(sequences)} sequences are in {output}.")

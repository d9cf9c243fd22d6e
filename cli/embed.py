"""processive embed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .inputs import (
    DeviceOption,
    InputArgument,
    ModelArgument,
    OnErrorOption,
    cell_columns,
    domain_module,
    load_model,
    read_records,
    record_columns,
)

if TYPE_CHECKING:
    from ..models import LanguageModel

Pooling = Literal["mean", "last", "tokens"]


def embed(
    model: ModelArgument,
    data: InputArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Result: .npz, .h5ad, .csv, .tsv or .parquet.")],
    layer: Annotated[int, typer.Option(help="Which hidden layer: 0 the token embeddings, -1 the last.")] = -1,
    pooling: Annotated[
        Pooling, typer.Option(help="Mean over a record's tokens, its last one, or each (.npz).")
    ] = "mean",
    on_error: OnErrorOption = "raise",
    device: DeviceOption = "cpu",
) -> None:
    """Embed every record of a file: one vector each, in the order of the file."""
    from .outputs import EMBEDDINGS, check_output, write_embeddings, write_token_embeddings

    check_output(output, EMBEDDINGS if pooling != "tokens" else (".npz",))
    loaded = load_model(model, device)
    domain = loaded.tokenizer.domain
    if domain == "cells":
        count = _embed_cells(loaded, data, output, layer=layer, pooling=pooling)
    else:
        records = read_records(data, loaded.tokenizer, on_error)
        vectors = domain_module(domain).embed(records, loaded, layer=layer, pooling=pooling, progress=True)
        write = write_token_embeddings if pooling == "tokens" else write_embeddings
        write(output, record_columns(records, domain), vectors)
        count = len(records)
    print(f"Embeddings of {count} records, width {loaded.width}, are in {output}.")


def _embed_cells(model: LanguageModel, data: Path, output: Path, *, layer: int, pooling: Pooling) -> int:
    """Write the AnnData with the embedding in it, or the embedding alone; return the number of cells."""
    import numpy as np

    from .outputs import write_embeddings

    cells = domain_module("cells")
    adata = cells.read(data)
    cells.embed(adata, model, layer=layer, pooling=pooling, progress=True)
    if output.suffix == ".h5ad":
        cells.write_h5ad(output, adata)
    else:
        vectors = adata.obsm[f"X_{model.name}"]
        usable = (~np.isnan(vectors).any(axis=1)).tolist()
        write_embeddings(output, cell_columns(adata.obs_names.tolist(), usable), vectors)
    return int(adata.n_obs)

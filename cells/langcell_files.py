"""LangCell as a folder: ours (JSON and one file of weights), and its authors' (two BERTs and three linear maps)."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..backbones import TransformerConfig, config_from_dict, config_to_dict, from_plain
from ..backbones.formats.langcell import CELL_BERT, CELL_FOLDER, MAPS, TEXT_BERT, TEXT_FOLDER, linear_map
from ..backbones.formats.table import Checkpoint, CheckpointFormat, Parts, to_ours, to_theirs
from ..backbones.formats.tokenizers import GENES_HINT, OURS, find_gene_table, gene_table, to_json
from ..errors import ConfigError, InputError
from ..models import ModelCard
from ..models.files import read_weights
from ..models.foreign import Found, Reading, read_settings
from ..models.weights import find_weights, open_weights
from ..sequences import TextTokenizer, check_file, replacing
from .langcell import LangCell
from .tokenizer import RankTokenizer

FORMAT, KIND, FOREIGN = 1, "langcell", "langcell"
ADDED_WORDS = ("[DEC]", "[ENC]")  # behind PubMedBERT's own
CLS = "<cls>"  # behind Geneformer's own

PARTS = ("genes", "words", "cell", "text", "channels", "card", "name")


def save(model: LangCell, folder: str | Path) -> None:
    """Write ``model`` to ``folder`` in our own format."""
    folder = Path(folder)
    config = {"format": FORMAT, "kind": KIND, "name": model.name, **model.parts(), "card": asdict(model.card)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "config.json") as config_file, replacing(folder / "model.safetensors") as weights_file:
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def load(folder: str | Path, *, device: str | torch.device, dtype: torch.dtype | None) -> LangCell:
    """Read a model; see ``LangCell.load``."""
    folder = Path(folder)
    if (folder / CELL_FOLDER).is_dir():
        return _load_theirs(folder, device=device, dtype=dtype)
    path = check_file(folder / "config.json")
    config = read_settings(folder)
    if config.get("kind") != KIND or config.get("format") != FORMAT or not set(PARTS) <= set(config):
        raise InputError("This is not the configuration of a LangCell model that this version reads.", path=path)
    try:
        model = _built(
            RankTokenizer.from_dict(config["genes"]), TextTokenizer.from_dict(config["words"]),
            config["cell"], config["text"], channels=config["channels"], name=config["name"],
            card=from_plain(ModelCard, config["card"], what="card"),
        )  # fmt: skip
    except ConfigError as error:
        raise InputError(str(error), path=path) from None
    own = model.state_dict()
    tensors = read_weights(folder / "model.safetensors", own, dict.fromkeys(own, dtype), device=device)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _load_theirs(folder: Path, *, device: str | torch.device, dtype: torch.dtype | None) -> LangCell:
    with ExitStack() as stack:
        readings = {}
        for name, format in _formats().items():
            path = folder / name
            if not path.exists():
                raise InputError(f"There is no {name}.", path=folder, hint="LangCell's folder has five parts.")
            config = read_settings(path) if path.is_dir() else {}
            weights = stack.enter_context(open_weights(find_weights(path)))
            readings[name] = Reading(format, Found(path, config, weights))
        parts = {name: reading.parts() for name, reading in readings.items()}
        cell, text = parts[CELL_FOLDER]["backbone"], parts[TEXT_FOLDER]["backbone"]
        channels = readings["cell_proj.bin"].found.weights.shapes.get("bias", (0,))[0]
        try:
            genes, words = _genes_in(folder, cell["max_positions"]), _words_in(folder, text["vocabulary_size"])
            model = _built(genes, words, cell, text, channels=channels, name=folder.resolve().name, card=ModelCard())
        except ConfigError as error:
            raise InputError(str(error), path=folder) from None
        own, tensors = model.state_dict(), {}
        for name, reading in readings.items():
            entries = reading.format.table(parts[name])
            reading.check(parts[name], entries, own)
            tensors.update(to_ours(entries, reading.tensor))
        # Copies, as what was read lies in mapped files.
        copies = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _built(
    genes: RankTokenizer,
    words: TextTokenizer,
    cell: dict[str, Any],
    text: dict[str, Any],
    *,
    channels: int,
    name: str,
    card: ModelCard,
) -> LangCell:
    of_cells, of_texts = config_from_dict(cell), config_from_dict(text)
    if not isinstance(of_cells, TransformerConfig) or not isinstance(of_texts, TransformerConfig):
        raise ConfigError("LangCell is made of two transformers.")
    with torch.device("meta"):
        return LangCell(genes, words, of_cells, of_texts, channels=channels, name=name, card=card)


def _genes_in(folder: Path, most_tokens: int) -> RankTokenizer:
    """Genes of a table beside the weights, of which the token before each cell is no part."""
    path = find_gene_table(folder) or find_gene_table(folder / CELL_FOLDER)
    if path is None:
        raise InputError("There is no table of genes beside the weights.", path=folder, hint=GENES_HINT)
    genes = RankTokenizer.from_table(path)
    if CLS in genes.vocabulary.ids:
        return RankTokenizer.from_table(path, most_tokens=most_tokens)
    return RankTokenizer.from_table(path, most_tokens=most_tokens, added=[CLS])


def _words_in(folder: Path, embeddings: int) -> TextTokenizer:
    for place in (folder / TEXT_FOLDER, folder):
        if (place / OURS).is_file():
            return TextTokenizer.from_dict(json.loads((place / OURS).read_text(encoding="utf-8")))
        if (place / "tokenizer.json").is_file():
            return TextTokenizer.from_folder(place)
        if (place / "vocab.txt").is_file():
            tokenizer = TextTokenizer.from_wordpiece(place / "vocab.txt")
            more = embeddings >= len(tokenizer.vocabulary) + len(ADDED_WORDS)
            return TextTokenizer.from_wordpiece(place / "vocab.txt", added=ADDED_WORDS) if more else tokenizer
    raise InputError(
        "There is no tokenizer of texts.",
        path=folder / TEXT_FOLDER,
        hint="Put vocab.txt of microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext there.",
    )


def _formats() -> dict[str, CheckpointFormat]:
    maps = {name: linear_map(own) for name, own in MAPS.items()}
    return {CELL_FOLDER: CELL_BERT, TEXT_FOLDER: TEXT_BERT, **maps}


def save_as(model: LangCell, folder: str | Path, format: str) -> None:
    """Write ``model`` as its authors' code reads it; older files go when all are written."""
    if format != FOREIGN:
        raise ConfigError(f"LangCell is written in the format {FOREIGN!r}, not {format!r}.")
    folder = Path(folder)
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    parts: dict[str, Parts] = {name: {} for name in MAPS}
    parts[CELL_FOLDER] = {"backbone": config_to_dict(model.cell.config)}
    parts[TEXT_FOLDER] = {"backbone": config_to_dict(model.text.config)}
    texts = {f"{TEXT_FOLDER}/{name}": text for name, text in model.words.to_files().items()}
    files: dict[str, Any] = {**texts, "gene_table.tsv": gene_table(model.genes.genes.to_dict())}
    for name, chosen in _formats().items():
        tensors = to_theirs(chosen.table(parts[name]), own)
        if name in MAPS:
            files[name] = tensors
            continue
        config = chosen.config_out(parts[name])
        _check(chosen, parts[name], config, tensors)
        files[f"{name}/model.safetensors"] = tensors
        files[f"{name}/config.json"] = to_json(config)
    with ExitStack() as stack:
        places = {name: stack.enter_context(replacing(folder / name)) for name in files}
        for name, content in files.items():
            _write(places[name], content)


def _check(chosen: CheckpointFormat, parts: Parts, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Read a configuration back before it is written: what a BERT has no place for would be lost without a word."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        back = chosen.config_in(Checkpoint(Path(), config, shapes))["backbone"]
    except InputError as error:
        raise ConfigError(f"LangCell's format cannot hold this model: {error.reason}") from None
    wanted, found = config_from_dict(parts["backbone"]), config_from_dict(back)
    assert isinstance(wanted, TransformerConfig)
    wanted = replace(wanted, feed_forward_width=wanted.inner)
    for field in fields(wanted):
        value, other = getattr(wanted, field.name), getattr(found, field.name)
        if value != other:
            raise ConfigError(
                f"LangCell's format cannot hold this model: {field.name} is {value!r} and would become {other!r}."
            )


def _write(path: Path, content: str | bytes | dict[str, Tensor]) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save({name: tensor.clone() for name, tensor in content.items()}, path)

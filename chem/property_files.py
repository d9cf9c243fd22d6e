"""A property predictor as a folder: JSON for what it is, safetensors for the numbers, Markdown for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..models import ModelCard
from ..models.card import card_text, installed_versions
from ..sequences import check_file, replacing
from .descriptors import Scaling

if TYPE_CHECKING:
    from .properties import PropertyPredictor
else:
    PropertyPredictor = object

KIND, FORMAT = "molecule-property", 1
Predictor = TypeVar("Predictor", bound="PropertyPredictor")


def save_predictor(predictor: PropertyPredictor, folder: str | Path) -> None:
    """Write a fitted predictor; its three files replace older ones only when all three are written."""
    folder = Path(folder)
    last = {name: value for name, value in predictor.history_[-1].items() if name != "network"}
    card = ModelCard(
        description=f"Predicts {predictor.tasks_} molecular properties ({predictor.task}) from SMILES.",
        data={"molecules": predictor.molecules_},
        recipe=predictor.get_params(),
        metrics=last,
        parameters=sum(weight.numel() for network in predictor.networks_ for weight in network.parameters()),
        versions=installed_versions(),
    )
    config = {
        "format": FORMAT,
        "kind": KIND,
        "params": {**predictor.get_params(), "device": "cpu"},
        "tasks": predictor.tasks_,
        "single": predictor.single_,
        "descriptors": list(predictor.descriptor_names_),
        "molecules": predictor.molecules_,
        "history": predictor.history_,
        "card": asdict(card),
    }
    tensors = {
        f"networks.{member}.{name}": tensor.detach().cpu().contiguous()
        for member, network in enumerate(predictor.networks_)
        for name, tensor in network.state_dict().items()
    }
    numbers = {**vars(predictor.scaling_), "target_mean": predictor.mean_, "target_scale": predictor.scale_}
    tensors |= {f"scaling.{name}": torch.from_numpy(np.array(values)) for name, values in numbers.items()}
    readme = card_text("Molecular property predictor", card, {})
    readme = readme.replace("import processive as pv", "from processive import chem")
    readme = readme.replace("pv.load(", "chem.PropertyPredictor.load(")
    # Left in reverse order: config.json takes its place last, so that a folder with one is whole.
    with (
        replacing(folder / "config.json") as config_file,
        replacing(folder / "README.md") as readme_file,
        replacing(folder / "model.safetensors") as weights_file,
    ):
        save_file(tensors, weights_file)
        readme_file.write_text(readme, encoding="utf-8")
        config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")
        weights_file.chmod(config_file.stat().st_mode)  # safetensors leaves it to its owner alone


def load_predictor(cls: type[Predictor], folder: str | Path, *, device: str) -> Predictor:
    """Read what ``save_predictor`` wrote.

    Raises:
        InputError: a file is missing, damaged, or of another kind or format.
    """
    path = check_file(Path(folder) / "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["kind"] != KIND:
            raise InputError(f"This is a {config['kind']} model, not a {KIND} model.", path=path)
        if config["format"] != FORMAT:
            raise InputError(f"The model has format {config['format']}; this version reads {FORMAT}.", path=path)
        predictor = cls(**{**config["params"], "device": device})
        predictor.tasks_, predictor.single_ = config["tasks"], config["single"]
        predictor.descriptor_names_ = tuple(config["descriptors"])
        predictor.molecules_, predictor.history_ = config["molecules"], config["history"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"This is not a predictor's config ({type(error).__name__}: {error}).", path=path) from None
    weights = check_file(Path(folder) / "model.safetensors")
    try:
        tensors = load_file(weights)
        numbers = {name: tensors[f"scaling.{name}"].numpy() for name in ("low", "high", "mean", "scale")}
        predictor.scaling_ = Scaling(**numbers)
        predictor.mean_ = tensors["scaling.target_mean"].numpy()
        predictor.scale_ = tensors["scaling.target_scale"].numpy()
        predictor.networks_ = []
        for member in range(predictor.ensemble):
            network = predictor.new_network()
            start = f"networks.{member}."
            network.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            predictor.networks_.append(network.to(device).eval())
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"The weights do not fit config.json or are damaged ({error}).", path=weights) from None
    return predictor

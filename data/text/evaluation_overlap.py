"""Finds text of evaluation tasks in training documents, by n-grams of words.

Brown et al. 2020 (GPT-3), appendix C: a document that shares a 13-gram with a task's text is contaminated;
texts of 8 to 12 words must match as a whole, shorter ones are ignored. The whole document is removed. This
loses more text than cutting a window out of it, but can't leave half a question behind.
"""

import glob
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.words import hash_ngrams, hash_words
from train.recipe.errors import UserError

FEWEST_WORDS = 8
SUFFIXES = (".jsonl", ".json", ".txt")


class EvaluationTexts:
    """The n-grams of all task files, by number of words."""

    def __init__(self, files: tuple[str, ...], ngram: int) -> None:
        found: dict[int, list[NDArray[np.uint64]]] = {}
        for file in files:
            for text in _texts(Path(file)):
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
    """Lists a recipe's task files, in order.

    Raises:
        UserError: if a pattern matches no file, or a file can't be read.
    """
    files: list[str] = []
    for pattern in patterns:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  (may be absolute)
        found = [
            file for place in found for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
        ]
        chosen = [str(file) for file in found if file.suffix in SUFFIXES and file.is_file()]
        if not chosen:
            raise UserError(
                f"{pattern} matches no file with suffix {', '.join(SUFFIXES)}",
                key="data.preparation.evaluation_texts",
                remedy="correct or remove the path",
            )
        files += chosen
    for file in files:
        try:
            for _ in _texts(Path(file)):
                pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} can't be read ({error})",
                key="data.preparation.evaluation_texts",
                remedy="task files must be UTF-8: JSON Lines, JSON or plain lines",
            ) from None
    return tuple(files)


def _texts(file: Path) -> Iterator[str]:
    """Yields every string in a task file."""
    content = file.read_text("utf-8")
    if file.suffix == ".json":
        yield from _strings(json.loads(content))
    else:
        for line in content.split("\n"):
            if line.strip():
                yield from _strings(json.loads(line)) if file.suffix == ".jsonl" else (line,)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(item)

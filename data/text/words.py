"""Hashes of words and of their n-grams, by which the similarity of texts is measured."""

import re
import zlib

import numpy as np
from numpy.typing import NDArray

# W words, G n-grams.

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# Languages without spaces: each character is a word; otherwise a sentence would be one word.
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_REMEMBERED = 500_000
_LONGEST_REMEMBERED = 64
"""Characters of a word whose hash is kept: a run of letters may be as long as a document."""


class _Hashes(dict[str, int]):
    """Cached CRC-32 of words; the same on every machine, unlike Python's hash."""

    def __missing__(self, word: str) -> int:
        value = zlib.crc32(word.encode())
        if len(word) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = value
        return value


_hashes = _Hashes()


def hash_words(text: str) -> NDArray[np.uint64]:
    """Hashes the words of a text [W], in order; ignores case and punctuation."""
    return np.fromiter(map(_hashes.__getitem__, _WORD.findall(text.lower())), np.uint64)


def hash_ngrams(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hashes the n-grams of words [G = W - n + 1]; a text of fewer words is one n-gram.

    Args:
        words: hashes of the words [W].
        n: words per n-gram.
    """
    if not words.size:
        return words
    n = min(n, words.size)
    length = words.size - n + 1
    hashes = np.zeros(length, np.uint64)
    for at in range(n):
        hashes = mix(hashes * _FACTOR + words[at : at + length])
    return hashes


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads each value over all 64 bits (a step of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    return values ^ (values >> np.uint64(27))

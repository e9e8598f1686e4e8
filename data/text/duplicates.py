"""Exact and near duplicates of documents, independent of the number of workers.

MinHash (Broder 1997) over five-word sequences, as in Lee et al. 2022 ("Deduplicating Training Data Makes
Language Models Better", section 4.2); signatures are datasketch's. Signatures are
computed per chunk. The lookup goes through the bands one by one, in one process. Each document of a bucket is
compared with the bucket's first and with the previous one, in the order of the sources, so the result does
not depend on timing. Memory: 60 bytes per document, whatever its length; the signatures, 512 bytes each, stay
on disk.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.words import hash_ngrams, mix

# N documents, P permutations of a signature, B bands of R of them.

PERMUTATIONS = 128
SHINGLE_WORDS = 5
SAME_SIDE = 0.5
"""Documents of at least this Jaccard similarity go to the same split, train or validation."""
BANDS, BAND_ROWS = 25, 5
"""Bands of a signature, and values of a band: what datasketch's MinHashLSH takes for `SAME_SIDE`."""
_BLOCK = 8192


@dataclass(frozen=True)
class Resolution:
    """Copies and groups of similar documents."""

    keeper: NDArray[np.int64]
    """The document kept for each document [N]: itself, or the first of its copies."""
    is_exact: NDArray[np.bool_]
    """True [N] if the text equals the keeper's, byte for byte."""
    group: NDArray[np.int64]
    """A number [N], equal for documents that are similar or connected by a chain of similar ones."""


def sketch(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Computes the MinHash signature [P] of a text.

    Args:
        words: hashes of its words, see :func:`data.text.words.hash_words`.
    """
    from datasketch import MinHash

    shingles = np.unique(hash_ngrams(words, SHINGLE_WORDS).astype(np.uint32))
    made = MinHash(num_perm=PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    for start in range(0, shingles.size, _BLOCK):
        made.update_batch(shingles[start : start + _BLOCK].tolist())
    return np.asarray(made.hashvalues, np.uint32)


def sketch_without_words(text: str) -> NDArray[np.uint32]:
    """Returns a signature [P] for a text without words, such as a run of signs; only equal texts share it."""
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(4 * PERMUTATIONS), "<u4").astype(np.uint32)


def resolve(digests: NDArray[np.uint64], signatures: NDArray[np.uint32], near: float | None) -> Resolution:
    """Finds copies and groups of similar documents.

    Args:
        digests: the first 16 bytes of each text's SHA-256 [N, 2].
        signatures: [N, P], in memory or mapped from disk.
        near: minimum Jaccard similarity of copies; None: only equal texts are copies.
    """
    count = len(digests)
    order = np.lexsort((np.arange(count), digests[:, 1], digests[:, 0]))
    is_new = np.r_[True, (digests[order][1:] != digests[order][:-1]).any(1)][:count]
    first = np.empty(count, np.int64)
    first[order] = order[np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    distinct = np.flatnonzero(first == np.arange(count))
    pairs, likeness = _alike(signatures, distinct)
    is_near = likeness >= near if near is not None else np.zeros(len(pairs), bool)
    near_first = _first_of_component(pairs[is_near], count)
    return Resolution(near_first[first], first != np.arange(count), _first_of_component(pairs, count)[first])


def _alike(
    signatures: NDArray[np.uint32], distinct: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Finds pairs [M, 2] of similar documents, and their similarity [M]."""
    found = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        rows = signatures[distinct, band * BAND_ROWS : (band + 1) * BAND_ROWS]
        keys = np.zeros(len(rows), np.uint64)
        for column in rows.T:
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + column)
        order = np.argsort(keys, kind="stable")
        follows = np.r_[False, keys[order][1:] == keys[order][:-1]][: len(order)]
        bucket = np.maximum.accumulate(np.where(follows, 0, np.arange(len(order))))
        at = np.flatnonzero(follows)
        mates = [(order[bucket[at]], order[at]), (order[at - 1], order[at])]
        found.append(np.concatenate([distinct[np.stack(pair, 1)] for pair in mates]))
        found = [np.unique(np.concatenate(found), axis=0)]
    pairs = found[0]
    likeness = np.array(
        [
            same
            for start in range(0, len(pairs), _BLOCK)
            for same in _estimate(signatures, pairs[start : start + _BLOCK]).tolist()
        ]
    )
    enough = likeness >= SAME_SIDE
    return pairs[enough], likeness[enough]


def _estimate(signatures: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    same: NDArray[np.float64] = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(1)
    return same


def _first_of_component(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The lowest document number in each document's connected component."""
    least = np.arange(count)
    while True:
        roots = least[pairs]
        lowest = roots.min(1)
        joined = least.copy()
        for end in (0, 1):
            np.minimum.at(joined, roots[:, end], lowest)
        joined = joined[joined]
        if np.array_equal(joined, least):
            return least
        least = joined


@lru_cache(maxsize=1)
def _permutations() -> Any:
    """Datasketch's permutations for its default seed, drawn once instead of once per document."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS).permutations

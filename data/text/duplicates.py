"""Exact and near duplicates of documents: their sketches, and the verdicts on a sample that fits into memory.

MinHash (Broder 1997) over five-word sequences, as in Lee et al. 2022 ("Deduplicating Training Data Makes
Language Models Better", section 4.2), with datasketch's permutations. Each of 128 gives four values, the
least hash of each quarter of the sequences (as in one permutation hashing, Li et al. 2012). A sketch keeps
a byte of each value, which estimates the similarity nearly as well as all four would (b-bit MinHash, Li and
König 2010): with the same 512 bytes, the error is half that of 128 whole values. Documents that agree in
one of 25 bands of five values are compared (LSH): within a bucket each with the first and with the previous
one, in the order of the sources, so the result does not depend on timing.

:mod:`data.text.find_duplicates` does the same for any number of documents, in files.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.text.words import hash_ngrams, mix

# N documents, P permutations of a signature, B bands of R of them.

PARTS = 4
"""Parts of a set of sequences, by two bits of their hashes."""
PERMUTATIONS = 128 * PARTS
"""Values of a signature: the least hash of each part under each of 128 permutations."""
SHINGLE_WORDS = 5
SAME_SIDE = 0.5
"""Documents of at least this Jaccard similarity go to the same split, train or validation."""
BANDS, BAND_ROWS = 25, 5
"""Bands of a signature, and values of a band."""
SKETCH = np.dtype([("bands", "<u8", (BANDS,)), ("values", "u1", (PERMUTATIONS,))])
"""A document's sketch: a hash of each band, and a byte of each of the least hashes."""
PARAMETERS = {
    "version": 1,
    "values": PERMUTATIONS,
    "parts": PARTS,
    "shingle_words": SHINGLE_WORDS,
    "bands": BANDS,
    "band_rows": BAND_ROWS,
    "value_bits": 8,
}
"""All on which sketches depend: only those of equal parameters can be compared."""
_BLOCK = 8192
_PRODUCTS = 32_768
"""Hashes computed at once, few enough for a cache of the processor."""


@dataclass(frozen=True)
class Resolution:
    """Copies and groups of similar documents."""

    keeper: NDArray[np.int64]
    """The document kept for each document [N]: itself, or the first of its copies."""
    is_exact: NDArray[np.bool_]
    """True [N] if the text equals the keeper's, byte for byte."""
    group: NDArray[np.int64]
    """A number [N], equal for documents that are similar or connected by a chain of similar ones."""


def sketch(words: NDArray[np.uint64]) -> NDArray[np.void]:
    """Computes the sketch [1] of a text.

    Args:
        words: hashes of its words, see :func:`data.text.words.hash_words`.
    """
    return _sketch_of(signature(hash_ngrams(words, SHINGLE_WORDS)))


def signature(shingles: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Computes the least hash of each part of a set under each permutation [P]; of an empty set, all bits.

    Args:
        shingles: hashes of its elements, in any order, also several times.
    """
    factors, summands = _permutations()
    least = np.full((factors.size, PARTS), 0xFFFFFFFF, np.uint32)
    part_of = shingles >> np.uint64(64 - PARTS.bit_length() + 1)
    # Equal ones are rare: sorting them out would take longer than hashing them twice.
    hashes = _finalise(shingles.astype(np.uint32))
    parts = [hashes[part_of == part] for part in range(PARTS)]
    there = [part for part in range(PARTS) if parts[part].size]
    for part in there:
        _lower(least[:, part], parts[part], factors, summands)
    for part in range(PARTS):
        if there and part not in there:  # Of few words: the next part stands in.
            least[:, part] = least[:, next((it for it in there if it > part), there[0])]
    return least.ravel()


def _lower(
    least: NDArray[np.uint32],
    hashes: NDArray[np.uint32],
    factors: NDArray[np.uint32],
    summands: NDArray[np.uint32],
) -> None:
    """Lowers values to the least of some hashes under each permutation."""
    rows = max(_PRODUCTS // hashes.size, 4)
    for start in range(0, hashes.size, _PRODUCTS):
        some = hashes[start : start + _PRODUCTS]
        for at in range(0, factors.size, rows):
            products = factors[at : at + rows, None] * some
            products += summands[at : at + rows, None]
            np.minimum(least[at : at + rows], products.min(1), out=least[at : at + rows])


def sketch_without_words(text: str) -> NDArray[np.void]:
    """Returns a sketch [1] for a text without words, such as a run of signs; only equal texts share it."""
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(SKETCH.itemsize), SKETCH)


def matches_of(similarity: float) -> int:
    """The least number of equal values of two sketches by which a Jaccard similarity is estimated."""
    # Of values that differ, one in 256 has the same byte.
    return int(np.ceil(PERMUTATIONS * (similarity + (1 - similarity) / 256) - 1e-9))


def resolve(digests: NDArray[np.uint64], sketches: NDArray[np.void], near: float | None) -> Resolution:
    """Finds copies and groups of similar documents.

    Args:
        digests: the first 16 bytes of each text's SHA-256 [N, 2].
        sketches: [N].
        near: minimum Jaccard similarity of copies; None: only equal texts are copies.
    """
    count = len(digests)
    order = np.lexsort((np.arange(count), digests[:, 1], digests[:, 0]))
    is_new = np.r_[True, (digests[order][1:] != digests[order][:-1]).any(1)][:count]
    first = np.empty(count, np.int64)
    first[order] = order[np.flatnonzero(is_new)][np.cumsum(is_new) - 1]
    pairs, matches = _alike(sketches, np.flatnonzero(first == np.arange(count)))
    is_near = matches >= matches_of(near) if near is not None else np.zeros(len(pairs), bool)
    near_first = first_of_component(pairs[is_near], count)
    return Resolution(near_first[first], first != np.arange(count), first_of_component(pairs, count)[first])


def _alike(
    sketches: NDArray[np.void], distinct: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Finds pairs [M, 2] of similar documents, and the number of values that they share [M]."""
    found = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        keys = sketches["bands"][distinct, band]
        order = np.argsort(keys, kind="stable")
        follows = np.r_[False, keys[order][1:] == keys[order][:-1]][: len(order)]
        bucket = np.maximum.accumulate(np.where(follows, 0, np.arange(len(order))))
        at = np.flatnonzero(follows)
        mates = [(order[bucket[at]], order[at]), (order[at - 1], order[at])]
        found.append(np.concatenate([distinct[np.stack(pair, 1)] for pair in mates]))
        found = [np.unique(np.concatenate(found), axis=0)]
    pairs = found[0]
    values = sketches["values"]
    blocks = [pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK)]
    same = [(values[block[:, 0]] == values[block[:, 1]]).sum(1) for block in blocks]
    matches = np.concatenate([np.empty(0, np.int64), *same])
    enough = matches >= matches_of(SAME_SIDE)
    return pairs[enough], matches[enough]


def first_of_component(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
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


def _sketch_of(least: NDArray[np.uint32]) -> NDArray[np.void]:
    made = np.zeros(1, SKETCH)
    keys = np.zeros(BANDS, np.uint64)
    for column in least[: BANDS * BAND_ROWS].reshape(BANDS, BAND_ROWS).T:
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + column)
    made["bands"] = keys
    made["values"] = (least * np.uint32(0x9E3779B1)) >> np.uint32(24)
    return made


def _finalise(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Spreads 32 bits (MurmurHash3's finaliser, Appleby 2011), as datasketch does before it permutes them."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


@lru_cache(maxsize=1)
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors, odd, and summands of x -> factor * x + summand, those of datasketch's `affine32`."""
    drawn = np.random.RandomState(1)
    factors = drawn.randint(0, 1 << 31, PERMUTATIONS // PARTS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, drawn.randint(0, 1 << 32, PERMUTATIONS // PARTS, dtype=np.uint32)

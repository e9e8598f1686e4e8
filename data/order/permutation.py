"""A keyed permutation of 0..size-1 without a table: any part of a shuffle is computed directly.

A Feistel network over the smallest near-square grid ``rows x columns`` that holds ``size`` points, with cycle
walking for the few points outside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", the
generalized-Feistel and cycle-walking ciphers). It is for shuffling, not for secrecy.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

ROUNDS = 4
"""Passes over both halves. Two already decorrelate neighbours; the rest is margin."""


class KeyedPermutation:
    """A bijection of 0..size-1 selected by a key; a call costs O(count) time and memory."""

    def __init__(self, size: int, *key: int | str) -> None:
        """Draws the round keys.

        Args:
            size: number of points, above 0.
            key: anything that names the permutation, for example seed, domain and epoch.
        """
        assert size > 0
        self.size = size
        rows = math.isqrt(size - 1) + 1
        self._rows = np.uint64(rows)
        self._columns = np.uint64(-(-size // rows))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        first = np.frombuffer(digest, "<u8") + np.arange(2 * ROUNDS, dtype=np.uint64)
        self._keys = mix(first)

    def __call__(self, indices: Indices) -> Indices:
        """Maps every index in 0..size-1 to its image; int64 [N] to int64 [N]."""
        points = indices.astype(np.uint64)
        assert not points.size or int(points.max()) < self.size
        images = self._encipher(points)
        size = np.uint64(self.size)
        while (outside := np.flatnonzero(images >= size)).size:
            images[outside] = self._encipher(images[outside])
        return images.astype(np.int64)

    def inverse(self, images: Indices) -> Indices:
        """Maps images back to their indices, each in 0..size-1; int64 [N] to int64 [N]."""
        points = images.astype(np.uint64)
        assert not points.size or int(points.max()) < self.size
        indices = self._decipher(points)
        size = np.uint64(self.size)
        while (outside := np.flatnonzero(indices >= size)).size:
            indices[outside] = self._decipher(indices[outside])
        return indices.astype(np.int64)

    def _encipher(self, points: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row, column = points % self._rows, points // self._rows
        half = np.uint64(32)
        for key in range(0, 2 * ROUNDS, 2):
            # 32 bits of noise: adding a coordinate cannot overflow.
            row = (row + (mix(column + self._keys[key]) >> half)) % self._rows
            column = (column + (mix(row + self._keys[key + 1]) >> half)) % self._columns
        return column * self._rows + row

    def _decipher(self, points: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row, column = points % self._rows, points // self._rows
        half = np.uint64(32)
        for key in range(2 * ROUNDS - 2, -1, -2):
            # Noise is taken modulo first: a difference below 0 would wrap around 2^64.
            noise = (mix(row + self._keys[key + 1]) >> half) % self._columns
            column = (column + self._columns - noise) % self._columns
            noise = (mix(column + self._keys[key]) >> half) % self._rows
            row = (row + self._rows - noise) % self._rows
        return column * self._rows + row


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes 64 bits: SplitMix64's output function (Steele, Lea and Flood 2014, figure 17), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

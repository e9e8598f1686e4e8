"""Random access to the samples of a folder of MDS shards, with Streaming's own readers.

Streaming's readers decode the samples. This module reads their bytes from a memory map of the shard instead
of opening the file for each sample. A shard's SHA-256 is checked before its first sample is read, once per
process.
"""

import mmap
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming.base.format import reader_from_json
from streaming.base.format.mds import MDSReader

from data.shards.cache import ShardCache
from data.shards.index import ShardFile, ShardIndex, open_index
from data.shards.manifest import REBUILD
from data.shards.open_maps import OpenMaps
from data.shards.packing import Sample, sample_of
from train.recipe.errors import UserError

OPENINGS = 5
"""Attempts to open a shard that other processes evict as soon as it is fetched."""
_OPEN = OpenMaps()
"""Of all folders of this process."""


class ShardFolder:
    """Random access to the samples of one split of one domain."""

    def __init__(
        self, folder: Path, cache: ShardCache | None = None, index: ShardIndex | None = None
    ) -> None:
        """Opens the index, but no shard.

        Args:
            folder: holds ``index.json`` and the shards.
            cache: fetches missing or altered shards; None: they are errors.
            index: the folder's index if already open; None: it is opened.
        """
        self.folder, self._cache = folder, cache
        self._index = open_index(folder) if index is None else index
        # A reader depends only on the columns, which most shards have in common.
        configs = range(len(self._index.configs))
        self._readers: list[MDSReader] = [
            reader_from_json(str(folder), None, self._index.entry(config)) for config in configs
        ]
        for reader in self._readers:
            # Pickled columns would run code from the shard.
            reader.validate(allow_unsafe_types=False)
        self._ends = np.cumsum(self._index.samples)
        self._number = _OPEN.new_folder()
        weakref.finalize(self, _OPEN.close_folder, self._number)

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Samples of each shard, in the index's order."""
        return self._index.samples

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, number: int) -> Sample:
        """Reads one sample.

        Args:
            number: in 0..len-1, counted through the shards in the index's order.
        """
        assert 0 <= number < len(self), number
        shard = self._shard_of(number)
        within = number - int(self._ends[shard] - self._index.samples[shard])
        mapped = self._map(shard)
        # An MDS file begins with the number of its samples and the offsets of each, and of the end.
        begin, end = np.frombuffer(mapped, np.uint32, count=2, offset=4 * (1 + within))
        reader = self._readers[self._index.config_of(shard)]
        return sample_of(reader.decode_sample(mapped[begin:end]))

    @property
    def open_shards(self) -> list[int]:
        """The shards that are mapped into memory now."""
        return _OPEN.shards_of(self._number)

    def file_of(self, number: int) -> ShardFile:
        """The shard that contains a sample."""
        return self._index[self._shard_of(number)]

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, "right"))

    def _map(self, shard: int) -> mmap.mmap:
        return _OPEN.get((self._number, shard)) or self._open(shard)

    def _open(self, shard: int) -> mmap.mmap:
        """Maps a shard after checking its content.

        Raises:
            UserError: one line that names the shard.
        """
        file, mismatch = self._index[shard], ""
        _OPEN.make_room()
        for _ in range(OPENINGS):
            mismatch = self._mismatch(shard)
            if not mismatch:
                try:
                    return _OPEN.put((self._number, shard), file.path)
                except FileNotFoundError:
                    continue
            if self._cache is None:
                break
            self._cache.fetch(file)
            self._let_go_of_evicted()
        raise UserError(
            f"shard {file.path} {mismatch or 'is evicted before it is read'}",
            key="data.shards" if self._cache is None else "data.cache_bytes",
            remedy=f"{REBUILD}, or set data.remote to a store to fetch it from"
            if self._cache is None
            else "raise it",
        )

    def _mismatch(self, shard: int) -> str:
        mismatch = self._index.mismatch(shard)
        if not mismatch and self._cache is not None:
            self._cache.note_use(self._index[shard])
        return mismatch

    def _let_go_of_evicted(self) -> None:
        """Closes maps of evicted shards, since only then is their disk space freed."""
        for shard in _OPEN.shards_of(self._number):
            if not self._index[shard].path.exists():
                _OPEN.close((self._number, shard))

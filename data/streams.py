"""Samples by number from a folder of MDS shards, through Streaming's own readers.

Streaming knows the format: it reads the index and decodes samples. Where a sample lies, this module
takes from a memory map of the shard, not from a file opened anew for each sample.
"""

import json
import mmap
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import numpy as np
from streaming.base.format import reader_from_json
from streaming.base.format.mds import MDSReader

from data.manifest import INDEX_FILE
from data.packing import Sample

OPEN_SHARDS = 256
"""Memory maps kept at once; each holds a file descriptor."""


class ShardFolder:
    """Random access to the samples of one split of one domain."""

    def __init__(self, folder: Path) -> None:
        """Reads the index; no shard is opened.

        Args:
            folder: holds ``index.json`` and the shards.
        """
        shards = json.loads((folder / INDEX_FILE).read_text())["shards"]
        self._readers: list[MDSReader] = [reader_from_json(str(folder), None, shard) for shard in shards]
        for reader in self._readers:
            # Pickled columns would run code from the shard.
            reader.validate(allow_unsafe_types=False)
        self._ends = list(accumulate(reader.samples for reader in self._readers))
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        """Samples in all shards."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sample:
        """Reads one sample.

        Args:
            number: in 0..len-1, counted through the shards in the index's order.
        """
        assert 0 <= number < len(self), number
        shard = bisect_right(self._ends, number)
        within = number - (self._ends[shard] - self._readers[shard].samples)
        mapped = self._map(shard)
        # An MDS file begins with the number of its samples and the offsets of each, and of the end.
        begin, end = np.frombuffer(mapped, np.uint32, count=2, offset=4 * (1 + within))
        return Sample(**self._readers[shard].decode_sample(mapped[begin:end]))

    def _map(self, shard: int) -> mmap.mmap:
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        reader = self._readers[shard]
        with Path(reader.dirname, reader.split, reader.raw_data.basename).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[shard] = mapped
        if len(self._maps) > OPEN_SHARDS:
            self._maps.popitem(last=False)[1].close()
        return mapped

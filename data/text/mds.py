"""Encodes an MDS shard, a pure function of its samples.

The bytes equal those of Streaming's ``MDSWriter`` (tests compare them), which can't start with a shard in the
middle, and whose import takes 15 s of CPU time per worker process.
"""

import hashlib
import json
from typing import Any

import numpy as np

from data.shards.packing import PIECES, Sample

SHARD_BYTES = 1 << 26
"""Approximate size of a shard file: small enough to fetch quickly, large enough for sequential reads."""
COLUMNS = ("documents", "lengths", "tokens")
"""Sorted by name, as the format requires."""
MASK = "trained"
"""The column after them, if only some tokens have a loss."""


def column_config(
    sequence_tokens: int, zstd_level: int | None = None, is_masked: bool = False
) -> dict[str, Any]:
    """Builds the part of a shard's index entry that is repeated in the shard's header.

    The first two columns differ in length from sample to sample. They are bytes, little-endian int64 and
    int32, which a default collate puts into a list; it can't stack arrays of different lengths.

    Args:
        sequence_tokens: shape of the tokens column; the first two columns store their lengths.
        zstd_level: level of the compressed file; None: there is none.
        is_masked: a bit of each token says whether it has a loss.
    """
    bits = -(-sequence_tokens // 8)
    encodings = [*("bytes" for _ in PIECES), f"ndarray:int32:{sequence_tokens}"]
    return {
        "column_encodings": [*encodings, *([f"ndarray:uint8:{bits}"] if is_masked else [])],
        "column_names": [*COLUMNS, *([MASK] if is_masked else [])],
        "column_sizes": [None, None, 4 * sequence_tokens, *([bits] if is_masked else [])],
        "compression": None if zstd_level is None else f"zstd:{zstd_level}",
        "format": "mds",
        "hashes": ["sha256"],
        "size_limit": SHARD_BYTES,
        "version": 2,
    }


def samples_per_shard(sequence_tokens: int) -> int:
    """Samples per shard except the last: a fixed number, so that shards can be written in parallel."""
    return max(1, SHARD_BYTES // (4 * sequence_tokens + 64))


def encode_shard(samples: list[Sample], sequence_tokens: int, zstd_level: int | None = None) -> bytes:
    """Encodes the uncompressed file of one shard."""
    encoded = [_encode_sample(sample) for sample in samples]
    is_masked = samples[0].trained is not None
    config = json.dumps(column_config(sequence_tokens, zstd_level, is_masked), sort_keys=True).encode()
    sizes = [4 + 4 * (len(encoded) + 1) + len(config), *map(len, encoded)]
    return b"".join(
        [np.uint32(len(encoded)).tobytes(), np.cumsum(sizes, dtype=np.uint32).tobytes(), config, *encoded]
    )


def compress_shard(content: bytes, zstd_level: int) -> bytes:
    """Compresses a shard's file, on one thread: with several, the bytes would depend on their number."""
    import zstandard

    return zstandard.ZstdCompressor(level=zstd_level).compress(content)


def index_entry(
    number: int,
    content: bytes,
    samples: int,
    sequence_tokens: int,
    packed: tuple[int, bytes] | None = None,
    is_masked: bool = False,
) -> dict[str, Any]:
    """Builds a shard's entry in the index.

    Args:
        number: the shard's number.
        content: content of its file.
        samples: number of samples in it.
        sequence_tokens: tokens per sample.
        packed: Zstandard level and content of the compressed file; None: there is none.
        is_masked: a bit of each token says whether it has a loss.
    """
    level, zipped = packed or (None, b"")
    return column_config(sequence_tokens, level, is_masked) | {
        "raw_data": _file_entry(shard_name(number), content),
        "samples": samples,
        "zip_data": _file_entry(packed_name(number), zipped) if packed else None,
    }


def index_text(entries: list[dict[str, Any]]) -> str:
    """Builds the text of ``index.json``."""
    return json.dumps({"shards": entries, "version": 2}, sort_keys=True)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard.{number:05}.mds"


def packed_name(number: int) -> str:
    """File name of a compressed shard."""
    return f"{shard_name(number)}.zstd"


def _file_entry(name: str, content: bytes) -> dict[str, Any]:
    return {
        "basename": name,
        "bytes": len(content),
        "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
    }


def _encode_sample(sample: Sample) -> bytes:
    documents, lengths = (getattr(sample, name).astype(kind).tobytes() for name, kind in PIECES.items())
    head = np.array([len(documents), len(lengths)], np.uint32).tobytes()
    mask = b"" if sample.trained is None else sample.trained.tobytes()
    return b"".join([head, documents, lengths, sample.tokens.tobytes(), mask])

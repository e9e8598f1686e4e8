"""One MDS shard as bytes, a pure function of its samples.

The same bytes as Streaming's ``MDSWriter`` gives (tests compare them), which can't begin with a shard in the
middle, and whose import takes each worker process 15 s of a core.
"""

import hashlib
import json
from typing import Any

import numpy as np

from data.packing import Sample

SHARD_BYTES = 1 << 26
"""Size of a shard file, about: small enough to fetch at once, large enough to read on."""
COLUMNS = ("documents", "lengths", "tokens")
"""In the order of their names, as the format wants them."""


def column_config(sequence_tokens: int) -> dict[str, Any]:
    """The part of a shard's entry in the index that its header repeats.

    Args:
        sequence_tokens: shape of the tokens column; the other two carry their lengths with them.
    """
    return {
        "column_encodings": ["ndarray:int64", "ndarray:int32", f"ndarray:int32:{sequence_tokens}"],
        "column_names": list(COLUMNS),
        "column_sizes": [None, None, 4 * sequence_tokens],
        "compression": None,
        "format": "mds",
        "hashes": ["sha256"],
        "size_limit": SHARD_BYTES,
        "version": 2,
    }


def samples_per_shard(sequence_tokens: int) -> int:
    """Samples of each shard but the last: a fixed number, so that shards can be written side by side."""
    return max(1, SHARD_BYTES // (4 * sequence_tokens + 64))


def encode_shard(samples: list[Sample], sequence_tokens: int) -> bytes:
    """The file of one shard."""
    encoded = [_encode_sample(sample) for sample in samples]
    config = json.dumps(column_config(sequence_tokens), sort_keys=True).encode()
    sizes = [4 + 4 * (len(encoded) + 1) + len(config), *map(len, encoded)]
    return b"".join(
        [np.uint32(len(encoded)).tobytes(), np.cumsum(sizes, dtype=np.uint32).tobytes(), config, *encoded]
    )


def index_entry(number: int, content: bytes, samples: int, sequence_tokens: int) -> dict[str, Any]:
    """What the index says of a shard."""
    raw = {
        "basename": shard_name(number),
        "bytes": len(content),
        "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
    }
    return column_config(sequence_tokens) | {"raw_data": raw, "samples": samples, "zip_data": None}


def index_text(entries: list[dict[str, Any]]) -> str:
    """The text of ``index.json``."""
    return json.dumps({"shards": entries, "version": 2}, sort_keys=True)


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard.{number:05}.mds"


def _encode_sample(sample: Sample) -> bytes:
    documents, lengths = _with_shape(sample.documents), _with_shape(sample.lengths)
    head = np.array([len(documents), len(lengths)], np.uint32).tobytes()
    return b"".join([head, documents, lengths, sample.tokens.tobytes()])


def _with_shape(array: np.ndarray[Any, Any]) -> bytes:
    """An array of one dimension, after a byte for dimensions and width, and its length."""
    width = next(code for code, bits in enumerate((8, 16, 32)) if array.size < 1 << bits)
    shape = np.array([array.size], f"uint{8 << width}").tobytes()
    return bytes([1 << 2 | width]) + shape + array.tobytes()

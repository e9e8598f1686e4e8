"""Synthetic shards: random tokens in documents of random lengths."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter

from data.shards.packing import PIECES, pack
from data.text.mds import column_config

VOCABULARY = 100_277


def write(folder: Path, *, samples: int, tokens: int, shard_bytes: int, seed: int) -> None:
    """Writes about ``samples`` sequences of ``tokens`` tokens as the shards of one domain."""
    config = column_config(tokens)
    columns = dict(zip(config["column_names"], config["column_encodings"], strict=True))
    documents = _documents(samples * tokens, np.random.default_rng(seed))
    with MDSWriter(columns=columns, out=str(folder), hashes=["sha256"], size_limit=shard_bytes) as writer:
        for sample in pack(documents, sequence_tokens=tokens, eos_id=VOCABULARY - 1, pad_id=VOCABULARY - 1):
            writer.write(vars(sample) | {name: getattr(sample, name).tobytes() for name in PIECES})


def _documents(tokens: int, rng: np.random.Generator) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Documents of 800 tokens on average."""
    number = 0
    while tokens > 0:
        size = min(tokens, 1 + int(rng.exponential(800)))
        yield number, rng.integers(0, VOCABULARY, size, dtype=np.int32)
        number, tokens = number + 1, tokens - size

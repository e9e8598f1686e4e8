"""Quality of the order against Streaming's py1e and a full random permutation."""

from collections.abc import Iterator

import numpy as np
from streaming.base.shuffle import get_shuffle

from data.order.permutation import Indices
from data.order.shard_order import Grouping, ShardOrder, ShardSizes
from launch.experiments.bench.data.figures import Figure

SHARDS, SHARD_SAMPLES = 256, 8192
"""Shards of 64 MB each, in sequences of 2048 tokens."""
WINDOW_SHARDS = 32
BLOCK = WINDOW_SHARDS * SHARD_SAMPLES
"""py1e's default block, 2^18 samples, the same as a window."""
BATCH = 2048
SEEDS = 5


def shuffle() -> list[Figure]:
    """Measures correlation with the shards' order, and neighbours that stay within a batch."""
    correlation: dict[str, list[float]] = {}
    together: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        for name, order in _orders(seed):
            assert np.array_equal(np.sort(order), np.arange(order.size)), name
            # Both are permutations, so that Pearson's coefficient is Spearman's.
            size = abs(float(np.corrcoef(order, np.arange(order.size))[0, 1]))
            correlation.setdefault(name, []).append(size)
            batch = np.empty_like(order)
            batch[order] = np.arange(order.size) // BATCH
            together.setdefault(name, []).append(100 * float((np.diff(batch) == 0).mean()))
    figures = []
    for name, found in correlation.items():
        what = f"{name}: rank correlation with the shards' order, mean size"
        figures.append(Figure("shuffle", what, float(np.mean(found)), ""))
        what = f"{name}: neighbours of a shard within a batch of {BATCH}"
        figures.append(Figure("shuffle", what, float(np.mean(together[name])), "%"))
    return figures


def _orders(seed: int) -> Iterator[tuple[str, Indices]]:
    """Yields the samples of one epoch of a domain in each order."""
    sizes = np.full(SHARDS, SHARD_SAMPLES, np.int64)
    total = int(sizes.sum())
    ours = ShardOrder(
        "web",
        ShardSizes.of(sizes.tolist()),
        seed=seed,
        window_shards=WINDOW_SHARDS,
        groupings=[Grouping(0, 1)],
    )
    yield "ours", ours.samples(np.arange(total))[0]
    yield "py1e", get_shuffle("py1e", sizes, 1, seed, 0, BLOCK)
    yield "random", np.random.default_rng(seed).permutation(total)

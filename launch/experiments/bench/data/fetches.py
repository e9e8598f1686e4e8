"""Simulation of the shard cache: how often a node of 64 fetches a shard in an epoch.

Every loader process keeps maps of the shards that it read last, like
:class:`data.shards.streams.ShardFolder`; the cache evicts the least recently opened shard, like
:class:`data.shards.cache.ShardCache`.
"""

from collections import OrderedDict
from itertools import accumulate

import numpy as np

from data.loader import BLOCK_BATCHES
from data.order.permutation import Indices
from data.order.plan import OrderPlan
from data.shards.open_maps import OPEN_SHARDS
from launch.experiments.bench.data.figures import Figure
from launch.experiments.bench.data.speed import one_stage

NODES, RANKS, WORKERS = 64, 8, 4
SIMULATED = 16
"""Number of nodes that are simulated, evenly spread over all."""
BATCH = 2048
SHARD_SAMPLES, WINDOW_SHARDS = 8192, 32
SHARDS = {"web": 320, "code": 128, "science": 96, "reference": 64, "multilingual": 32}
"""Shards of 64 MB by domain; read once, in these proportions."""
BOUND = 2 * WINDOW_SHARDS * len(SHARDS)
"""Size of the cache in shards: two windows of each domain."""


def fetches() -> list[Figure]:
    """Simulates an epoch: shards fetched more than once, and shards needed at a time."""
    total = sum(SHARDS.values()) * SHARD_SAMPLES
    weights = {name: count / sum(SHARDS.values()) for name, count in SHARDS.items()}
    curriculum = one_stage(total, weights, batch=BATCH, tokens=2048)
    sizes = {name: [SHARD_SAMPLES] * count for name, count in SHARDS.items()}
    plan = OrderPlan(curriculum.segments(), sizes, seed=17, window_shards=WINDOW_SHARDS)
    picks = plan.samples(0, total)
    firsts = np.array([0, *accumulate(SHARDS[name] for name in plan.domains)])
    shards = (picks.sample // SHARD_SAMPLES + firsts[picks.domain]).reshape(
        -1, NODES, RANKS, BATCH // NODES // RANKS
    )
    counts, needed = [], 0
    for node in range(0, NODES, NODES // SIMULATED):
        counts.append(_fetched(shards[:, node]))
        needed = max(needed, _needed(shards[:, node]))
    fetched = np.stack(counts)
    return [
        Figure(
            "fetches",
            "shards that a node fetches more than once",
            100 * float((fetched > 1).mean()),
            "%",
            "<= 2",
        ),
        Figure("fetches", "most shards that a node still needs at a time", needed, "shards", f"<= {BOUND}"),
        Figure("fetches", "shards that a node fetches, of all", 100 * float((fetched > 0).mean()), "%"),
    ]


def _fetched(shards: Indices) -> Indices:
    """Number of times that a node fetches each shard, given its samples' shards [batches, ranks, samples]."""
    count = np.zeros(sum(SHARDS.values()), np.int64)
    cache: OrderedDict[int, None] = OrderedDict()
    maps: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(RANKS * WORKERS)]
    for block, begin in enumerate(range(0, shards.shape[0], BLOCK_BATCHES)):
        for rank in range(RANKS):
            opened = maps[rank * WORKERS + block % WORKERS]
            for shard in shards[begin : begin + BLOCK_BATCHES, rank].ravel().tolist():
                if shard in opened:
                    opened.move_to_end(shard)
                    continue
                if shard not in cache:
                    count[shard] += 1
                    if len(cache) >= BOUND:
                        cache.popitem(last=False)
                    cache[shard] = None
                    for gone in [each for each in opened if each not in cache]:
                        del opened[gone]
                cache.move_to_end(shard)
                opened[shard] = None
                if len(opened) > OPEN_SHARDS:
                    opened.popitem(last=False)
    return count


def _needed(shards: Indices) -> int:
    """The most shards that a node needs at a time, each from its first sample to its last."""
    flat = shards.ravel()
    numbers, first = np.unique(flat, return_index=True)
    last = flat.size - 1 - np.unique(flat[::-1], return_index=True)[1]
    change = np.zeros(flat.size + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    assert numbers.size
    return int(change.cumsum().max())

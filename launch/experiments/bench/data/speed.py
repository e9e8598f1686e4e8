"""Tokens per second of the loader against StreamingDataset with StreamingDataLoader."""

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from data.batch import make_batch
from data.loader import TrainSequences, open_loader
from data.order.plan import OrderPlan
from data.shards.packing import sample_of
from data.shards.streams import ShardFolder
from launch.experiments.bench.data import shards
from launch.experiments.bench.data.figures import Figure
from train.recipe.curriculum import Curriculum, Stage

SAMPLES, TOKENS, BATCH = 8192, 2048, 8
BATCHES = SAMPLES // BATCH - 1
ROUNDS = 3


def one_stage(sequences: int, weights: dict[str, float], *, batch: int, tokens: int) -> Curriculum:
    """Builds a curriculum of one stage with constant weights."""
    stage = Stage(
        phase=0,
        first_batch=0,
        first_sample=0,
        end_sample=sequences,
        sequence_samples=1,
        batch_sequences=batch,
        weights=weights,
        end_weights={},
        interpolation="linear",
        ramp_start=0,
        ramp_end=sequences,
        learning_rate_scale=1.0,
        rope_theta=1.0,
    )
    return Curriculum((stage,), tokens)


def speed() -> list[Figure]:
    """Measures medians over rounds in which the sides alternate; a round is an epoch with a fresh worker."""
    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        folder = Path(root) / "web"
        shards.write(folder, samples=SAMPLES, tokens=TOKENS, shard_bytes=1 << 23, seed=0)
        curriculum = one_stage(SAMPLES, {"web": 1.0}, batch=BATCH, tokens=TOKENS)
        files = ShardFolder(folder)
        plan = OrderPlan(curriculum.segments(), {"web": files.shard_samples}, seed=17, window_shards=32)
        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
        sides: dict[str, Iterable[Any]] = {
            "ours": open_loader(
                TrainSequences(plan, [files], curriculum, rank=0, world_size=1, start=0), workers=1
            ),
            "Streaming, the same tensors": _streaming(dataset, _whole_batch),
            "Streaming, tokens alone": _streaming(dataset, _only_tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                seconds[name].append(_timed(iter(side)))
    rates = {name: BATCHES * BATCH * TOKENS / statistics.median(times) for name, times in seconds.items()}
    figures = [Figure("loader", name, rate / 1e6, "M tokens/s") for name, rate in rates.items()]
    for name in list(sides)[1:]:
        figures.append(Figure("loader", f"ours / {name}", rates["ours"] / rates[name], "x", ">= 1.5"))
    return figures


def _streaming(dataset: StreamingDataset, collate: Any) -> StreamingDataLoader:
    return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=collate)


def _timed(batches: Iterator[Any]) -> float:
    """Seconds after the first batch, so that starting the worker does not count."""
    next(batches)
    begin = time.perf_counter()
    read = sum(1 for _ in islice(batches, BATCHES))
    elapsed = time.perf_counter() - begin
    assert read == BATCHES, read
    return elapsed


def _whole_batch(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    numbers = np.zeros(len(samples), np.int64)
    return make_batch([sample_of(sample) for sample in samples], numbers, numbers)


def _only_tokens(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(np.stack([s["tokens"] for s in samples]).astype(np.int64))}

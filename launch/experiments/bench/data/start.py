"""Starting anywhere in twelve trillion tokens, against Streaming's planning before its first batch."""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from data.order.mixture import Mixture
from data.order.plan import OrderPlan
from data.shards.index import INDEX_FILE
from data.shards.manifest import file_mismatch
from data.shards.streams import ShardFolder
from data.text.mds import column_config, shard_name
from launch.experiments.bench.data.figures import Figure
from train.recipe.curriculum import Curriculum, plan_stages
from train.recipe.phases import domains_of
from train.recipe.reading import load_recipe

MIXTURE = Path(__file__).resolve().parents[4] / "yamls/dbrx.yaml"
"""Recipe that uses yamls/mixtures/12t.yaml."""
SHARD_SAMPLES = 4096
"""Samples of 4096 tokens in a shard of 64 MB."""
STARTS = 6
STREAMING_SAMPLES = (1_000_000, 3_000_000, 10_000_000)
ASKED = 100_000_000


def start() -> list[Figure]:
    """Measures seconds and peak memory of indexes, plan and first batch, each in a fresh process."""
    batches = plan_stages(load_recipe(MIXTURE)).batches
    places = [0, *sorted(np.random.default_rng(0).integers(1, batches, STARTS - 1).tolist())]
    with tempfile.TemporaryDirectory() as folder:
        shards = _write_indexes(Path(folder))
        first_seconds, first_bytes = _measured("ours", 0, folder)
        ours = [_measured("ours", place, folder) for place in places]
    figures = [
        Figure("start", f"12T tokens, a node's first start: {shards:,} shards listed", first_seconds, "s"),
        Figure("start", "12T tokens, a node's first start", first_bytes / 1e6, "MB"),
        Figure("start", f"12T tokens, slowest of {STARTS} places", max(s for s, _ in ours), "s", "<= 1"),
        Figure(
            "start", f"12T tokens, most of {STARTS} places", max(b for _, b in ours) / 1e6, "MB", "<= 100"
        ),
    ]
    theirs = [_measured("streaming", samples, "") for samples in STREAMING_SAMPLES]
    for samples, (seconds, size) in zip(STREAMING_SAMPLES, theirs, strict=True):
        figures += [
            Figure("start", f"Streaming, an epoch of {samples:.0e} samples", seconds, "s"),
            Figure("start", f"Streaming, an epoch of {samples:.0e} samples", size / 1e6, "MB"),
        ]
    for values, unit, scale in ((0, "s", 1.0), (1, "MB", 1e-6)):
        slope, constant = np.polyfit(STREAMING_SAMPLES, [pair[values] * scale for pair in theirs], 1)
        what = f"Streaming, {ASKED:.0e} samples, extrapolated linearly"
        figures.append(Figure("start", what, float(constant + slope * ASKED), unit))
    return figures


def _write_indexes(folder: Path) -> int:
    """Writes the indexes, without shards, of one epoch of 12T tokens; returns the number of shards listed."""
    total, config = 0, column_config(4096)
    for name, count in _samples().items():
        (folder / name).mkdir()
        shards = -(-count // SHARD_SAMPLES)
        with (folder / name / INDEX_FILE).open("w") as file:
            file.write('{"shards": [')
            for n in range(shards):
                sha256 = hashlib.sha256(f"{name} {n}".encode()).hexdigest()
                raw = {"basename": shard_name(n), "bytes": 67_000_000, "hashes": {"sha256": sha256}}
                samples = SHARD_SAMPLES if n + 1 < shards else SHARD_SAMPLES // 2
                entry = config | {"raw_data": raw, "samples": samples, "zip_data": None}
                file.write(", " * (n > 0) + json.dumps(entry))
            file.write('], "version": 2}')
        total += shards
    return total


def _measured(side: str, number: int, folder: str) -> tuple[float, int]:
    """Seconds and bytes of peak memory, both without the imports, in a new Python process."""
    call = "import sys; from launch.experiments.bench.data.start import measure; measure(*sys.argv[1:])"
    command = [sys.executable, "-c", call, side, str(number), folder]
    root = Path(__file__).resolve().parents[4]
    out = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    seconds, size = json.loads(out.splitlines()[-1])
    return seconds, size


def measure(side: str, number: str, folder: str) -> None:
    """Prints seconds and bytes of our start at batch ``number``, or of Streaming's with that many samples."""
    work = _ours(int(number), Path(folder)) if side == "ours" else _streaming(int(number))
    # Resets the high-water mark, so that it does not include the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _memory("VmRSS"), time.perf_counter()
    work()
    print(json.dumps([time.perf_counter() - begin, _memory("VmHWM") - before]))


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _samples() -> dict[str, int]:
    """Samples per domain in the 12T tokens."""
    recipe = load_recipe(MIXTURE)
    curriculum = plan_stages(recipe)
    taken = Mixture(curriculum.segments()).consumed(curriculum.samples)
    return {name: taken[name] for name in domains_of(recipe)}


def _ours(batch: int, folder: Path) -> Callable[[], None]:
    """Prepares our measurement: a start at a batch of the 12T tokens, over shards for one epoch."""
    recipe = load_recipe(MIXTURE)
    return partial(
        _start_ours, plan_stages(recipe), {name: folder / name for name in domains_of(recipe)}, batch
    )


def _start_ours(curriculum: Curriculum, folders: dict[str, Path], batch: int) -> None:
    """Hashes the indexes as a run does, opens them, builds the plan, and reads all ranks' first batch."""
    for folder in folders.values():
        assert file_mismatch(folder / INDEX_FILE, None, "another hash")
    shards = {name: ShardFolder(folder).shard_samples for name, folder in folders.items()}
    plan = OrderPlan(curriculum.segments(), shards, seed=17, window_shards=32)
    stage = curriculum.stage_of(batch)
    first = stage.first_sample + (batch - stage.first_batch) * stage.batch_samples
    assert plan.samples(first, stage.batch_samples).sample.size == stage.batch_samples


def _streaming(samples: int) -> Callable[[], None]:
    """Prepares Streaming's measurement: StreamingDataset plans an epoch for 64 nodes of 8 ranks."""
    from streaming.base.batching import generate_work
    from streaming.base.dataset import StreamingDataset
    from streaming.base.world import World

    sizes = np.full(samples // SHARD_SAMPLES, SHARD_SAMPLES, np.int64)
    dataset = SimpleNamespace(
        num_canonical_nodes=64,
        partition_algo="relaxed",
        epoch_size=int(sizes.sum()),
        batch_size=8,
        initial_physical_nodes=64,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=9176,
        shuffle_block_size=1 << 18,
        epoch_seed_change=True,
        sampling_method="balanced",
        sampling_granularity=1,
        num_streams=1,
        streams=[SimpleNamespace(choose=int(sizes.sum()))],
        shard_offset_per_stream=np.zeros(1, np.int64),
        shards_per_stream=np.array([sizes.size]),
        samples_per_shard=sizes,
        sample_offset_per_shard=sizes.cumsum() - sizes,
    )
    dataset.resample_streams = partial(StreamingDataset.resample_streams, cast(Any, dataset))
    world = World(num_nodes=64, ranks_per_node=8, workers_per_rank=1, worker=0)

    def start() -> None:
        work = generate_work("random", cast(Any, dataset), world, 0, 0)
        assert work.size >= dataset.epoch_size

    return start

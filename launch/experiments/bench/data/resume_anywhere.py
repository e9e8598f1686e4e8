"""Resuming at random positions of five phases, with other world sizes, gives the same sequences in order."""

import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.batch import Batch
from data.loader import TrainSequences, open_loader
from data.order.plan import OrderPlan
from data.shards.streams import ShardFolder
from launch.experiments.bench.data import shards
from launch.experiments.bench.data.figures import Figure
from train.recipe.curriculum import Curriculum, plan_stages
from train.recipe.schema import Data, Phase, Recipe, Training

PLACES, READ = 20, 4
"""Positions to resume at, and batches compared at each."""
SAMPLES, S, BATCH = 4096, 64, 8
PHASES = [
    Phase(tokens=60 * BATCH * S, weights={"code": 0.7, "web": 0.3}),
    Phase(tokens=40 * BATCH * S, weights={"code": 0.7, "web": 0.3}, end_weights={"code": 0.1, "web": 0.9}),
    Phase(tokens=60 * BATCH * S, weights={"code": 1.0}, sequence_tokens=2 * S),
    Phase(tokens=40 * BATCH * S, weights={"web": 0.6, "code": 0.4}, global_batch_sequences=8),
    Phase(tokens=60 * BATCH * S, weights={"code": 0.2, "web": 0.8}, sequence_tokens=S),
]


def resume() -> list[Figure]:
    """Counts the positions at which a resumed run reads the same as the uninterrupted run."""
    curriculum = plan_stages(
        Recipe(
            name="resume",
            data=Data(shards="", phases=PHASES, sequence_tokens=S),
            training=Training(
                duration_tokens=sum(phase.tokens for phase in PHASES),
                global_batch_sequences=BATCH,
                microbatch_sequences=1,
            ),
        )
    )
    rng = np.random.default_rng(0)
    same = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        for seed, name in enumerate(("code", "web")):
            shards.write(Path(root) / name, samples=SAMPLES, tokens=S, shard_bytes=1 << 15, seed=seed)
        whole = _read(Path(root), curriculum, 0, curriculum.batches, world_size=1, workers=0)
        for _ in range(PLACES):
            first = int(rng.integers(1, curriculum.batches - READ))
            world = {"world_size": int(rng.choice([1, 2, 4])), "workers": int(rng.choice([0, 1, 2]))}
            found = _read(Path(root), curriculum, first, READ, **world)
            same += all(
                torch.equal(batch[key], expected[key])
                for batch, expected in zip(found, whole[first : first + READ], strict=True)
                for key in expected
            )
    return [Figure("resume", f"of {PLACES} places the same sequences", same, "", f">= {PLACES}")]


def _read(
    root: Path, curriculum: Curriculum, first: int, count: int, *, world_size: int, workers: int
) -> list[Batch]:
    """Reads global batches, starting with number ``first``, concatenated over all ranks."""
    folders = {name: ShardFolder(root / name) for name in ("code", "web")}
    plan = OrderPlan(
        curriculum.segments(),
        {name: folder.shard_samples for name, folder in folders.items()},
        seed=17,
        window_shards=2,
    )
    start = curriculum.tokens_after(first - 1) // S if first else 0
    ranks = []
    for rank in range(world_size):
        sequences = TrainSequences(
            plan,
            [folders[name] for name in plan.domains],
            curriculum,
            rank=rank,
            world_size=world_size,
            start=start,
        )
        ranks.append(list(islice(open_loader(sequences, workers), count)))
    return [
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]

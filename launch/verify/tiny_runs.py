"""Runs of the tiny recipe in forked ranks, as the main job would run them, and their records."""

import contextlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.verify.case_run import import_for_ranks
from launch.verify.cases import SEQUENCES, Layout
from launch.verify.forked_ranks import RankError, Ranks
from train.recipe.schema import BalanceScope, Checkpoint, OnExisting, Precision, Recipe
from train.recipe.tiny import tiny_recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.run_folder import METRICS_FILE
from train.run import run

STEPS = 20
PATIENCE_SECONDS = 240.0


def prepare(recipe: Recipe, folder: Path) -> Recipe:
    """Makes the tiny recipe in fp32, saving every second batch under ``folder``."""
    small = tiny_recipe(recipe, steps=STEPS, global_batch_sequences=SEQUENCES)
    model = small.model
    if model.moe is not None and model.moe.balance_scope in (BalanceScope.rank, BalanceScope.expert_group):
        # These depend on the layout by definition.
        model = replace(model, moe=replace(model.moe, balance_scope=BalanceScope.global_batch))
    return replace(
        small,
        model=model,
        runs_dir=str(folder),
        on_existing=OnExisting.resume,
        checkpoint=Checkpoint(interval_batches=2, keep_last=2),
        tracking=replace(small.tracking, mlflow=False),
        training=replace(small.training, precision=Precision.fp32),
        evaluation=replace(small.evaluation, interval_batches=None),
    )


def named(small: Recipe, layout: Layout, name: str) -> Recipe:
    """The tiny recipe under a layout and another name."""
    parallelism = replace(
        small.parallelism,
        replicate=layout.replicate,
        expert=layout.expert,
        context=layout.context,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        pipeline_chunks=layout.chunks,
    )
    if layout.pipeline > 1:
        parallelism = replace(parallelism, gathered_layers=0, interleave=False)
    return replace(small, name=name, parallelism=parallelism)


DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg")
"""Imported by a run's report, at its end."""


def import_for_runs() -> None:
    """Imports what a whole run imports lazily, once, so that not every forked one has to."""
    import_for_ranks()
    with contextlib.suppress(ModuleNotFoundError):  # an installation without charts
        for name in DRAWING:
            importlib.import_module(name)


def trainer(recipe: Recipe) -> Callable[[Topology], None]:
    """Returns work that runs the main job; the rank exits with its status."""
    import_for_runs()

    def work(topology: Topology) -> None:
        if status := run(recipe, topology):
            raise SystemExit(status)

    return work


def uninterrupted(small: Recipe, layout: Layout) -> Path:
    """Trains an undisturbed run; returns its folder.

    Raises:
        RankError: if it does not complete.
    """
    recipe = named(small, layout, f"whole-{layout.world_size}")
    folder = Path(recipe.runs_dir) / recipe.name
    with Ranks(layout.world_size, trainer(recipe), folder.with_suffix(".log")) as ranks:
        codes = ranks.exit_codes(PATIENCE_SECONDS)
    if any(codes):
        raise RankError(f"the uninterrupted run ended with {codes}: {tail(folder)}")
    return folder


def await_moment(ranks: Ranks[None], has_come: Callable[[], bool]) -> bool:
    """Waits for a moment; False if the ranks ended first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ranks.are_running and time.monotonic() < deadline:
        if has_come():
            return True
        time.sleep(0.002)
    return False


def steps(folder: Path) -> int:
    """Number of the last batch in the run's metrics."""
    return max(record(folder), default=0)


def record(folder: Path) -> dict[int, dict[str, float]]:
    """A run's metrics by step, without an incomplete last line."""
    file = folder / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if metrics.LOSS in row}


def tail(folder: Path) -> str:
    """The last lines that a run printed."""
    log = folder.with_suffix(".log")
    return " | ".join(log.read_text().strip().splitlines()[-3:]) if log.exists() else "no output"

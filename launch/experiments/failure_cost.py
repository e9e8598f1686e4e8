"""The cost of a failure: `python -m launch.experiments.failure_cost yamls/smoke.yaml`.

The tiny recipe trains under the supervisor, as a user starts it. Each time it has come some batches further,
its last rank is killed, and the time to the first new step is measured, part by part: without and with
`--warm`. Every run ends with the losses of the others, bit for bit.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.restart.history import read_log
from train.health.heartbeat import Failure, Heartbeat, heartbeat_file, read_record, read_records
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.schema import Checkpoint, OnExisting, Precision, Recipe
from train.recipe.tiny import tiny_recipe
from train.record.command import Figures, at_least, command
from train.record.metrics import GRADIENT_NORM, LOSS
from train.record.run_folder import METRICS_FILE
from train.record.start_times import STARTS_FILE
from train.record.step_log import STEP, read_steps
from train.record.tables import text_table

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2000
"""Length of the run, which is ended long before."""
SAVE_BATCHES = 8
BATCHES_BETWEEN = 12
"""Batches that a try trains before the next kill; it has saved by then."""
PATIENCE_SECONDS = 900.0


@dataclass
class Cost:
    """One failure."""

    ranks: int
    is_warm: bool
    parts: dict[str, float]
    """Seconds of each part, in order."""
    on_core: dict[str, float]
    """Of those of rank 0's start, seconds that it spent on a core."""
    lost_batches: int
    """Batches that are trained again."""
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def total(self) -> float:
        """Seconds from the kill to the end of the first new step."""
        return sum(self.parts.values())


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("--ranks", type=at_least(int, 2), nargs="+", default=[2, 4], metavar="N")
    parser.add_argument(
        "--copies",
        action="store_true",
        help="with checkpoint.memory_interval_batches=1",
    )
    parser.add_argument("--kills", type=at_least(int, 1), default=2, metavar="N", help="of each run")


@command(
    "python -m launch.experiments.failure_cost",
    "Measures the time from the kill of a rank to the first new step, part by part. On two quiet cores it "
    "takes two to four minutes.",
    add_arguments,
    json="also write every figure as JSON",
    file="recipe",
)
def main(options: Namespace) -> Figures:
    """Runs all runs and prints the table."""
    recipe = load_recipe(options.recipe)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="failure-cost-") as folder:
        for ranks in options.ranks:
            records = []
            for is_warm in (False, True):
                name = f"{ranks}-{'warm' if is_warm else 'cold'}"
                small = make_recipe(recipe, Path(folder), name, has_copies=options.copies)
                for cost in kill(small, Path(folder), ranks, options.kills, is_warm=is_warm):
                    print(f"{name}: {cost.total:.1f} s, load {cost.load:.1f}", flush=True)
                    costs.append(cost)
                records.append(losses_of(Path(small.runs_dir) / name))
            require_equal(*records)
    print(table_of(costs))
    return Figures([asdict(cost) | {"total": cost.total} for cost in costs])


def make_recipe(recipe: Recipe, folder: Path, name: str, *, has_copies: bool, steps: int = STEPS) -> Recipe:
    """Makes the tiny recipe, saving often; the first of its runs makes the shards."""
    every = 1 if has_copies else None
    small = tiny_recipe(recipe, steps=steps)
    return replace(
        small,
        name=name,
        runs_dir=str(folder / "runs"),
        on_existing=OnExisting.resume,
        data=replace(small.data, shards=str(folder / "shards")),
        checkpoint=Checkpoint(SAVE_BATCHES, keep_last=2, memory_interval_batches=every),
        tracking=replace(small.tracking, mlflow=False),
        training=replace(small.training, precision=Precision.fp32),
        evaluation=replace(small.evaluation, interval_batches=None),
    )


def kill(recipe: Recipe, folder: Path, ranks: int, kills: int, *, is_warm: bool) -> Iterator[Cost]:
    """Kills the last rank of a supervised run, again and again; yields what each failure cost."""
    run, records = Path(recipe.runs_dir) / recipe.name, Path(recipe.runs_dir) / f"{recipe.name}.restarts"
    with supervised(recipe, folder, ranks, is_warm=is_warm) as supervisor:
        for _ in range(kills):
            begun = last_step(run)
            await_that(lambda first=begun: last_step(run) >= first + BATCHES_BETWEEN, supervisor)
            starts = len(starts_of(run))
            beat = read_record(heartbeat_file(records, ranks - 1), Heartbeat)
            assert beat is not None, "a rank that trains has a heartbeat"
            trained, killed, noticed = last_step(run), time.time(), list[float]()
            os.kill(beat.pid, signal.SIGKILL)

            def has_restarted(before: int = starts, seen: list[float] = noticed) -> bool:
                if not seen:
                    seen += [each.time for each in read_records(records, "failed-*.json", Failure)]
                return len(starts_of(run)) > before

            await_that(has_restarted, supervisor)
            start, tries = starts_of(run)[-1], read_log(records)
            ended = tries[-1]["begun"] + tries[-1]["seconds"]
            first = min([*noticed, ended])
            parts = {"noticing": first - killed, "ending ranks": ended - first}
            parts |= {"launcher": start["created"] - ended}
            parts |= {name: seconds for name, (seconds, _) in start["parts"].items()}
            on_core = {name: seconds for name, (_, seconds) in start["parts"].items()}
            yield Cost(ranks, is_warm, parts, on_core, trained - start["batch"])


@contextmanager
def supervised(
    recipe: Recipe, folder: Path, ranks: int, *, is_warm: bool
) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a run under the supervisor, as a user does, and ends it."""
    file = folder / f"{recipe.name}.yaml"
    file.write_text(to_yaml(recipe))
    launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), "train/main.py", str(file)]
    words = [sys.executable, "-m", "launch.restart", "--backoff", "0", *(["--warm"] if is_warm else [])]
    with (folder / f"{recipe.name}.log").open("wb") as log:
        supervisor = subprocess.Popen([*words, "--", *launcher], cwd=ROOT, stdout=log, stderr=log)
        try:
            yield supervisor
        finally:
            supervisor.terminate()
            try:
                supervisor.wait(PATIENCE_SECONDS)
            finally:
                supervisor.kill()


def await_that(is_so: Any, supervisor: "subprocess.Popen[bytes]") -> None:
    """Waits for something.

    Raises:
        UserError: if it does not come about.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if supervisor.poll() is not None:
            raise UserError(f"the supervisor ended with {supervisor.returncode}")
        if time.monotonic() > end:
            raise UserError(f"the run does not get on for {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.005)


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The starts of a run that have come to their first step."""
    file = run / STARTS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The last batch in a run's metrics."""
    return max((row[STEP] for row in read_steps(run / METRICS_FILE)), default=0)


def losses_of(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of a run's batches."""
    return {row[STEP]: (row[LOSS], row[GRADIENT_NORM]) for row in read_steps(run / METRICS_FILE)}


def require_equal(cold: dict[int, tuple[float, float]], warm: dict[int, tuple[float, float]]) -> None:
    """Prints that two runs are one.

    Raises:
        UserError: if they differ.
    """
    both = cold.keys() & warm.keys()
    differing = [step for step in sorted(both) if cold[step] != warm[step]]
    if differing or not both:
        raise UserError(f"the runs with and without --warm differ from step {differing[:1]} on")
    print(f"the runs with and without --warm are equal bit for bit in loss and norm of {len(both)} steps")


def table_of(costs: list[Cost]) -> str:
    """Formats the median of each part's seconds and, in parentheses, seconds on a core."""
    kinds = list(dict.fromkeys((cost.ranks, cost.is_warm) for cost in costs))
    names = list(dict.fromkeys(name for cost in costs for name in cost.parts))
    of_kind = {kind: [cost for cost in costs if (cost.ranks, cost.is_warm) == kind] for kind in kinds}
    rows = [
        (name, *(_cell(of_kind[kind], name) for kind in kinds))
        for name in names
        if any(_median(found, name) >= 0.005 for found in of_kind.values())
    ]
    totals = [f"{statistics.median(cost.total for cost in of_kind[kind]):.2f}" for kind in kinds]
    lost = [f"{statistics.median(cost.lost_batches for cost in of_kind[kind]):g}" for kind in kinds]
    heads = [f"{ranks} ranks{', --warm' if is_warm else ''}" for ranks, is_warm in kinds]
    rows += [("all, seconds", *totals), ("batches trained again", *lost)]
    return text_table(("", *heads), rows, "<" + ">" * len(kinds))


def _median(costs: list[Cost], name: str) -> float:
    return statistics.median(cost.parts.get(name, 0.0) for cost in costs)


def _cell(costs: list[Cost], name: str) -> str:
    on_core = [cost.on_core[name] for cost in costs if name in cost.on_core]
    core = f" ({statistics.median(on_core):.2f})" if on_core else ""
    return f"{_median(costs, name):.2f}{core}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

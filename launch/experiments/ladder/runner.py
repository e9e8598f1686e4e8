"""Trains the missing runs of a ladder, several at once, and records results, predicted and actual times.

A run is forked from a process that has imported everything, and computes on one core. Starting the same
ladder again continues interrupted runs. The command may be stopped at any time, by Ctrl-C or SIGTERM.
"""

import json
import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from launch.experiments.ladder.plan import Run
from launch.experiments.ladder.results import DIVERGED_FILE, add_missing, has_diverged, is_complete
from train.recipe.errors import UserError
from train.recipe.exit_status import REPLAY_STATUS
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.recipe.units import duration

FIRST_GUESS_FLOPS = 4e10
"""FLOP/s of a core in training, to predict the first run's time; later predictions use completed runs."""
OVERHEAD_SECONDS = 10.0
"""Overhead of every run: building, the last validation, sample, report."""
POLL_SECONDS = 0.5
RECORD = "runs.csv"
"""In the ladder's folder: a line of each run that has ended."""


@dataclass(frozen=True)
class Timing:
    """Predicted and actual time of a run."""

    run: str
    family: str
    flops: float
    predicted_seconds: float
    taken_seconds: float


class Timings:
    """File of predicted and actual times, one line per run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Timing]:
        """Reads all lines."""
        if not self.file.is_file():
            return []
        return [Timing(**json.loads(line)) for line in self.file.read_text().splitlines()]

    def predict(self, run: Run) -> float:
        """Predicts a run's seconds from previous runs of its family, or else of any family."""
        known = self.read()
        own = [it for it in known if it.family == run.family] or known
        if not own:
            return OVERHEAD_SECONDS + run.flops / FIRST_GUESS_FLOPS
        # The nearest in size, since small models use a core less efficiently than large ones.
        nearest = min(own, key=lambda it: abs(math.log(it.flops / run.flops))).flops
        training = [max(it.taken_seconds - OVERHEAD_SECONDS, 0.1) for it in own if it.flops == nearest]
        return OVERHEAD_SECONDS + run.flops / nearest * median(training)

    def add(self, timing: Timing) -> None:
        """Appends a line."""
        with self.file.open("a") as file:
            file.write(json.dumps(vars(timing)) + "\n")


def missing(runs: Sequence[Run], average: int | None) -> list[Run]:
    """The runs that are neither complete nor abandoned."""
    return [run for run in runs if not is_complete(run, average) and not has_diverged(run)]


def train_missing(
    runs: Sequence[Run],
    folder: Path,
    *,
    workers: int,
    deadline: float | None,
    average: int | None = None,
    counts_diverged: bool = False,
) -> list[Run]:
    """Trains the runs that are not complete, and evaluates the mean of their last checkpoints if wanted.

    Args:
        runs: in starting order.
        folder: of the ladder; gets each run's log and the timings.
        workers: number of runs at once.
        deadline: time (`time.time`); runs that are predicted to end later are not started.
        average: number of last checkpoints whose mean is evaluated; None: none.
        counts_diverged: a run that diverges is recorded, in place of an error.

    Returns:
        The runs that are still not complete.

    Raises:
        UserError: for the first run that fails.
    """
    waiting = missing(runs, average)
    folder.mkdir(parents=True, exist_ok=True)
    add_missing(folder / RECORD, runs, average)
    if not waiting:
        return []
    print(f"{len(waiting)} of {len(runs)} runs to train; importing torch and Composer", flush=True)
    from data.opened import OpenedData
    from data.write_shards import ensure_shards

    for recipe in {run.recipe.data.shards: run.recipe for run in waiting}.values():
        ensure_shards(OpenedData(recipe))
    # tokenizers warns about every fork after its first use; the runs do not use it again.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    timings = Timings(folder / "timings.jsonl")
    left = {run.recipe.name: run for run in waiting}
    how = _Training(workers, deadline, average, counts_diverged)
    with tqdm(
        total=sum(run.flops for run in waiting), unit="FLOP", unit_scale=True, dynamic_ncols=True
    ) as bar:
        for run, words, cpu_seconds in _train(waiting, timings, logs, how):
            bar.update(run.flops)
            add_missing(folder / RECORD, [run], average, cpu_seconds)
            del left[run.recipe.name]
            seconds = sum(timings.predict(other) for other in left.values()) / workers
            tqdm.write(f"{run.recipe.name}: {words}; {len(left)} runs left here, about {duration(seconds)}")
    return missing(runs, average)


@dataclass(frozen=True)
class _Training:
    workers: int
    deadline: float | None
    average: int | None
    counts_diverged: bool


def _train(
    waiting: list[Run], timings: Timings, logs: Path, how: _Training
) -> Iterator[tuple[Run, str, float | None]]:
    """Keeps some runs going; yields each run that ends, how it ended, and the CPU's seconds that it took."""
    from launch.verify.forked_ranks import RankError, Ranks
    from launch.verify.tiny_runs import import_for_runs
    from train.run import run as train

    import_for_runs()
    if how.average is not None:
        from launch.experiments.ladder.averaged import evaluate_average
    queue, replayed = list(waiting), set[str]()
    going: list[tuple[Run, Ranks[tuple[int, float | None]], float, float]] = []
    try:
        while queue or going:
            while queue and len(going) < how.workers:
                run = queue.pop(0)
                predicted = timings.predict(run)
                if how.deadline is not None and time.time() + predicted > how.deadline:
                    continue
                recipe = run.recipe

                def work(_: Topology, recipe: Recipe = recipe) -> tuple[int, float | None]:
                    is_resumed = (Path(recipe.runs_dir) / recipe.name).exists()
                    status = train(recipe, Topology())
                    if status == 0 and how.average is not None:
                        evaluate_average(recipe, how.average)
                    used = resource.getrusage(resource.RUSAGE_SELF)
                    return status, None if is_resumed else used.ru_utime + used.ru_stime

                output = logs / f"{recipe.name}.log"
                going.append((run, Ranks(1, work, output), time.monotonic(), predicted))
            time.sleep(POLL_SECONDS)
            for entry in [entry for entry in going if not entry[1].are_running]:
                going.remove(entry)
                run, ranks, begun, predicted = entry
                try:
                    with ranks:
                        ((status, cpu_seconds),) = ranks.results(timeout_seconds=60)
                except RankError as error:
                    raise _failed(run, logs, str(error).strip().splitlines()[-1]) from None
                name, seconds = run.recipe.name, time.monotonic() - begun
                if status == REPLAY_STATUS and name not in replayed:
                    # A transient hardware error does not recur.
                    replayed.add(name)
                    queue.insert(0, run)
                elif status == REPLAY_STATUS and (run.is_search or how.counts_diverged):
                    (Path(run.recipe.runs_dir) / name / DIVERGED_FILE).touch()
                    said = "its rate is excluded" if run.is_search else "recorded as that"
                    yield run, f"diverged within {duration(seconds)}: {said}", None
                elif status != 0:
                    why = "a step is not finite, twice" if status == REPLAY_STATUS else f"status {status}"
                    raise _failed(run, logs, why)
                else:
                    timings.add(Timing(name, run.family, run.flops, predicted, seconds))
                    yield run, f"{duration(seconds)}, predicted {duration(predicted)}", cpu_seconds
    finally:
        for _, ranks, _, _ in going:
            ranks.kill()


def _failed(run: Run, logs: Path, reason: str) -> UserError:
    log = logs / f"{run.recipe.name}.log"
    return UserError(
        f"ended early: {reason}",
        key=run.recipe.name,
        remedy=f"see {log}; run the same command again to continue",
    )

"""Trains the missing runs of a ladder, several at once, and records predicted and actual times.

A run is forked from a process that has imported everything, and computes on one core. Starting the same
ladder again continues interrupted runs.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from launch.experiments.ladder.plan import Run
from train.recipe.errors import UserError
from train.recipe.exit_status import REPLAY_STATUS
from train.recipe.topology import Topology
from train.recipe.units import duration
from train.record.summary import Summary, read_summary

FIRST_GUESS_FLOPS = 4e10
"""FLOP/s of a core in training, to predict the first run's time; later predictions use completed runs."""
OVERHEAD_SECONDS = 10.0
"""Overhead of every run: building, the last validation, sample, report."""
POLL_SECONDS = 0.5
DIVERGED_FILE = "diverged"
"""Marker in the folder of a search run in which a step was not finite twice."""


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


def summary_of(run: Run) -> Summary | None:
    """Summary of a run; None if it is not complete."""
    return read_summary(Path(run.recipe.runs_dir) / run.recipe.name)


def has_diverged(run: Run) -> bool:
    """Returns True if a search run was abandoned because its learning rate is too high."""
    return _diverged_file(run).is_file()


def missing(runs: Sequence[Run]) -> list[Run]:
    """The runs that are neither complete nor abandoned."""
    return [run for run in runs if summary_of(run) is None and not has_diverged(run)]


def train_missing(runs: Sequence[Run], folder: Path, *, workers: int, deadline: float | None) -> list[Run]:
    """Trains the runs that are not complete.

    Args:
        runs: in starting order.
        folder: of the ladder; gets each run's log and the timings.
        workers: number of runs at once.
        deadline: time (`time.time`); runs that are predicted to end later are not started.

    Returns:
        The runs that are still not complete.

    Raises:
        UserError: for the first run that fails.
    """
    waiting = missing(runs)
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
    total = sum(run.flops for run in waiting)
    with tqdm(total=total, unit="FLOP", unit_scale=True, dynamic_ncols=True) as bar:
        for run, words in _train(waiting, timings, logs, workers, deadline):
            bar.update(run.flops)
            tqdm.write(f"{run.recipe.name}: {words}")
    return missing(runs)


def _train(
    waiting: list[Run], timings: Timings, logs: Path, workers: int, deadline: float | None
) -> Iterator[tuple[Run, str]]:
    """Keeps ``workers`` runs going; yields each run that ends, and how it ended."""
    from launch.verify.forked_ranks import RankError, Ranks
    from launch.verify.tiny_runs import import_for_runs
    from train.run import run as train

    import_for_runs()
    queue, replayed = list(waiting), set[str]()
    going: list[tuple[Run, Ranks[int], float, float]] = []
    try:
        while queue or going:
            while queue and len(going) < workers:
                run = queue.pop(0)
                predicted = timings.predict(run)
                if deadline is not None and time.time() + predicted > deadline:
                    continue
                recipe = run.recipe

                def work(_: Topology, recipe: object = recipe) -> int:
                    return train(recipe, Topology())  # type: ignore[arg-type]

                output = logs / f"{recipe.name}.log"
                going.append((run, Ranks(1, work, output), time.monotonic(), predicted))
            time.sleep(POLL_SECONDS)
            for entry in [entry for entry in going if not entry[1].are_running]:
                going.remove(entry)
                run, ranks, begun, predicted = entry
                try:
                    with ranks:
                        (status,) = ranks.results(timeout_seconds=60)
                except RankError as error:
                    raise _failed(run, logs, str(error).strip().splitlines()[-1]) from None
                name, seconds = run.recipe.name, time.monotonic() - begun
                if status == REPLAY_STATUS and name not in replayed:
                    # A transient hardware error does not recur.
                    replayed.add(name)
                    queue.insert(0, run)
                elif status == REPLAY_STATUS and run.is_search:
                    _diverged_file(run).touch()
                    yield run, f"diverged within {duration(seconds)}: its rate is excluded"
                elif status != 0:
                    why = "a step is not finite, twice" if status == REPLAY_STATUS else f"status {status}"
                    raise _failed(run, logs, why)
                else:
                    timings.add(Timing(name, run.family, run.flops, predicted, seconds))
                    yield run, f"{duration(seconds)}, predicted {duration(predicted)}"
    finally:
        for _, ranks, _, _ in going:
            ranks.kill()


def _diverged_file(run: Run) -> Path:
    return Path(run.recipe.runs_dir) / run.recipe.name / DIVERGED_FILE


def _failed(run: Run, logs: Path, reason: str) -> UserError:
    log = logs / f"{run.recipe.name}.log"
    return UserError(
        f"ended early: {reason}",
        key=run.recipe.name,
        remedy=f"see {log}; run the same command again to continue",
    )

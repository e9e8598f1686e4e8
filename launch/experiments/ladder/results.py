"""Results of a ladder's runs: what the folders of finished runs say, and the CSV file that collects it."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from launch.experiments.ladder.plan import Run
from train.hf.average_option import Average
from train.recipe import sizes
from train.record.evaluations import BITS, read_results
from train.record.summary import read_summary

DIVERGED_FILE = "diverged"
"""Marker in the folder of a run that was abandoned, as a step was not finite twice."""
LOSS, LAST = "nats_", "last_"
"""Columns of a domain: the loss that counts, and that of the last weights."""


@dataclass(frozen=True)
class RunResult:
    """A line of the CSV file."""

    run: str
    family: str
    size: str
    seed: int
    multiplier: float
    """Of the recipe's learning rate."""
    is_search: bool
    parameters_total: int
    parameters_active: int
    tokens: int
    flops: float
    losses: dict[str, float]
    """Held-out loss by domain, nats per token, of the mean of the last checkpoints if the ladder has it;
    empty if the run diverged."""
    last: dict[str, float]
    """The same of the last weights."""
    cpu_seconds: float | None
    """Of one core, with start, evaluations and report; None if the run was resumed."""
    commit: str

    @property
    def loss(self) -> float:
        """Mean over domains; infinite if the run diverged."""
        return mean(self.losses.values()) if self.losses else math.inf


def has_diverged(run: Run) -> bool:
    """Returns True if a run was abandoned because a step was not finite twice."""
    return (_folder(run) / DIVERGED_FILE).is_file()


def is_complete(run: Run, average: int | None) -> bool:
    """Returns whether a run has ended and, if wanted, the mean of its last checkpoints is evaluated."""
    return bool(losses_of_run(run, average))


def losses_of_run(run: Run, average: int | None) -> dict[str, float]:
    """Held-out losses of a run by domain, in nats per token; empty if it is not complete.

    Args:
        run: the run.
        average: number of last checkpoints whose mean counts; None: the last weights do.
    """
    summary = read_summary(_folder(run))
    if summary is None:
        return {}
    if average is None:
        return summary.validation_loss
    wanted = (BITS, f"validation of {Average(average)}", summary.batches)
    for record in read_results(_folder(run)):
        if (record["kind"], record["name"], record["batch"]) == wanted:
            return {domain: found["loss"] for domain, found in record["domains"].items()}
    return {}


def add_missing(
    file: Path, runs: Sequence[Run], average: int | None, cpu_seconds: float | None = None
) -> None:
    """Appends a line for each run that has ended and has none; a line is written whole or not at all.

    Args:
        file: the CSV file; made if there is none.
        runs: the runs.
        average: see :func:`losses_of_run`.
        cpu_seconds: of a single run that has just ended.
    """
    there = {result.run for result in read_results_file(file)}
    for run in runs:
        if run.recipe.name in there or not (has_diverged(run) or is_complete(run, average)):
            continue
        line = _line(run, average, cpu_seconds)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(line), lineterminator="\n")
        if not file.is_file():
            writer.writeheader()
        writer.writerow(line)
        # One call, so that a reader and a kill see a whole line.
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, text.getvalue().encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def read_results_file(file: Path) -> list[RunResult]:
    """Reads the CSV file; empty if there is none."""
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [_result(row) for row in csv.DictReader(stream)]


def _result(row: dict[str, str]) -> RunResult:
    def by_domain(prefix: str) -> dict[str, float]:
        found = {name.removeprefix(prefix): text for name, text in row.items() if name.startswith(prefix)}
        return {domain: float(text) for domain, text in found.items() if text}

    return RunResult(
        run=row["run"],
        family=row["family"],
        size=row["size"],
        seed=int(row["seed"]),
        multiplier=float(row["multiplier"]),
        is_search=row["search"] == "1",
        parameters_total=int(row["parameters_total"]),
        parameters_active=int(row["parameters_active"]),
        tokens=int(row["tokens"]),
        flops=float(row["flops"]),
        losses=by_domain(LOSS),
        last=by_domain(LAST),
        cpu_seconds=float(row["cpu_seconds"]) if row["cpu_seconds"] else None,
        commit=row["commit"],
    )


def _line(run: Run, average: int | None, cpu_seconds: float | None) -> dict[str, object]:
    summary = None if has_diverged(run) else read_summary(_folder(run))
    losses = losses_of_run(run, average) if summary else {}
    recipe = run.recipe
    domains = sorted({*recipe.data.domains, *recipe.data.validation_domains})

    def cells(prefix: str, of: dict[str, float]) -> dict[str, str]:
        return {f"{prefix}{domain}": f"{of[domain]:.6f}" if domain in of else "" for domain in domains}

    return {
        "run": recipe.name,
        "family": run.family,
        "size": run.size,
        "seed": run.seed,
        "multiplier": f"{run.multiplier:g}",
        "search": int(run.is_search),
        "parameters_total": sizes.total_parameters(recipe.model),
        "parameters_active": sizes.active_parameters(recipe.model),
        "tokens": sizes.trained_tokens(recipe),
        "flops": f"{run.flops:.6g}",
        **cells(LOSS, losses),
        **cells(LAST, summary.validation_loss if summary else {}),
        "cpu_seconds": "" if cpu_seconds is None else f"{cpu_seconds:.1f}",
        "commit": summary.git_commit if summary else "",
    }


def _folder(run: Run) -> Path:
    return Path(run.recipe.runs_dir) / run.recipe.name

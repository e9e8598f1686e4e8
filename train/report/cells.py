"""Cells of runs that differ only in their seed, and their difference from the baseline at equal FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from train.report.scaling import CONFIDENCE, SAME_FLOPS, Floats, Runs


@dataclass(frozen=True)
class ComparedRun:
    """One complete run."""

    name: str
    family: str
    seed: int
    parameters_total: int
    parameters_active: int
    tokens: int
    flops: float
    """Training FLOPs, attention included."""
    losses: dict[str, float]
    """Held-out loss by domain, in the comparison's unit."""
    seconds: float
    git_commit: str


@dataclass(frozen=True)
class Cell:
    """The runs of one family at one budget, with their difference from the baseline's."""

    family: str
    parameters_total: int
    parameters_active: int
    tokens: int
    flops: float
    relative_flops: float
    """FLOPs over those of the comparison's smallest budget."""
    seeds: int
    loss: float
    """Mean over domains and seeds."""
    loss_error: float
    """Standard error over seeds; NaN for one seed."""
    by_domain: dict[str, float]
    difference: float | None
    """Loss minus the baseline's at equal FLOPs; None if the baseline has no such budget."""
    interval: tuple[float, float] | None
    """Confidence interval of the difference; None if either side has one seed. See :func:`_interval`."""

    @property
    def verdict(self) -> str:
        """The conclusion about the difference, in words."""
        if self.difference is None:
            return ""
        if self.interval is None:
            return "one seed: no interval"
        low, high = self.interval
        return "not significant" if low <= 0 <= high else "lower loss" if high < 0 else "higher loss"


def cells_of(ordered: Sequence[ComparedRun], runs: Runs, baseline: str) -> list[Cell]:
    """Computes the cells of a comparison.

    Args:
        ordered: the runs.
        runs: the same runs in the form for the fit.
        baseline: family to compare the others with.
    """
    members = {key: [ordered[run] for run in chosen] for key, chosen in runs.cells().items()}
    smallest = min(entry.flops for entry in ordered)
    cells = []
    for (family, flops), these in members.items():
        means = _means(these)
        others = next(
            (
                them
                for (other, at), them in members.items()
                if other == baseline != family and abs(at / flops - 1) < SAME_FLOPS
            ),
            None,
        )
        cells.append(
            Cell(
                family=family,
                parameters_total=these[0].parameters_total,
                parameters_active=these[0].parameters_active,
                tokens=these[0].tokens,
                flops=flops,
                relative_flops=flops / smallest,
                seeds=len(these),
                loss=float(means.mean()),
                loss_error=float(stats.sem(means)) if len(means) > 1 else float("nan"),
                by_domain={
                    domain: float(np.mean([entry.losses[domain] for entry in these]))
                    for domain in these[0].losses
                },
                difference=None if others is None else float(means.mean() - _means(others).mean()),
                interval=None if others is None else _interval(these, others),
            )
        )
    return cells


def _means(entries: Sequence[ComparedRun]) -> Floats:
    """Returns the mean loss over domains of each run, in the order of seeds."""
    ordered = sorted(entries, key=lambda entry: entry.seed)
    return np.array([np.mean(list(entry.losses.values())) for entry in ordered])


def _interval(these: Sequence[ComparedRun], others: Sequence[ComparedRun]) -> tuple[float, float] | None:
    """Returns the confidence interval of the difference of two cells' mean losses, by Student's t over seeds.

    Runs with the same seed see the same data in the same order, so they are paired if both sides have the
    same seeds. Otherwise Welch's test treats them as independent.
    """
    if min(len(these), len(others)) < 2:
        return None
    seeds, theirs = ({entry.seed for entry in cell} for cell in (these, others))
    if seeds == theirs and len(seeds) == len(these) == len(others):
        test = stats.ttest_rel(_means(these), _means(others))
    else:
        test = stats.ttest_ind(_means(these), _means(others), equal_var=False)
    found = test.confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)

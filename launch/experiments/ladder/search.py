"""Search for learning rates: initial multipliers, then more beyond an edge, until the best is inside."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

from launch.experiments.ladder.plan import LadderPlan, Rates, Run
from launch.experiments.ladder.runner import has_diverged, summary_of

STEP = 2.0
"""Ratio of the next multiplier beyond an edge to the edge."""
MOST_TRIED = 10
"""Maximum number of multipliers per family and size; a loss that still falls then has another cause."""

Losses = dict[tuple[str, str], dict[float, float]]
"""Mean held-out loss over domains and seeds by family and size, then by multiplier."""


def search_rates(plan: LadderPlan, train: Callable[[Sequence[Run]], list[Run]]) -> tuple[list[Run], Losses]:
    """Tries multipliers until each family's best lies between two others.

    Args:
        plan: the ladder.
        train: trains the missing runs, and returns those that are still missing.

    Returns:
        All runs of the search, and the losses; empty losses if the search is incomplete.
    """
    runs = plan.search_runs()
    while True:
        if train(runs):
            return runs, {}
        losses = losses_of(runs)
        more = [
            run
            for (family, size), tried in losses.items()
            if (multiplier := beyond(tried)) is not None
            for run in plan.search_of(family, size, multiplier)
        ]
        if not more:
            return runs, losses
        runs += more


def losses_of(runs: Sequence[Run]) -> Losses:
    """Losses of the complete runs of a search; NaN for a rate at which a run diverged."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        summary = summary_of(run)
        assert summary is not None or has_diverged(run), run
        loss = summary.mean_validation_loss if summary else math.nan
        found.setdefault((run.family, run.size), {}).setdefault(run.multiplier, []).append(loss)
    return {place: {rate: mean(each) for rate, each in tried.items()} for place, tried in found.items()}


def beyond(tried: dict[float, float]) -> float | None:
    """The next multiplier to try; None if the best lies between others, or enough were tried."""
    best = best_of(tried)
    if len(tried) >= MOST_TRIED or min(tried) < best < max(tried):
        return None
    return best * STEP if best == max(tried) else best / STEP


def best_of(tried: dict[float, float]) -> float:
    """The multiplier with the lowest loss, never one that diverged."""
    return min(tried, key=lambda multiplier: (math.isnan(tried[multiplier]), tried[multiplier], multiplier))


def chosen(losses: Losses) -> Rates:
    """Each family's best multiplier at each size."""
    return {place: best_of(tried) for place, tried in losses.items()}


def summary_lines(losses: Losses) -> list[str]:
    """The search's result, one line per family and size."""
    lines = []
    for (family, size), tried in losses.items():
        where = family if size == "one" else f"{family} at {size}"
        each = ", ".join(
            f"{key:g}x {'diverged' if math.isnan(loss) else f'{loss:.4f}'}"
            for key, loss in sorted(tried.items())
        )
        edge = "; at the edge of what was tried" if best_of(tried) in (min(tried), max(tried)) else ""
        lines.append(f"{where}: learning rate {best_of(tried):g}x the recipe's ({each}){edge}")
    return lines

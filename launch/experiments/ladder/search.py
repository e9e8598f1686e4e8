"""Search for learning rates: initial multipliers, then more beyond an edge, until the best is inside."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

import numpy as np

from launch.experiments.ladder.plan import LadderPlan, Rates, Run, RunBlock
from launch.experiments.ladder.results import has_diverged, losses_of_run

STEP = 2.0
"""Ratio of the next multiplier beyond an edge to the edge."""
MOST_TRIED = 10
"""Maximum number of multipliers per family and size; a loss that still falls then has another cause."""

Losses = dict[tuple[str, str], dict[float, float]]
"""Mean held-out loss over domains and seeds by family and size, then by multiplier."""


def search_rates(
    plan: LadderPlan, train: Callable[[Sequence[Run]], list[Run]], block: RunBlock | None = None
) -> tuple[list[Run], Losses]:
    """Tries multipliers until each family's best lies between two others.

    Args:
        plan: the ladder.
        train: trains the missing runs, and returns those that are still missing.
        block: only the searches that this block needs; None: all.

    Returns:
        All runs of the search, and the losses; empty losses if the search is incomplete.
    """
    runs = plan.search_runs(block)
    while True:
        if train(runs):
            return runs, {}
        losses = losses_of(runs, plan.ladder.average)
        more = [
            run
            for (family, size), tried in losses.items()
            if (multiplier := beyond(tried)) is not None
            for run in plan.search_of(family, size, multiplier)
        ]
        if not more:
            return runs, losses
        runs += more


def losses_of(runs: Sequence[Run], average: int | None) -> Losses:
    """Losses of the complete runs of a search; NaN for a rate at which a run diverged."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        losses = losses_of_run(run, average)
        assert losses or has_diverged(run), run
        loss = math.nan if has_diverged(run) else mean(losses.values())
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


def lowest_of_parabola(tried: dict[float, float]) -> float:
    """The lowest point of the parabola fitted to the losses over log2 of the multiplier, to two digits.

    All rates have the same number of seeds, so that the fit to their means is the fit to all runs. Rates that
    diverged are left out. If the parabola has no lowest point, or it lies outside of what was tried, the best
    that was tried is returned.
    """
    finite = {multiplier: loss for multiplier, loss in tried.items() if math.isfinite(loss)}
    if len(finite) < 3:
        return best_of(tried)
    places = np.log2(sorted(finite))
    bend, slope, _ = np.polyfit(places, [finite[multiplier] for multiplier in sorted(finite)], 2)
    lowest = -slope / (2 * bend) if bend > 0 else math.inf
    if not places[0] <= lowest <= places[-1]:
        return best_of(tried)
    return float(f"{2.0**lowest:.2g}")


def chosen(losses: Losses, *, by_parabola: bool = False) -> Rates:
    """Each family's best multiplier at each size."""
    best = lowest_of_parabola if by_parabola else best_of
    return {place: best(tried) for place, tried in losses.items()}


def summary_lines(losses: Losses, *, by_parabola: bool = False) -> list[str]:
    """The search's result, one line per family and size."""
    lines, rates = [], chosen(losses, by_parabola=by_parabola)
    for (family, size), tried in losses.items():
        where = family if size == "one" else f"{family} at {size}"
        each = ", ".join(
            f"{key:g}x {'diverged' if math.isnan(loss) else f'{loss:.4f}'}"
            for key, loss in sorted(tried.items())
        )
        edge = "; at the edge of what was tried" if best_of(tried) in (min(tried), max(tried)) else ""
        lines.append(f"{where}: learning rate {rates[family, size]:g}x the recipe's ({each}){edge}")
    return lines

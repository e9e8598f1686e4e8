"""Tests of differences between families of runs, as docs/efficiency-plan.md names them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
DRAWS = 4000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Quantity:
    """An estimate with its error, of which Student's t gives interval and p."""

    value: float
    error: float
    freedom: float
    """Degrees of freedom."""

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided confidence interval."""
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p of zero."""
        return float(2 * stats.t.sf(abs(self.value) / self.error, self.freedom))


def welch(these: Sequence[float], others: Sequence[float]) -> Quantity:
    """The difference of two means of independent runs, whose scatter may differ (Welch 1947)."""
    parts = [
        Quantity(float(np.mean(runs)), float(np.std(runs, ddof=1)) / math.sqrt(len(runs)), len(runs) - 1)
        for runs in (these, others)
    ]
    return combined(parts, [1.0, -1.0])


def combined(parts: Sequence[Quantity], factors: Sequence[float]) -> Quantity:
    """A sum of independent estimates times factors; degrees of freedom by Satterthwaite (1946)."""
    variances = [(factor * part.error) ** 2 for part, factor in zip(parts, factors, strict=True)]
    shares = [v * v / part.freedom for v, part in zip(variances, parts, strict=True)]
    value = sum(factor * part.value for part, factor in zip(parts, factors, strict=True))
    return Quantity(value, math.sqrt(sum(variances)), sum(variances) ** 2 / sum(shares))


def pooled(parts: Sequence[Quantity]) -> Quantity:
    """The mean of independent estimates of one quantity, weighted by inverse variance."""
    weights = np.array([part.error**-2 for part in parts])
    return combined(parts, list(weights / weights.sum()))


def slope_through(places: Sequence[float], parts: Sequence[Quantity]) -> Quantity:
    """The slope of independent estimates over their places, weighted by inverse variance."""
    weights, at = np.array([part.error**-2 for part in parts]), np.array(places)
    away = at - (weights * at).sum() / weights.sum()
    return combined(parts, list(weights * away / (weights * away**2).sum()))


def line(places: Sequence[float], losses: Sequence[float]) -> Quantity:
    """The slope of a least-squares line through runs that scatter alike."""
    fit = stats.linregress(places, losses)
    return Quantity(float(fit.slope), float(fit.stderr), len(losses) - 2)


def bend(places: Sequence[float], losses: Sequence[float]) -> Quantity:
    """The quadratic term of a least-squares parabola."""
    powers = np.vander(np.array(places), 3)
    found, rest, *_ = np.linalg.lstsq(powers, np.array(losses), rcond=None)
    freedom = len(losses) - 3
    inverse = np.linalg.inv(powers.T @ powers)
    return Quantity(float(found[0]), float(np.sqrt(rest[0] / freedom * inverse[0, 0])), freedom)


def ranks(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Two-sided p of Wilcoxon's rank sums, combined by Stouffer's method with numbers of runs as weights.

    Args:
        pairs: losses of either family, of each size; infinite for runs that diverged.
    """
    scores, weights = [], []
    for these, others in pairs:
        p = stats.mannwhitneyu(these, others, alternative="less", method="asymptotic").pvalue
        scores.append(float(stats.norm.isf(p)))
        weights.append(len(these) + len(others))
    score = np.dot(scores, weights) / np.linalg.norm(weights)
    return float(2 * stats.norm.sf(abs(score)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusts p of several tests (Holm 1979): those below a level are significant together at that level."""
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - place) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


@dataclass(frozen=True)
class SizeRuns:
    """Losses of the runs of two families at one size, and FLOPs of a run."""

    flops: float
    family: Sequence[float]
    baseline: Sequence[float]


def flop_ratio(sizes: Sequence[SizeRuns]) -> tuple[float, float, float]:
    """FLOPs of the baseline over those of the family at equal loss, and the bounds of its interval.

    The pooled difference over the slope of the baseline's loss on ln FLOPs from first to last size; the
    bounds are percentiles of a bootstrap over runs, within size and family.
    """
    draw = np.random.default_rng(0)

    def drawn(runs: Sequence[float]) -> tuple[Floats, Floats]:
        """Means and squared errors of the runs, and of draws of them."""
        picked = draw.choice(np.array(runs), (DRAWS, len(runs)))
        rows = np.vstack([np.array(runs)[None], picked])
        return rows.mean(axis=1), rows.var(axis=1, ddof=1) / len(runs)

    gaps, weights, levels = [], [], []
    for cell in sizes:
        (mean, error), (mean_of_baseline, error_of_baseline) = drawn(cell.family), drawn(cell.baseline)
        gaps.append(mean - mean_of_baseline)
        weights.append(1 / (error + error_of_baseline))
        levels.append(mean_of_baseline)
    difference = sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
    fall = (levels[-1] - levels[0]) / math.log(sizes[-1].flops / sizes[0].flops)
    ratios = np.exp(difference / fall)
    low, high = np.quantile(ratios[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(ratios[0]), float(low), float(high)

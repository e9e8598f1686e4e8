"""Loss against training FLOPs: saturating power laws, and the FLOPs that one family saves over another.

A family's curve is L(C) = E + A C^-alpha (Hoffmann et al. 2022, section 3.3, on the runs' line of sizes and
tokens). E, the entropy of the text, is a property of the held-out data and not of a model, so all families
share it; three sizes then leave a degree of freedom for the misfit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from train.recipe.errors import UserError

# Shapes: R runs, G families, D held-out domains, B bootstrap draws.

Floats = NDArray[np.float64]

HUBER_DELTA = 1e-3
"""Residuals of the logarithm beyond this count linearly (Hoffmann et al. 2022, appendix D.2)."""
START_SHARES = (0.0, 0.3, 0.6, 0.8, 0.9)
"""Initial values of E in the search, as fractions of the lowest loss."""
START_EXPONENTS = (0.05, 0.15, 0.3, 0.6)
REFERENCE_FLOPS_SHARE = 0.5
"""Quantile of the runs' FLOPs that serves as unit in the fit, so that A is a loss near the data."""
CONFIDENCE = 0.95
SAME_FLOPS = 0.03
"""Relative difference below which budgets count as equal: families are matched to whole heads and experts."""
DRAWS = 1000


@dataclass(frozen=True)
class Runs:
    """The data of R runs for the fit."""

    family: tuple[str, ...]
    """Family of each run."""
    flops: Floats
    """Training FLOPs [R]."""
    losses: Floats
    """Held-out loss by domain [R, D]."""
    seeds: tuple[int, ...]
    """Seed of each run, which determined the order of its data."""

    @property
    def families(self) -> tuple[str, ...]:
        """Names in the order of first appearance."""
        return tuple(dict.fromkeys(self.family))

    def budgets(self) -> dict[str, int]:
        """Returns the number of FLOP budgets of each family."""
        return {name: len({cell for cell in self.cells() if cell[0] == name}) for name in self.families}

    def of(self, families: Collection[str]) -> "Runs":
        """Selects the runs of some families."""
        kept = [run for run, family in enumerate(self.family) if family in families]
        return self.take(np.array(kept, dtype=int))

    def take(self, chosen: NDArray[np.int_]) -> "Runs":
        """Selects runs in the given order, possibly with repetitions."""
        return Runs(
            tuple(self.family[run] for run in chosen),
            self.flops[chosen],
            self.losses[chosen],
            tuple(self.seeds[run] for run in chosen),
        )

    def cells(self) -> dict[tuple[str, float], list[int]]:
        """Groups runs that differ only in their seed, by family and FLOPs."""
        cells: dict[tuple[str, float], list[int]] = {}
        for run, (family, flops) in enumerate(zip(self.family, self.flops, strict=True)):
            cells.setdefault((family, float(f"{flops:.6g}")), []).append(run)
        return cells

    def draw(self, generator: np.random.Generator) -> "Runs":
        """Draws a bootstrap sample: runs within each cell, and domains, the same for all runs.

        Cells of equal FLOPs that were trained with the same seeds draw the same ones: a seed determines the
        order of the data for all of them, and its effect on the loss is not a difference between families.
        Deviations from a cell's mean are scaled by sqrt(n / (n - 1)); otherwise the variance over n seeds
        would be too small by (n - 1) / n (the rescaled bootstrap of Rao and Wu 1988).
        """
        drawn: dict[tuple[object, ...], NDArray[np.int_]] = {}
        chosen, losses = [], []
        for (family, flops), members in self.cells().items():
            members.sort(key=lambda run: self.seeds[run])
            seeds = tuple(self.seeds[run] for run in members)
            is_paired = len(set(seeds)) == len(seeds)
            key = (self._budget(flops), seeds) if is_paired else (family, flops)
            if key not in drawn:
                drawn[key] = generator.integers(len(members), size=len(members))
            cell = np.array(members)[drawn[key]]
            mean = self.losses[members].mean(axis=0)
            spread = np.sqrt(len(members) / max(len(members) - 1, 1))
            chosen.append(cell)
            losses.append(mean + spread * (self.losses[cell] - mean))
        columns = generator.integers(self.losses.shape[1], size=self.losses.shape[1])
        return replace(self.take(np.concatenate(chosen)), losses=np.concatenate(losses)[:, columns])

    def _budget(self, flops: float) -> float:
        """Returns the smallest FLOPs of any run that count as equal to these."""
        return float(min(self.flops[np.abs(self.flops / flops - 1) < SAME_FLOPS]))


@dataclass(frozen=True)
class Curve:
    """L(C) = E + A (C / unit)^-alpha of one family."""

    irreducible: float
    """E, in the unit of the losses."""
    amplitude: float
    """A: the loss above E at ``unit`` FLOPs."""
    exponent: float
    """alpha."""
    unit: float
    """Unit of FLOPs."""
    range_flops: tuple[float, float]
    """Smallest and largest FLOPs of the fitted runs."""

    def loss(self, flops: Floats | float) -> Floats | float:
        """Returns the loss at the given training FLOPs."""
        return self.irreducible + self.amplitude * (flops / self.unit) ** -self.exponent

    def flops(self, loss: float) -> float:
        """Returns the FLOPs that reach a loss; infinite at or below E."""
        if loss <= self.irreducible:
            return float("inf")
        return self.unit * ((loss - self.irreducible) / self.amplitude) ** (-1 / self.exponent)

    def is_within(self, flops: float) -> bool:
        """Returns True if the FLOPs are within the runs' range, where the curve interpolates."""
        low, high = self.range_flops
        return low * (1 - 1e-9) <= flops <= high * (1 + 1e-9)


@dataclass(frozen=True)
class Advantage:
    """The FLOP ratio between two families at the loss that the baseline reaches with its largest budget."""

    family: str
    baseline: str
    level: float
    """The loss of the baseline's curve at its largest budget."""
    ratio: float
    """FLOPs of the baseline over FLOPs of the family at that loss."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    is_extrapolated: bool
    """True if that loss is outside the range of the family's runs."""

    @property
    def is_significant(self) -> bool:
        """True if the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def verdict(self) -> str:
        """The conclusion, in words."""
        if not self.is_significant:
            return "not significant"
        return "fewer FLOPs" if self.ratio > 1 else "more FLOPs"


def fit_curves(runs: Runs, *, start: "dict[str, Curve] | None" = None) -> dict[str, Curve]:
    """Fits all families' curves jointly, with a shared E, to the mean loss over domains.

    Minimises the Huber loss of the residuals of log L by L-BFGS from a grid of starting points (Hoffmann et
    al. 2022, appendix D.2).

    Args:
        runs: at least two FLOP budgets per family, and three in one of them.
        start: curves of similar data, as the starting point in place of the grid.

    Raises:
        UserError: if there are too few FLOP budgets, or a loss is not finite.
    """
    losses = _mean_losses(runs)
    families = runs.families
    unit = float(np.quantile(runs.flops, REFERENCE_FLOPS_SHARE, method="nearest"))
    log_flops, log_losses = np.log(runs.flops / unit), np.log(losses)
    which = np.array([families.index(family) for family in runs.family])

    def objective(parameters: Floats) -> tuple[float, Floats]:
        log_e, log_a, alpha = parameters[0], parameters[1::2], parameters[2::2]
        term = log_a[which] - alpha[which] * log_flops
        predicted = np.logaddexp(log_e, term)
        residual = predicted - log_losses
        is_small = np.abs(residual) <= HUBER_DELTA
        cost = np.where(is_small, residual**2 / 2, HUBER_DELTA * (np.abs(residual) - HUBER_DELTA / 2))
        slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        of_term = slope * np.exp(term - predicted)
        gradient = np.empty_like(parameters)
        gradient[0] = (slope * np.exp(log_e - predicted)).sum()
        gradient[1::2] = np.bincount(which, of_term, len(families))
        gradient[2::2] = np.bincount(which, -of_term * log_flops, len(families))
        # Scaled so that the stopping criterion, designed for values near one, sees such small differences.
        return float(cost.sum()) / HUBER_DELTA**2, gradient / HUBER_DELTA**2

    lowest = float(losses.min())
    bounds = [(np.log(lowest) - 12, np.log(lowest) - 1e-4)] + [(None, None), (1e-4, 5.0)] * len(families)
    best = None
    for guess in _starts(lowest, losses, families, start, unit):
        found = minimize(objective, guess, jac=True, method="L-BFGS-B", bounds=bounds)
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    return {
        family: Curve(
            irreducible=float(np.exp(best.x[0])),
            amplitude=float(np.exp(best.x[1 + 2 * place])),
            exponent=float(best.x[2 + 2 * place]),
            unit=unit,
            range_flops=(float(runs.flops[which == place].min()), float(runs.flops[which == place].max())),
        )
        for place, family in enumerate(families)
    }


def _mean_losses(runs: Runs) -> Floats:
    """Each run's mean loss over domains, once curves can be fitted to the runs."""
    budgets = runs.budgets()
    short = [family for family, count in budgets.items() if count < 2]
    if short or max(budgets.values(), default=0) < 3:
        counts = ", ".join(f"{family} {count}" for family, count in budgets.items())
        raise UserError(
            f"curves need two FLOP budgets per family and three in one of them; there are {counts}"
        )
    losses: Floats = runs.losses.mean(axis=1)
    if not np.isfinite(losses).all():
        raise UserError(f"{int((~np.isfinite(losses)).sum())} runs have no finite held-out loss")
    return losses


def advantages(
    runs: Runs, pairs: Sequence[tuple[str, str]], *, draws: int | None = None, seed: int = 0
) -> list[Advantage]:
    """Computes the FLOP ratio at equal loss for each pair, with a bootstrap interval.

    Each draw resamples seeds within each FLOP budget, and held-out domains, the same for all runs (percentile
    interval; Efron and Tibshirani 1993, chapter 13). See :meth:`Runs.draw`.

    Args:
        runs: at least two runs per cell or two domains; otherwise the interval is meaningless.
        pairs: (family, baseline) of each comparison.
        draws: number of bootstrap draws B; None: ``DRAWS``.
        seed: random seed of the draws.
    """
    curves = fit_curves(runs)
    point = {pair: _ratio(curves, *pair) for pair in pairs}
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(DRAWS if draws is None else draws):
        again = runs.draw(generator)
        fitted = fit_curves(again, start=curves)
        for pair in pairs:
            drawn[pair].append(_ratio(fitted, *pair)[0])
    tail = (1 - CONFIDENCE) / 2
    return [
        Advantage(
            family=family,
            baseline=baseline,
            level=point[family, baseline][1],
            ratio=point[family, baseline][0],
            # "lower" and "higher": interpolation with an infinite draw would give NaN.
            low=float(np.quantile(drawn[family, baseline], tail, method="lower")),
            high=float(np.quantile(drawn[family, baseline], 1 - tail, method="higher")),
            is_extrapolated=not curves[family].is_within(curves[family].flops(point[family, baseline][1])),
        )
        for family, baseline in pairs
    ]


def _ratio(curves: dict[str, Curve], family: str, baseline: str) -> tuple[float, float]:
    """Returns the FLOP ratio and the loss at which it is taken."""
    most = curves[baseline].range_flops[1]
    level = float(curves[baseline].loss(most))
    return most / curves[family].flops(level), level


def _starts(
    lowest: float, losses: Floats, families: tuple[str, ...], start: dict[str, Curve] | None, unit: float
) -> list[Floats]:
    if start is not None:
        one = next(iter(start.values()))
        guess = [np.log(min(one.irreducible, 0.999 * lowest))]
        for family in families:
            curve = start[family]
            guess += [np.log(curve.amplitude) - curve.exponent * np.log(unit / curve.unit), curve.exponent]
        return [np.array(guess)]
    middle = float(np.median(losses))
    return [
        np.array(
            [np.log(max(share, 1e-4) * lowest)] + [np.log(middle - share * lowest), alpha] * len(families)
        )
        for share in START_SHARES
        for alpha in START_EXPONENTS
    ]

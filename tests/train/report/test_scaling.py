"""Curves and FLOP ratios from synthetic runs whose truth is known."""

import numpy as np
import pytest

from train.report.scaling import Curve, Runs, ScalingError, advantages, fit_curves

BUDGETS = (1e15, 3e15, 1e16, 3e16)
TRUTH = {
    "dense": Curve(1.8, 1.6, 0.16, 1e16, (BUDGETS[0], BUDGETS[-1])),
    "fine": Curve(1.8, 1.6 * 2.0**-0.16, 0.16, 1e16, (BUDGETS[0], BUDGETS[-1])),
}
"""The fine family needs half of the FLOPs at every loss."""


def runs_of(
    truth: dict[str, Curve], *, noise: float = 0.0, seeds: int = 3, domains: int = 2, seed: int = 0
) -> Runs:
    generator = np.random.default_rng(seed)
    family, flops, losses = [], [], []
    for name, curve in truth.items():
        for budget in BUDGETS:
            for _ in range(seeds):
                family.append(name)
                flops.append(budget)
                of_domains = curve.loss(budget) + np.linspace(-0.2, 0.2, domains)
                losses.append(of_domains + generator.normal(0, noise, domains))
    return Runs(tuple(family), np.array(flops), np.array(losses))


def test_the_fit_finds_curves_that_exist() -> None:
    fitted = fit_curves(runs_of(TRUTH))
    budgets = np.geomspace(BUDGETS[0] / 10, BUDGETS[-1] * 10, 20)
    for family, curve in TRUTH.items():
        np.testing.assert_allclose(fitted[family].loss(budgets), curve.loss(budgets), rtol=2e-3)
        assert fitted[family].exponent == pytest.approx(curve.exponent, rel=0.05)
        assert fitted[family].irreducible == pytest.approx(1.8, rel=0.02)


def test_an_outlier_moves_the_curve_little() -> None:
    runs = runs_of(TRUTH, seeds=4)
    broken = runs.losses.copy()
    broken[1] += 1.0
    fitted = fit_curves(Runs(runs.family, runs.flops, broken))
    assert fitted["dense"].loss(BUDGETS[0]) == pytest.approx(TRUTH["dense"].loss(BUDGETS[0]), rel=5e-3)


def test_flops_is_the_inverse_of_loss() -> None:
    curve = TRUTH["dense"]
    assert curve.flops(float(curve.loss(7e15))) == pytest.approx(7e15)
    assert curve.flops(curve.irreducible) == float("inf")


def test_the_ratio_of_a_family_that_needs_half_is_two() -> None:
    (found,) = advantages(runs_of(TRUTH, noise=0.003), [("fine", "dense")], draws=200)
    assert found.ratio == pytest.approx(2.0, rel=0.1)
    assert found.low < 2.0 < found.high
    assert found.low > 1.5
    assert found.verdict == "fewer FLOPs"
    assert not found.is_extrapolated


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Over seeds alone: one domain, so that the domains' draws add nothing.
    hits = 0
    for seed in range(16):
        runs = runs_of(TRUTH, noise=0.01, seeds=5, domains=1, seed=seed)
        (found,) = advantages(runs, [("fine", "dense")], draws=60)
        hits += found.low <= 2.0 <= found.high
    # 95% is asked for; five seeds make the percentile interval somewhat narrow.
    assert hits >= 12


def test_equal_families_are_not_told_apart() -> None:
    same = {"dense": TRUTH["dense"], "other": TRUTH["dense"]}
    (found,) = advantages(runs_of(same, noise=0.02), [("other", "dense")], draws=200)
    assert found.low < 1 < found.high
    assert found.verdict == "not significant"


def test_a_loss_that_no_run_reached_is_extrapolated() -> None:
    runs = runs_of(TRUTH)
    keep = [n for n, family in enumerate(runs.family) if family == "dense" or runs.flops[n] < 1e16]
    short = Runs(tuple(runs.family[n] for n in keep), runs.flops[keep], runs.losses[keep])
    (found,) = advantages(short, [("fine", "dense")], draws=10)
    assert found.is_extrapolated
    assert found.ratio == pytest.approx(2.0, rel=0.1)


def test_too_few_budgets_are_refused() -> None:
    runs = runs_of(TRUTH)
    one = [n for n, flops in enumerate(runs.flops) if flops == BUDGETS[0]]
    with pytest.raises(ScalingError, match="two FLOP budgets"):
        fit_curves(Runs(tuple(runs.family[n] for n in one), runs.flops[one], runs.losses[one]))

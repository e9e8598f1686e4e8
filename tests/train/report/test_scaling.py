"""Curves and FLOP ratios from synthetic runs with known truth."""

from dataclasses import replace

import numpy as np
import pytest

from train.recipe.errors import UserError
from train.report.scaling import Curve, Runs, advantages, fit_curves

pytestmark = pytest.mark.slow

BUDGETS = (1e15, 3e15, 1e16, 3e16)
TRUTH = {
    "dense": Curve(1.8, 1.6, 0.16, 1e16, (BUDGETS[0], BUDGETS[-1])),
    "fine": Curve(1.8, 1.6 * 2.0**-0.16, 0.16, 1e16, (BUDGETS[0], BUDGETS[-1])),
}
"""The fine family needs half of the FLOPs at every loss."""


def runs_of(
    truth: dict[str, Curve],
    *,
    noise: float = 0.0,
    common: float = 0.0,
    seeds: int = 3,
    domains: int = 2,
    seed: int = 0,
) -> Runs:
    """Runs with noise of scale ``noise`` each, and of ``common`` shared by budget and seed."""
    generator = np.random.default_rng(seed)
    of_seed = generator.normal(0, common, (len(BUDGETS), seeds))
    family, flops, losses = [], [], []
    for name, curve in truth.items():
        for place, budget in enumerate(BUDGETS):
            for one in range(seeds):
                family.append(name)
                flops.append(budget)
                of_domains = curve.loss(budget) + np.linspace(-0.2, 0.2, domains) + of_seed[place, one]
                losses.append(of_domains + generator.normal(0, noise, domains))
    return Runs(tuple(family), np.array(flops), np.array(losses), tuple(range(seeds)) * (len(flops) // seeds))


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
    fitted = fit_curves(replace(runs, losses=broken))
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


@pytest.mark.parametrize(("noise", "common"), [(0.01, 0.0), (0.003, 0.03)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(noise: float, common: float) -> None:
    # Only over seeds: with one domain, resampling domains adds nothing.
    hits = 0
    for seed in range(16):
        runs = runs_of(TRUTH, noise=noise, common=common, domains=1, seed=seed)
        (found,) = advantages(runs, [("fine", "dense")], draws=60)
        hits += found.low <= 2.0 <= found.high
    # 95% is the target; a percentile interval of three seeds is still somewhat narrow.
    assert hits >= 12


def test_what_a_seed_does_to_all_families_widens_the_interval_less() -> None:
    paired: list[float] = []
    apart: list[float] = []
    for seed in range(4):
        runs = runs_of(TRUTH, noise=0.003, common=0.02, domains=1, seed=seed)
        unpaired = replace(runs, seeds=tuple(range(len(runs.family))))
        for widths, these in ((paired, runs), (apart, unpaired)):
            (found,) = advantages(these, [("fine", "dense")], draws=60)
            widths.append(found.high - found.low)
    assert np.mean(paired) < 0.85 * np.mean(apart)


def test_a_draw_scatters_as_much_as_the_seeds_do() -> None:
    runs = runs_of(TRUTH, noise=0.01, domains=1)
    generator = np.random.default_rng(0)
    means = np.array([runs.draw(generator).losses[:3].mean() for _ in range(4000)])
    # The standard error of a mean of three, with n - 1.
    assert means.std() == pytest.approx(runs.losses[:3].std(ddof=1) / np.sqrt(3), rel=0.05)


def test_equal_families_are_not_told_apart() -> None:
    same = {"dense": TRUTH["dense"], "other": TRUTH["dense"]}
    (found,) = advantages(runs_of(same, noise=0.02), [("other", "dense")], draws=200)
    assert found.low < 1 < found.high
    assert found.verdict == "not significant"


def test_a_loss_that_no_run_reached_is_extrapolated() -> None:
    runs = runs_of(TRUTH)
    keep = [n for n, family in enumerate(runs.family) if family == "dense" or runs.flops[n] < 1e16]
    (found,) = advantages(runs.take(np.array(keep)), [("fine", "dense")], draws=10)
    assert found.is_extrapolated
    assert found.ratio == pytest.approx(2.0, rel=0.1)


def test_too_few_budgets_are_refused() -> None:
    runs = runs_of(TRUTH)
    one = [n for n, flops in enumerate(runs.flops) if flops == BUDGETS[0]]
    with pytest.raises(UserError, match="two FLOP budgets"):
        fit_curves(runs.take(np.array(one)))

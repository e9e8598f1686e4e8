"""Tests of the plan on synthetic runs whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from launch.experiments.ladder.judgement import (
    Quantity,
    SizeRuns,
    bend,
    flop_ratio,
    holm,
    line,
    pooled,
    ranks,
    slope_through,
    welch,
)

DRAW = np.random.default_rng(3)


def losses(mean: float, scatter: float, runs: int = 20) -> list[float]:
    return list(mean + scatter * DRAW.standard_normal(runs))


def test_welch_is_scipy_s() -> None:
    these, others = losses(3.0, 0.02), losses(3.1, 0.06, 7)
    ours, wanted = welch(these, others), stats.ttest_ind(these, others, equal_var=False)
    assert ours.p == pytest.approx(wanted.pvalue) and ours.freedom == pytest.approx(wanted.df)
    assert ours.interval == pytest.approx(tuple(wanted.confidence_interval()))


def test_the_line_and_the_parabola_are_least_squares() -> None:
    places = [1.0, 2.0, 3.0, 4.0] * 5
    runs = [
        3 - 0.02 * x + 0.01 * x * x + 0.01 * z for x, z in zip(places, DRAW.standard_normal(20), strict=True)
    ]
    covariance = np.polyfit(places, runs, 2, cov=True)
    found = bend(places, runs)
    assert found.value == pytest.approx(covariance[0][0])
    assert found.error == pytest.approx(math.sqrt(covariance[1][0, 0]))
    assert line(places, runs).value == pytest.approx(np.polyfit(places, runs, 1)[0])


def pooled_of_two_sizes(truth: float) -> Quantity:
    # The scatter differs between sizes and families, as in the ladder.
    small = welch(losses(3.6 + truth, 0.045), losses(3.6, 0.03))
    return pooled([small, welch(losses(3.2 + truth, 0.03), losses(3.2, 0.025))])


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth, trials = -0.02, 500
    found = [pooled_of_two_sizes(truth) for _ in range(trials)]
    covered = np.mean([one.interval[0] <= truth <= one.interval[1] for one in found])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / trials) + 0.005)
    # Nothing is taken for a lower loss in one of forty cases; 0.02 nats are most of the time.
    nothing = [pooled_of_two_sizes(0.0) for _ in range(trials)]
    assert np.mean([one.interval[1] < 0 for one in nothing]) == pytest.approx(0.025, abs=0.021)
    assert np.mean([one.interval[1] < 0 for one in found]) > 0.8
    # The size that scatters less counts more.
    both = [Quantity(-0.1, 0.01, 30), Quantity(0.1, 0.03, 30)]
    assert pooled(both).value == pytest.approx(-0.1 * 0.9 + 0.1 * 0.1)


def test_the_slope_of_gaps_is_found() -> None:
    places = [math.log(20), math.log(50), math.log(100)]
    found = [
        slope_through(
            places,
            [
                welch(losses(3 - 0.02 * x, 0.03 + 0.01 * n, 10), losses(3, 0.03, 10))
                for n, x in enumerate(places)
            ],
        )
        for _ in range(250)
    ]
    assert np.mean([one.value for one in found]) == pytest.approx(-0.02, abs=0.002)
    assert np.mean([one.interval[0] <= -0.02 <= one.interval[1] for one in found]) == pytest.approx(
        0.95, abs=0.045
    )


def test_the_flop_ratio_of_a_known_law_is_found() -> None:
    # Loss falls by 0.4 nats per ln FLOPs; the family needs 1.1x fewer.
    sizes, hits = [], 0
    for trial in range(40):
        sizes = [
            SizeRuns(
                flops,
                losses(3.7 - 0.4 * math.log(1.1 * flops / 3e12), 0.03),
                losses(3.7 - 0.4 * math.log(flops / 3e12), 0.03),
            )
            for flops in (3e12, 8e12)
        ]
        ratio, low, high = flop_ratio(sizes)
        hits += low <= 1.1 <= high
        assert low < ratio < high and 1.0 < ratio < 1.2, trial
    assert hits >= 33


def test_ranks_judge_runs_that_diverged() -> None:
    better, worse = losses(3.0, 0.03), [*losses(3.1, 0.03, 18), math.inf, math.inf]
    assert ranks([(better, worse), (better, worse)]) < 1e-6
    one = stats.mannwhitneyu(better, worse, method="asymptotic").pvalue
    assert ranks([(better, worse)]) == pytest.approx(one, rel=0.2)
    assert ranks([(better, worse), (worse, better)]) > 0.9


def test_holm_is_the_textbook_s() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )

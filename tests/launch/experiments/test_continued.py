"""Replay shares are compared in pairs by seed, with Student's interval."""

import pytest

from launch.experiments.continued import ReplayRow, against_none, estimate

pytestmark = pytest.mark.slow


def test_the_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    # t of 0.975 with 2 degrees of freedom is 4.3027; the standard error is 1 / sqrt(3).
    assert (found.mean, found.high - 2.0) == pytest.approx((2.0, 4.302653 / 3**0.5))
    assert not found.is_significant and estimate([1.0, 1.1, 1.2]).is_significant


def test_shares_are_compared_within_a_seed() -> None:
    rows = [
        ReplayRow(seed, share, 5.0, 5.0 + seed - share + 0.01 * seed * share, 7.0, 6.0 + seed + share)
        for seed in (1, 2, 3)
        for share in (0.0, 0.5)
    ]
    forgetting, new = against_none(rows, 0.5)
    assert forgetting.mean == pytest.approx(-0.49) and forgetting.high < -0.45
    assert (new.mean, new.low, new.high) == pytest.approx((0.5, 0.5, 0.5))

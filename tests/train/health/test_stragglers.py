"""Slow ranks are named, but only if the ranks' own times are known."""

import pytest

from train.health.stragglers import slow_ranks


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.01, 1.5, 0.99], [2]),
        ([1.0, 1.2, 1.1, 1.05], []),
        ([1.0, 1.9], [1]),
        ([1.0, 2.0, 2.2, 1.1, 0.9, 1.9, 1.5, 1.0], []),
    ],
)
def test_slow_ranks_stand_out_of_the_others_spread(seconds: list[float], slow: list[int]) -> None:
    assert slow_ranks(seconds, 1.3) == slow

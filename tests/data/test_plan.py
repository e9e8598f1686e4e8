import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.plan import Mixture, Plan

FIVE = {"web": 0.67, "code": 0.15, "books": 0.08, "papers": 0.06, "maths": 0.04}


def counts(mixture: Mixture, count: int, start: int = 0) -> np.ndarray:
    """Samples of each domain [N, D] after each of the positions."""
    domain, _ = mixture.assign(start, count)
    return np.cumsum(domain[:, None] == np.arange(len(mixture.domains)), axis=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=10))
def test_every_prefix_follows_the_weights(shares: list[float]):
    weights = {f"domain{n}": share / sum(shares) for n, share in enumerate(shares)}
    mixture = Mixture(weights)
    quota = np.arange(1, 3001)[:, None] * [weights[name] for name in mixture.domains]
    error = np.abs(counts(mixture, 3000) - quota).max()
    assert error <= mixture.worst_error + 1e-6
    assert mixture.worst_error < (1.0 if len(shares) <= 4 else 1.7)


def test_a_usual_mixture_is_never_a_whole_sample_off():
    assert Mixture(FIVE).worst_error < 1
    assert Mixture({"code": 0.5, "prose": 0.5}).worst_error == 0.5


def test_ordinals_count_each_domain_up():
    domain, ordinal = Mixture(FIVE).assign(0, 2000)
    for index in range(len(FIVE)):
        mine = ordinal[domain == index]
        assert np.array_equal(mine, np.arange(mine.size))


@pytest.mark.parametrize("start", [1, 77, 123_456, 6_000_000_000])
def test_consumed_is_what_was_assigned(start: int):
    mixture = Mixture(FIVE)
    before, after = mixture.consumed(start), mixture.consumed(start + 500)
    added = counts(mixture, 500, start)[-1]
    assert {name: after[name] - before[name] for name in before} == dict(
        zip(mixture.domains, added.tolist(), strict=True)
    )
    assert sum(before.values()) == start


def test_any_part_of_the_order_equals_the_whole_of_it():
    plan = Plan(FIVE, {"web": 400, "code": 90, "books": 11, "papers": 31, "maths": 1}, seed=5)
    whole = plan.samples(0, 3000)
    for start, count in [(0, 1), (1, 16), (999, 500), (2999, 1), (1500, 0)]:
        part = plan.samples(start, count)
        for mine, all_of_it in zip(part, whole, strict=True):
            assert np.array_equal(mine, all_of_it[start : start + count])


def test_everything_is_read_once_before_anything_is_repeated():
    sizes = {"code": 50, "prose": 30}
    plan = Plan({"code": 0.3, "prose": 0.7}, sizes, seed=5)
    picks = plan.samples(0, 400)
    for index, name in enumerate(plan.domains):
        mine = picks.sample[picks.domain == index]
        epochs = picks.epoch[picks.domain == index]
        orders = []
        for turn in range(mine.size // sizes[name]):
            order = mine[turn * sizes[name] : (turn + 1) * sizes[name]]
            assert np.array_equal(np.sort(order), np.arange(sizes[name]))
            assert np.all(epochs[turn * sizes[name] : (turn + 1) * sizes[name]] == turn)
            orders.append(order.tolist())
        assert all(one != other for one, other in itertools.pairwise(orders))


def test_the_recipes_order_of_domains_changes_nothing_but_the_seed_does():
    sizes = {"code": 500, "prose": 300}
    one = Plan({"code": 0.3, "prose": 0.7}, sizes, seed=5).samples(0, 100)
    other = Plan({"prose": 0.7, "code": 0.3}, sizes, seed=5).samples(0, 100)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    reseeded = Plan({"code": 0.3, "prose": 0.7}, sizes, seed=6).samples(0, 100)
    assert (one.sample == reseeded.sample).sum() < 10


def test_a_position_in_the_billions_costs_no_more_than_the_first():
    plan = Plan(FIVE, dict.fromkeys(FIVE, 2_000_000_000), seed=5)
    picks = plan.samples(5_800_000_000, 1024)
    shares = np.bincount(picks.domain, minlength=5) / 1024
    expected = [FIVE[name] for name in plan.domains]
    assert np.abs(shares - expected).max() <= 2 / 1024
    assert picks.epoch.max() == 1 and plan.mixture.consumed(5_800_000_000)["web"] == 3_886_000_000

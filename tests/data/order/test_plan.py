import itertools

import numpy as np
import pytest

from data.order.plan import OrderPlan
from train.recipe.curriculum import MixtureSegment

FIVE = {"web": 0.67, "code": 0.15, "books": 0.08, "papers": 0.06, "maths": 0.04}


def make_plan(segments: list[MixtureSegment], shards: dict[str, list[int]], seed: int = 5) -> OrderPlan:
    return OrderPlan(segments, shards, seed=seed, window_shards=4)


def constant(weights: dict[str, float], sizes: dict[str, int], seed: int = 5) -> OrderPlan:
    """One phase over domains with one shard each."""
    return make_plan([MixtureSegment(0, weights)], {name: [size] for name, size in sizes.items()}, seed)


def test_any_part_of_the_order_equals_the_whole_of_it():
    plan = constant(FIVE, {"web": 400, "code": 90, "books": 11, "papers": 31, "maths": 1})
    whole = plan.samples(0, 3000)
    for start, count in [(0, 1), (1, 16), (999, 500), (2999, 1), (1500, 0)]:
        part = plan.samples(start, count)
        for mine, all_of_it in zip(part, whole, strict=True):
            assert np.array_equal(mine, all_of_it[start : start + count])


@pytest.mark.parametrize("changes", [[], [(100, 1)], [(60, 4), (220, 2), (300, 1)]])
def test_everything_is_read_once_before_anything_is_repeated(changes: list[tuple[int, int]]):
    """Domains continue in each phase where the previous phase left them."""
    mixes = itertools.cycle([{"code": 0.3, "prose": 0.7}, {"code": 0.8, "prose": 0.2}])
    segments = [MixtureSegment(at, next(mixes), step) for at, step in [(0, 1), *changes]]
    sizes = {"code": [20, 20, 10], "prose": [16, 14]}
    plan = make_plan(segments, sizes)
    picks = plan.samples(0, 400)
    for index, name in enumerate(plan.domains):
        size = sum(sizes[name])
        mine, epochs = picks.sample[picks.domain == index], picks.epoch[picks.domain == index]
        assert mine.size == plan.consumed(400)[name]
        orders = []
        for turn in range(mine.size // size):
            order = mine[turn * size : (turn + 1) * size]
            assert np.array_equal(np.sort(order), np.arange(size))
            assert np.all(epochs[turn * size : (turn + 1) * size] == turn)
            orders.append(order.tolist())
        assert len(orders) > 1 and all(one != other for one, other in itertools.pairwise(orders))


def test_the_recipes_order_of_domains_changes_nothing_but_the_seed_does():
    sizes = {"code": 500, "prose": 300}
    one = constant({"code": 0.3, "prose": 0.7}, sizes).samples(0, 100)
    other = constant({"prose": 0.7, "code": 0.3}, sizes).samples(0, 100)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    reseeded = constant({"code": 0.3, "prose": 0.7}, sizes, seed=6).samples(0, 100)
    assert (one.sample == reseeded.sample).sum() < 10


def test_a_domain_that_joins_leaves_the_others_order():
    sizes = {"code": [50, 50], "prose": [40, 40], "web": [60]}
    before = make_plan([MixtureSegment(0, {"code": 0.5, "prose": 0.5})], sizes)
    after = make_plan(
        [
            MixtureSegment(0, {"code": 0.5, "prose": 0.5}),
            MixtureSegment(60, {"code": 0.2, "prose": 0.2, "web": 0.6}),
        ],
        sizes,
    )
    for name in ("code", "prose"):
        orders = []
        for plan in (before, after):
            picks = plan.samples(0, 200)
            orders.append(picks.sample[picks.domain == plan.domains.index(name)][:45].tolist())
        assert orders[0] == orders[1]


def test_a_position_in_the_billions_costs_no_more_than_the_first():
    plan = make_plan([MixtureSegment(0, FIVE)], {name: [1_000_000] * 2000 for name in FIVE})
    picks = plan.samples(5_800_000_000, 1024)
    shares = np.bincount(picks.domain, minlength=5) / 1024
    expected = [FIVE[name] for name in plan.domains]
    assert np.abs(shares - expected).max() <= 2 / 1024
    assert picks.epoch.max() == 1 and plan.consumed(5_800_000_000)["web"] == 3_886_000_000


def test_positions_of_a_sample_are_those_at_which_it_is_read():
    plan = make_plan(
        [MixtureSegment(0, FIVE), MixtureSegment(640, FIVE, 4)], {name: [16, 16, 9] for name in FIVE}
    )
    picks = plan.samples(0, 2000)
    for index, name in enumerate(plan.domains):
        for sample in (0, 17, 40):
            places = np.flatnonzero((picks.domain == index) & (picks.sample == sample))
            assert plan.positions_of(name, sample, 2000) == places.tolist()


def test_a_domain_is_exhausted_at_the_first_position_beyond_its_epochs():
    plan = constant({"code": 0.3, "prose": 0.7}, {"code": 50, "prose": 30})
    picks = plan.samples(0, 400)
    at = plan.exhausted_at("prose", 2.5, 400)
    assert at is not None and at == np.flatnonzero(picks.domain == 1)[75]
    assert plan.exhausted_at("code", 3, 400) is None
    assert plan.exhausted_at("code", 2, 400) == np.flatnonzero(picks.domain == 0)[100]

import numpy as np
import pytest

from data.text.split import BYTES_PER_TOKEN, Groups, is_held_out, moves_of, rank, share_of, tally
from train.recipe.preparation import Preparation


def held_out(keys: np.ndarray, groups: np.ndarray, domains: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Whether each document [N] is held out, by the rules for groups, applied to all of them at once."""
    numbers, group_of_N = np.unique(groups, return_inverse=True)
    least, share = np.full(numbers.size, np.iinfo(np.uint64).max), np.zeros(numbers.size)
    np.minimum.at(least, group_of_N, keys)
    np.maximum.at(share, group_of_N, shares[domains])
    members = np.unique(np.stack([group_of_N, domains.astype(np.int64)], 1), axis=0)
    is_out, ranks = is_held_out(rank(least), share), rank(least)
    # In three parts, as spans of documents have them.
    tallies = []
    for part in np.array_split(np.arange(numbers.size), 3):
        inside = np.isin(members[:, 0], part)
        mine = np.stack([members[inside, 0] - part[:1].sum(), members[inside, 1]], 1)
        there = Groups(numbers[part], ranks[part], is_out[part], np.zeros(part.size, bool), mine)
        tallies.append(tally(there, shares.size))
    for number, is_held in moves_of(tallies).items():
        is_out[np.searchsorted(numbers, number)] = is_held
    return is_out[group_of_N]


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def sides_of(some: np.ndarray, groups: np.ndarray, domains: np.ndarray | None = None, share: float = 0.03):
    domains = np.zeros(some.size, np.int64) if domains is None else domains
    return held_out(some, groups, domains, np.full(int(domains.max(initial=0)) + 1, share))


def test_a_group_is_on_one_side_at_any_place():
    some = keys(600)
    groups = np.r_[np.arange(300), np.arange(300)]
    sides = sides_of(some, groups)
    assert (sides[:300] == sides[300:]).all() and 0.005 < sides.mean() < 0.08
    assert (sides_of(some[::-1], groups[::-1])[::-1] == sides).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_group_of_several_domains_is_on_one_side(seed: int):
    rng = np.random.default_rng(seed)
    groups, domains = rng.integers(0, 700, 2000), rng.integers(0, 4, 2000)
    sides = sides_of(keys(2000, seed), groups, domains)
    assert all(np.unique(sides[groups == group]).size == 1 for group in np.unique(groups))
    assert all(set(sides[domains == domain].tolist()) == {True, False} for domain in range(4))


def test_large_groups_are_not_held_out_more_often():
    sides = sides_of(keys(40_000), np.arange(40_000) // 20)
    assert 0.02 < sides.mean() < 0.04


def test_a_side_does_not_depend_on_unrelated_documents():
    some, more = keys(500), keys(300, seed=1)
    assert (sides_of(np.r_[some, more], np.arange(800))[:500] == sides_of(some, np.arange(500))).all()


def test_no_side_is_empty():
    for count in (2, 3, 10):
        assert set(sides_of(keys(count), np.arange(count)).tolist()) == {True, False}
    assert sides_of(keys(1), np.arange(1)).size == 1 and sides_of(keys(0), np.arange(0)).size == 0
    # A group that is also in another domain moves only if there is no other.
    groups, domains = np.array([0, 1, 2, 0, 3]), np.array([0, 0, 0, 1, 1])
    sides = sides_of(keys(5), groups, domains, share=1e-9)
    assert not sides[[0, 3]].any() and sides[4] and sides[1:3].sum() == 1


def test_each_domain_holds_out_its_own_share():
    some, domains = keys(40_000), np.arange(40_000) % 2
    sides = held_out(some, np.arange(40_000), domains, np.array([0.2, 0.01]))
    assert sides[domains == 0].mean() == pytest.approx(0.2, abs=0.02)
    assert sides[domains == 1].mean() == pytest.approx(0.01, abs=0.004)


def test_the_share_follows_from_tokens_and_is_limited():
    preparation = Preparation()
    assert share_of(preparation, 10**6) == 0.03 == share_of(preparation, 0)
    tokens = 12 * 10**12
    assert share_of(preparation, BYTES_PER_TOKEN * tokens) * tokens == pytest.approx(10**7)
    assert share_of(Preparation(validation_tokens=1000, validation_share=0.5), 8000) == 0.5

import numpy as np

from data.text.split import held_out


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def test_a_group_is_on_one_side_at_any_place():
    some = keys(600)
    groups = np.r_[np.arange(300), np.arange(300)]
    sides = held_out(some, groups)
    assert (sides[:300] == sides[300:]).all() and 0.005 < sides.mean() < 0.08
    assert (held_out(some[::-1], groups[::-1])[::-1] == sides).all()


def test_large_groups_are_not_held_out_more_often():
    sides = held_out(keys(40_000), np.arange(40_000) // 20)
    assert 0.02 < sides.mean() < 0.04


def test_a_side_does_not_depend_on_unrelated_documents():
    some, more = keys(500), keys(300, seed=1)
    assert (held_out(np.r_[some, more], np.arange(800))[:500] == held_out(some, np.arange(500))).all()


def test_no_side_is_empty():
    for count in (2, 3, 10):
        assert set(held_out(keys(count), np.arange(count)).tolist()) == {True, False}
    assert held_out(keys(1), np.arange(1)).size == 1 and held_out(keys(0), np.arange(0)).size == 0

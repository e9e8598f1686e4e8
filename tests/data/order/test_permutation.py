import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.permutation import KeyedPermutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_it_is_a_bijection(size: int, seed: int):
    permute = KeyedPermutation(size, seed)
    images = permute(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))
    assert np.array_equal(permute.inverse(images), np.arange(size))


def test_a_part_equals_the_whole_of_it():
    permute = KeyedPermutation(100_003, 17, "code", 2)
    whole = permute(np.arange(100_003))
    assert np.array_equal(permute(np.arange(41_000, 41_050)), whole[41_000:41_050])


def test_the_order_is_that_of_earlier_versions():
    """A run that is resumed with a newer version continues in the same order."""
    assert KeyedPermutation(10, 17, "code", 2)(np.arange(10)).tolist() == [6, 4, 8, 9, 0, 1, 3, 7, 5, 2]
    assert KeyedPermutation(100_003, 17, "code", 2)(np.arange(6)).tolist() == [
        42548,
        61746,
        41801,
        10882,
        44164,
        91274,
    ]


def test_every_part_of_the_key_matters():
    everything = np.arange(1000)
    keys = [(17, "code", 0), (18, "code", 0), (17, "prose", 0), (17, "code", 1)]
    orders = [KeyedPermutation(1000, *key)(everything) for key in keys]
    for n, one in enumerate(orders):
        for other in orders[:n]:
            # Random orders agree at one place in a thousand on average.
            assert (one == other).sum() < 12


@pytest.mark.parametrize("size", [1_000, 65_536, 100_003])
def test_it_shuffles_like_a_random_permutation(size: int):
    images = KeyedPermutation(size, 3)(np.arange(size)).astype(float)
    # For a random order these are normal with deviation 1/sqrt(size).
    with_place = np.corrcoef(images, np.arange(size))[0, 1]
    with_neighbour = np.corrcoef(images[1:], images[:-1])[0, 1]
    assert abs(with_place) < 4 / size**0.5
    assert abs(with_neighbour) < 4 / size**0.5
    # Neighbours end up a third of the range apart on average.
    assert np.abs(np.diff(images)).mean() / size == pytest.approx(1 / 3, abs=4 / size**0.5)


def test_billions_of_points_need_no_table():
    size = 3_000_000_019
    somewhere = np.arange(2_999_990_000, 2_999_990_000 + 5000)
    images = KeyedPermutation(size, 1)(somewhere)
    assert images.min() >= 0 and images.max() < size and np.unique(images).size == 5000

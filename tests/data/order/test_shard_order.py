import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.permutation import KeyedPermutation
from data.order.shard_order import Grouping, ShardOrder, ShardSizes


def make_order(
    sizes: list[int], window: int = 3, groupings: tuple[tuple[int, int], ...] = ((0, 1),), seed: int = 5
) -> ShardOrder:
    return ShardOrder(
        "code",
        ShardSizes.of(sizes),
        seed=seed,
        window_shards=window,
        groupings=[Grouping(*grouping) for grouping in groupings],
    )


def everything(order: ShardOrder, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    return order.samples(np.arange(epochs * order.sizes.total))


SIZES = st.lists(st.sampled_from([1, 2, 5, 16, 16, 16, 16]), min_size=1, max_size=20)


@settings(max_examples=80, deadline=None)
@given(
    SIZES,
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 4, 8])), max_size=6),
)
def test_every_epoch_reads_everything_once_whatever_the_lengths(
    sizes: list[int], window: int, changes: list[tuple[int, int]]
):
    """The rule that matters: nothing is skipped or read twice, wherever the length changes."""
    at, step, groupings = 0, 1, [(0, 1)]
    for sequences, next_step in changes:
        at, step = at + sequences * step, next_step
        groupings.append((at, step))
    order = make_order(sizes, window, tuple(groupings))
    samples, epochs = everything(order, 4)
    for epoch in range(4):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(sum(sizes)))
    for ordinal in range(0, samples.size, 5):
        assert order.ordinal_of(int(samples[ordinal]), int(epochs[ordinal])) == ordinal


def test_epochs_differ_and_a_part_equals_the_whole():
    order = make_order([16] * 10)
    samples, _ = everything(order, 3)
    assert (samples[:160] != samples[160:320]).any()
    for begin in (0, 31, 47, 159, 300):
        assert np.array_equal(order.samples(np.arange(begin, begin + 50))[0], samples[begin : begin + 50])


def test_a_shard_is_read_only_within_its_window():
    order = make_order([16] * 10 + [7], window=4)
    samples, _ = everything(order, 1)
    shards = samples // 16
    seen = [np.flatnonzero(shards == shard) for shard in range(11)]
    assert max(places[-1] - places[0] for places in seen) < 4 * 16
    for ordinal in range(samples.size):
        assert shards[ordinal] in order.window_shards(ordinal)


@pytest.mark.parametrize("start", [0, 3, 64, 131])
def test_longer_sequences_are_neighbours_of_one_shard(start: int):
    """From the first window in the longer phase on, all but a few sequences are neighbours."""
    order = make_order([16] * 30 + [13], window=3, groupings=((0, 1), (start, 4)))
    begin = start + (-start % 48 if start else 0)
    aligned = start + -(-(begin - start) // 4) * 4
    samples = order.samples(np.arange(aligned, aligned + 4 * ((493 - aligned) // 4)))[0].reshape(-1, 4)
    whole = (np.diff(samples) == 1).all(axis=1) & (samples[:, 0] // 16 == samples[:, 3] // 16)
    # After the shard of 13, each of the 11 windows splits one group to align with sequences.
    assert whole.sum() >= len(whole) - 11


def test_what_is_planned_for_later_changes_nothing_before():
    one = make_order([16] * 12)
    other = make_order([16] * 12, groupings=((0, 1), (100, 4)))
    assert np.array_equal(one.samples(np.arange(144))[0], other.samples(np.arange(144))[0])
    assert not np.array_equal(one.samples(np.arange(144, 192))[0], other.samples(np.arange(144, 192))[0])


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_sizes_are_those_of_the_list(sizes: list[int], seed: int):
    found = ShardSizes.of(sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    assert np.array_equal(found.before(np.arange(len(sizes) + 1)), bounds)
    assert found.total == bounds[-1]
    assert [found.holding(n) for n in range(found.total)] == np.repeat(np.arange(len(sizes)), sizes).tolist()
    order = KeyedPermutation(len(sizes), seed)
    shuffled = np.array(sizes)[order(np.arange(len(sizes)))]
    assert np.array_equal(np.diff(found.shuffled(order).before(np.arange(len(sizes) + 1))), shuffled)


def test_a_window_shuffles_like_a_random_order():
    order = make_order([64] * 64, window=16)
    samples, _ = everything(order, 1)
    for begin in range(0, 4096, 1024):
        ranks = samples[begin : begin + 1024].argsort().argsort().astype(float)
        assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 4 / 32
        assert abs(np.corrcoef(ranks, np.arange(1024))[0, 1]) < 4 / 32

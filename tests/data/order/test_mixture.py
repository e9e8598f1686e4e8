import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order.mixture import PARTS, Mixture
from train.recipe.curriculum import MixtureSegment

FIVE = {"web": 0.67, "code": 0.15, "books": 0.08, "papers": 0.06, "maths": 0.04}
WEIGHTS = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=10)


def named(shares: list[float]) -> dict[str, float]:
    return {f"domain{n:02}": share / sum(shares) for n, share in enumerate(shares)}


def counts(mixture: Mixture, count: int, start: int = 0) -> np.ndarray:
    """Samples of each domain [N, D] after each position."""
    domain, _ = mixture.assign(np.arange(start, start + count))
    return np.cumsum(domain[:, None] == np.arange(len(mixture.domains)), axis=0)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_every_prefix_follows_the_weights(shares: list[float]):
    weights = named(shares)
    mixture = Mixture([MixtureSegment(0, weights)])
    quota = np.arange(1, 3001)[:, None] * [weights[name] for name in mixture.domains]
    error = np.abs(counts(mixture, 3000) - quota).max()
    assert error < (1.0 if len(shares) <= 4 else 1.7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, st.integers(1, 40), st.sampled_from([1, 2, 4])), min_size=1, max_size=12))
def test_an_error_is_carried_from_segment_to_segment(parts: list[tuple[list[float], int, int]]):
    """In sequences of the longest step no domain is ever off by two, however often the weights change."""
    segments, quota, at = [], [], 0
    for shares, sequences, step in parts:
        segments.append(MixtureSegment(at, named(shares), step))
        quota += [named(shares)] * (sequences * step)
        at += sequences * step
    mixture = Mixture(segments)
    wanted = np.cumsum([[row.get(name, 0.0) for name in mixture.domains] for row in quota], axis=0)
    ends = np.cumsum([sequences * step for _, sequences, step in parts]) - 1
    assert np.abs(counts(mixture, at) - wanted)[ends].max() < 2 * max(step for *_, step in parts)


def test_a_ramp_of_many_segments_is_as_exact_as_one():
    segments = [MixtureSegment(7 * n, {"a": 0.9 - 0.0008 * n, "b": 0.1 + 0.0008 * n}) for n in range(1000)]
    wanted = np.cumsum(np.repeat([segment.weights["a"] for segment in segments], 7))
    assert np.abs(counts(Mixture(segments), 7000)[:, 0] - wanted).max() < 1.01


def test_ordinals_count_each_domain_up_over_all_segments():
    mixture = Mixture(
        [
            MixtureSegment(0, FIVE),
            MixtureSegment(700, {"maths": 0.5, "code": 0.5}),
            MixtureSegment(1100, FIVE),
        ]
    )
    domain, ordinal = mixture.assign(np.arange(2000))
    for index in range(len(FIVE)):
        mine = ordinal[domain == index]
        assert np.array_equal(mine, np.arange(mine.size))


def test_sequences_of_several_samples_are_of_one_domain():
    mixture = Mixture([MixtureSegment(0, FIVE), MixtureSegment(120, FIVE, step=8)])
    domain, ordinal = mixture.assign(np.arange(120 + 800))
    assert (domain[120:].reshape(-1, 8) == domain[120::8, None]).all()
    assert (np.diff(ordinal[120:].reshape(-1, 8)) == 1).all()
    for index in range(len(FIVE)):
        assert np.array_equal(ordinal[domain == index], np.arange((domain == index).sum()))


@pytest.mark.parametrize("start", [1, 77, 1003, 123_456, 6_000_000_000])
def test_consumed_is_what_was_assigned(start: int):
    mixture = Mixture(
        [MixtureSegment(0, FIVE), MixtureSegment(1000, {"web": 1.0}, 4), MixtureSegment(9000, FIVE)]
    )
    before, after = mixture.consumed(start), mixture.consumed(start + 500)
    added = counts(mixture, 500, start)[-1]
    assert [after[name] - before[name] for name in mixture.domains] == added.tolist()
    assert sum(before.values()) == start


def test_positions_are_found_by_ordinal():
    mixture = Mixture([MixtureSegment(0, FIVE), MixtureSegment(1000, FIVE, 4)])
    positions = np.arange(0, 3000, 7)
    for position, domain, ordinal in zip(positions, *mixture.assign(positions), strict=True):
        assert mixture.position_of(mixture.domains[domain], int(ordinal)) == position


def test_decimal_weights_are_exact_after_billions():
    at = 6_000_000_000
    consumed = Mixture([MixtureSegment(0, FIVE)]).consumed(at)
    assert all(abs(consumed[name] - round(FIVE[name] * at)) <= 1 for name in FIVE)
    assert PARTS * 0.67 == 670_000_000


def test_a_later_segment_changes_nothing_before_it():
    one = Mixture([MixtureSegment(0, FIVE)])
    other = Mixture([MixtureSegment(0, FIVE), MixtureSegment(500, {"new": 0.5, "web": 0.5})])
    domain, ordinal = one.assign(np.arange(500))
    others, other_ordinal = other.assign(np.arange(500))
    assert [one.domains[d] for d in domain] == [other.domains[d] for d in others]
    assert np.array_equal(ordinal, other_ordinal)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 2**45), st.sampled_from([1, 8]))
def test_no_length_is_too_long(shares: list[float], sequences: int, step: int):
    """1000T tokens are 2^43 sequences of 128; each is the one that whole numbers of any size give."""
    mixture = Mixture([MixtureSegment(0, named(shares), step)])
    start = sequences * step
    domain, ordinal = mixture.assign(np.arange(start, start + 50))
    for position, index, before in zip(range(start, start + 50), domain, ordinal, strict=True):
        exact = mixture.consumed(position)[mixture.domains[index]]
        assert mixture.consumed(position + 1)[mixture.domains[index]] == exact + 1 and before == exact
    parts = [round(share * PARTS) for share in named(shares).values()]
    for name, part in zip(mixture.domains, parts, strict=True):
        # Weights are whole billionths.
        assert abs(mixture.consumed(start)[name] * PARTS - part * start) <= 2 * PARTS * step + start
    assert mixture.position_of(mixture.domains[domain[7]], int(ordinal[7])) == start + 7


@pytest.mark.parametrize("position", [2**33 - 5, 2**33 + 2**20, 2**43])
def test_a_stretch_after_a_long_one_begins_where_that_ended(position: int):
    at = position // 8 * 8
    mixture = Mixture([MixtureSegment(0, FIVE, stage=0), MixtureSegment(at, FIVE, step=8, stage=1)])
    domain, ordinal = mixture.assign(np.arange(at - 20, at + 24))
    for index in range(len(FIVE)):
        mine = ordinal[domain == index]
        assert np.array_equal(mine, np.arange(mine.size) + (mine[0] if mine.size else 0))

"""The layers of a pipeline's stages, and the order of their passes."""

import itertools

import pytest

from train.recipe.pipeline import Pass, cut, even_layers, finish, most_in_flight, passes

SHAPES = [(2, 1, 1), (2, 1, 8), (3, 1, 5), (4, 1, 4), (4, 1, 2), (2, 2, 4), (2, 3, 8), (4, 2, 4), (4, 3, 16)]
"""Stages, chunks, microbatches."""


def test_layers_are_cut_as_even_as_they_can_be() -> None:
    costs = (3, 1, 4, 1, 5, 9, 2, 6)
    for parts in range(1, len(costs) + 1):
        found = even_layers(costs, parts)
        assert sum(found) == len(costs) and len(found) == parts

        def measure(counts: tuple[int, ...]) -> tuple[int, int]:
            sums = [sum(costs[layer] for layer in part.layers) for part in cut(counts)]
            return max(sums), sum(each**2 for each in sums)

        inner = itertools.combinations(range(1, len(costs)), parts - 1)
        every = [tuple(b - a for a, b in itertools.pairwise((0, *cuts, len(costs)))) for cuts in inner]
        assert measure(found) == min(map(measure, every))


def test_a_head_worth_two_layers_leaves_the_last_stage_two_fewer() -> None:
    assert even_layers((*[1] * 9, 3), 3) == (4, 4, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_runs_every_pass_once_and_none_waits_in_vain(shape: tuple[int, int, int]) -> None:
    stages, chunks, microbatches = shape
    order = [passes(stages, chunks, microbatches, stage) for stage in range(stages)]
    every = {
        Pass(is_forward, chunk, microbatch)
        for is_forward in (True, False)
        for chunk in range(chunks)
        for microbatch in range(microbatches)
    }
    assert all(len(each) == len(every) and set(each) == every for each in order)
    # A link delivers what was sent in its order: the sender's is the receiver's.
    for direction, (source, target) in itertools.product((True, False), itertools.pairwise(range(stages))):
        sender, receiver = (source, target) if direction else (target, source)
        sent, received = (
            [each for each in order[s] if each.is_forward == direction] for s in (sender, receiver)
        )
        assert sent == received
    parts = stages * chunks
    # The first pass reaches the last stage, all are busy, and the last one comes back.
    assert finish(order, chunks, [1.0] * parts, [2.0] * parts) == 3 * (microbatches * chunks + stages - 1)


def test_stages_that_wait_for_each_other_are_noticed() -> None:
    order = [passes(2, 1, 2, 1), passes(2, 1, 2, 0)]
    with pytest.raises(ValueError, match="wait for each other"):
        finish(order, 1, [1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(("stage", "expected"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_a_stage_keeps_as_many_microbatches_as_are_before_it_comes_back(stage: int, expected: int) -> None:
    assert most_in_flight(passes(4, 1, 8, stage)) == {0: expected}
    assert most_in_flight(passes(4, 1, 2, stage)) == {0: min(2, expected)}


def test_chunks_keep_more() -> None:
    kept = [sum(most_in_flight(passes(4, 2, 8, stage)).values()) for stage in range(4)]
    assert kept == [11, 9, 7, 5]

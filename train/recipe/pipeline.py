"""Pipelines: which layers each stage has, and the order of a rank's passes. Needs no torch.

A pipeline's ranks are stages, numbered as activations travel. With several chunks per stage (Narayanan et al.
2021, arXiv 2104.04473, section 2.2) the model is cut into that many times more parts, which go round the
stages: part n is chunk n // stages of stage n mod stages.

Shapes: P stages, V chunks per stage, M microbatches.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class ModelPart(NamedTuple):
    """Consecutive layers that a rank runs in one pass."""

    layers: range
    is_first: bool
    """It begins with the embedding of tokens."""
    is_last: bool
    """It ends with the loss."""


def cut(layers: Iterable[int]) -> tuple[ModelPart, ...]:
    """Returns the parts of a model whose parts have so many layers."""
    counts, begin, found = list(layers), 0, []
    for n, count in enumerate(counts):
        found.append(ModelPart(range(begin, begin + count), n == 0, n == len(counts) - 1))
        begin += count
    return tuple(found)


@functools.lru_cache(maxsize=64)
def even_layers(costs: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Returns the layers of each part where all are as even as they can be.

    The longest part is as short as possible, and of such cuts the sum of squares is the least.

    Args:
        costs: of each layer; at least as many as parts.
        parts: their number.
    """
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # Of the first `end` layers in so many parts: the longest part, the sum of squares, each part's layers.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for part in range(parts):
        found: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for end in range(part + 1, len(costs) - (parts - part - 1) + 1):
            found[end] = min(
                (max(longest, own), squares + own**2, (*counts, end - begin))
                for begin, (longest, squares, counts) in best.items()
                if begin < end
                for own in (sums[end] - sums[begin],)
            )
        best = found
    return best[len(costs)][2]


class Pass(NamedTuple):
    """A forward or a backward pass of one of a rank's parts."""

    is_forward: bool
    chunk: int
    microbatch: int


def passes(stages: int, chunks: int, microbatches: int, stage: int) -> list[Pass]:
    """Returns the passes of a stage in a batch, in order: 1F1B, or interleaved 1F1B with several chunks.

    A stage begins with as many forward passes as there are stages after it, then alternates, so that it never
    keeps activations of more microbatches than that and one (Narayanan et al. 2019, PipeDream, section 3.2).
    With chunks, it takes as many microbatches as there are stages through a chunk before it is the next
    chunk's turn (Narayanan et al. 2021, section 2.2.2).

    Args:
        stages: P.
        chunks: V; above 1, P divides M.
        microbatches: M.
        stage: this one's number.
    """
    total = microbatches * chunks
    ahead = min(total, stages - stage - 1)
    if chunks > 1:
        ahead = min(total, 2 * (stages - stage - 1) + (chunks - 1) * stages)

    def turn(number: int, *, is_forward: bool) -> Pass:
        if chunks == 1:
            return Pass(is_forward, 0, number)
        round_, place = divmod(number, stages * chunks)
        chunk, microbatch = divmod(place, stages)
        return Pass(is_forward, chunk if is_forward else chunks - chunk - 1, round_ * stages + microbatch)

    order = [turn(n, is_forward=True) for n in range(ahead)]
    for n in range(total):
        if n + ahead < total:
            order.append(turn(n + ahead, is_forward=True))
        order.append(turn(n, is_forward=False))
    return order


def most_in_flight(order: Sequence[Pass]) -> dict[int, int]:
    """Returns the microbatches of each chunk whose activations are kept when a stage keeps most of them."""
    now: dict[int, int] = {}
    most: dict[int, int] = {}
    for each in order:
        now[each.chunk] = now.get(each.chunk, 0) + (1 if each.is_forward else -1)
        if sum(now.values()) > sum(most.values()):
            most = dict(now)
    return most


def finish(
    order: Sequence[Sequence[Pass]],
    chunks: int,
    forward: Sequence[float],
    backward: Sequence[float],
    send: float = 0.0,
) -> float:
    """Returns when the last pass of a batch ends.

    Args:
        order: each stage's passes.
        chunks: V.
        forward: the time of each part's forward pass, in the order of the model's layers.
        backward: of its backward pass.
        send: the time that activations, or gradients, take from one stage to the next.

    Raises:
        ValueError: if stages wait for each other.
    """
    stages, parts = len(order), len(order) * chunks
    done: dict[tuple[bool, int, int], float] = {}
    clock, places = [0.0] * stages, [0] * stages
    while any(place < len(each) for place, each in zip(places, order, strict=True)):
        has_moved = False
        for stage, each in enumerate(order):
            while places[stage] < len(each):
                is_forward, chunk, microbatch = each[places[stage]]
                part = chunk * stages + stage
                if is_forward:
                    needs = (True, part - 1, microbatch) if part else None
                else:
                    needs = (False, part + 1, microbatch) if part < parts - 1 else (True, part, microbatch)
                if needs is not None and needs not in done:
                    break
                begun = clock[stage]
                if needs is not None:
                    begun = max(begun, done[needs] + (send if needs[1] != part else 0.0))
                clock[stage] = begun + (forward if is_forward else backward)[part]
                done[is_forward, part, microbatch] = clock[stage]
                places[stage] += 1
                has_moved = True
        if not has_moved:
            raise ValueError("the stages of a pipeline wait for each other")
    return max(clock)

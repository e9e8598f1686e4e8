"""Muon's part of a step: products, traffic and memory of orthogonalising (:mod:`train.layout.muon`).

Tested against what real ranks of gloo exchange.
"""

import functools
from typing import NamedTuple

from launch.plan.traffic import Collective, CollectiveKind
from train.recipe import sizes
from train.recipe.matrices import Round, Stack, is_orthogonalised, rounds, stacked_rows
from train.recipe.schema import Model, OptimizerKind, Parallelism, Recipe

EXCHANGE = "matrices to Muon and back"
BF16 = 2


class Orthogonalising(NamedTuple):
    """The work in a step of the rank with the most of it."""

    flops: float
    """Of matrix products: per Newton-Schulz step of a matrix 4 m^2 n + 2 m^3, m its smaller side."""
    collectives: list[Collective]
    bytes: int
    """Memory at the peak, besides weights, gradients and momentum."""


NOTHING = Orthogonalising(0.0, [], 0)


def orthogonalising(recipe: Recipe, world_size: int, element_bytes: int = BF16) -> Orthogonalising:
    """Returns what a recipe's optimizer orthogonalises; nothing, unless it is Muon.

    Args:
        recipe: the recipe.
        world_size: ranks.
        element_bytes: bytes per element of what is exchanged.
    """
    if recipe.optimizer.kind is not OptimizerKind.muon:
        return NOTHING
    found = _orthogonalising(recipe.model, recipe.parallelism, world_size, element_bytes)
    return found._replace(flops=recipe.optimizer.newton_schulz_steps * found.flops)


@functools.lru_cache(maxsize=64)
def _orthogonalising(
    model: Model, layout: Parallelism, world_size: int, element_bytes: int
) -> Orthogonalising:
    shard = sizes.shard_degree(layout, world_size)
    stacks: dict[bool, list[Stack]] = {True: [], False: []}
    for weight in sizes.weights(model):
        if is_orthogonalised(weight.name, weight.shape):
            degree = layout.expert if weight.is_expert else 1
            rows = stacked_rows(model, weight.name, weight.shape[0], degree)
            stacks[weight.is_expert].append(Stack(rows, weight.shape[1]))
    flops, peak, found = 0.0, 0, []
    for is_expert, members in stacks.items():
        ranks, stride = (shard, layout.expert) if is_expert else (shard * layout.expert, 1)
        turns = rounds(members, ranks)
        flops += sum(most * _flops(*shape) for most, shape in map(_most, turns))
        peak = max([peak, *(most * _elements(*shape) for most, shape in map(_most, turns))])
        travelling = [turn for turn in turns if turn.travels]
        if travelling:
            elements = sum(m.elements for turn in travelling for owned in turn.owned for m in owned)
            payload = elements * element_bytes / ranks / len(travelling)
            found.append(
                Collective(
                    EXCHANGE,
                    CollectiveKind.all_to_all,
                    payload,
                    ranks,
                    stride,
                    calls=2 * len(travelling),
                    is_once_a_step=True,
                )
            )
    return Orthogonalising(flops, found, peak * element_bytes)


def _most(turn: Round) -> tuple[int, tuple[int, int]]:
    """The number of matrices of the busiest rank, and their smaller and larger side."""
    most = max(turn.owned, key=len)
    return len(most), (min(most[0].rows, most[0].columns), max(most[0].rows, most[0].columns))


def _flops(m: int, n: int) -> float:
    """Of one step of a matrix."""
    return float(4 * m * m * n + 2 * m**3)


def _elements(m: int, n: int) -> int:
    """Received rows, the matrix put together, two iterates and two squares."""
    return 4 * m * n + 2 * m * m

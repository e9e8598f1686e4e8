"""Ways in which ranks may share sequences, for the search over layouts."""

from dataclasses import replace
from typing import NamedTuple

from train.recipe.layout_rules import tensor_violations
from train.recipe.phases import phases_of
from train.recipe.schema import Compile, Recipe

SHARING = (1, 2, 4, 8)
"""Ranks that the search lets share sequences: within a node, whose links carry what they exchange."""


class Sharing(NamedTuple):
    """The ranks that share each sequence, by one of two ways."""

    context: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """Their number."""
        return self.context * self.tensor


def sharings(recipe: Recipe, world_size: int) -> list[Sharing]:
    """The ways in which ranks, powers of two up to a node's, may share the sequences of all phases but those
    with a `context` of their own; the fewest ranks first.
    """
    given, filled = recipe.data.phases, phases_of(recipe)
    own = {number for number, phase in enumerate(given) if phase.context is not None}
    lengths = [phase.sequence_tokens or 0 for number, phase in enumerate(filled) if number not in own]
    if not lengths:
        return [Sharing(context=recipe.parallelism.context)]
    shares_context = recipe.training.compile is Compile.off
    found = [Sharing()]
    for ranks in SHARING[1:]:
        if world_size % ranks:
            continue
        if shares_context and not any(length % (2 * ranks) for length in lengths):
            found.append(Sharing(context=ranks))
        layout = replace(recipe.parallelism, context=1, tensor=ranks, replicate=1, expert=1, interleave=False)
        if not list(tensor_violations(replace(recipe, parallelism=layout), world_size)):
            found.append(Sharing(tensor=ranks))
    return found

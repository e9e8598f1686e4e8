"""The rules of a curriculum: shares, lengths and batches of its phases."""

import math
from collections.abc import Iterator, Mapping

from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.errors import UserError, Violation
from train.recipe.layout_rules import reader_in_words, readers_in_words
from train.recipe.phases import batch_sequences, microbatch_sequences, phase_tokens, phases_of
from train.recipe.schema import Phase, Position, Recipe
from train.recipe.topology import Topology


def check_phases(recipe: Recipe, topology: Topology) -> Iterator[Violation]:
    """Yields every rule that the phases violate, in order."""
    data = recipe.data
    if not data.phases:
        return
    for index, (given, phase) in enumerate(zip(data.phases, phases_of(recipe), strict=True)):
        key = f"data.phases[{index}]"
        is_ramp = bool(given.end_weights)
        yield from _shares(f"{key}.weights", given.weights, may_be_zero=is_ramp)
        if is_ramp:
            yield from _shares(f"{key}.end_weights", given.end_weights, may_be_zero=True)
        if given.rope_theta is not None and recipe.model.position is not Position.rope:
            yield Violation(
                f"{key}.rope_theta", "nothing reads it unless model.position == rope", "remove it"
            )
        if (given.stop_after_tokens or 0) > given.tokens:
            yield Violation(f"{key}.stop_after_tokens", f"exceeds the phase's {given.tokens}", "lower it")
        yield from _shape(recipe, topology, key, phase)
    tokens = sum(phase_tokens(phase) for phase in data.phases)
    if tokens != recipe.training.duration_tokens:
        yield Violation(
            "training.duration_tokens",
            f"is {recipe.training.duration_tokens}, but the phases have {tokens} tokens in all",
            f"set it to {tokens}, or change a phase",
        )
    try:
        plan_stages(recipe)
    except UserError as error:
        yield Violation(error.key, error.what, error.remedy)


def _shares(key: str, shares: Mapping[str, float], *, may_be_zero: bool) -> Iterator[Violation]:
    for domain, share in shares.items():
        if not (share > 0 or (may_be_zero and share == 0)):
            yield Violation(f"{key}.{domain}", f"is {share}", "must be above 0, or omit the domain")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-6:
        yield Violation(key, f"shares add up to {total:g}", "must add up to 1")


def _shape(recipe: Recipe, topology: Topology, key: str, phase: Phase) -> Iterator[Violation]:
    """Checks sequence length and batches of a phase whose null keys are filled in."""
    shards, longest = recipe.data.sequence_tokens, recipe.model.max_sequence_tokens
    length, layout = phase.sequence_tokens, recipe.parallelism
    readers, each = max(1, sizes.readers(layout, topology.world_size)), reader_in_words(layout)
    assert length is not None
    if length % shards:
        what = f"{length} is not a multiple of data.sequence_tokens={shards}"
        yield Violation(f"{key}.sequence_tokens", what, "it consists of whole sequences of the shards")
        return
    if length > longest:
        what = f"{length} exceeds model.max_sequence_tokens={longest}"
        yield Violation(f"{key}.sequence_tokens", what, "lower it or raise the model's")
    tokens = recipe.training.global_batch_sequences * shards
    if phase.global_batch_sequences is None and tokens % length:
        what = f"is null, but the batch of {tokens} tokens is not a multiple of {length}"
        yield Violation(f"{key}.global_batch_sequences", what, "set it, or change the batch or the length")
    batch, microbatch = batch_sequences(recipe, phase), microbatch_sequences(recipe, phase)
    if batch % readers:
        what = (
            f"{batch} sequences of {length} tokens are not divisible by {readers_in_words(layout, readers)}"
        )
        yield Violation(f"{key}.global_batch_sequences", what, f"set it to a multiple of {readers}")
    elif (batch // readers) % microbatch:
        what = f"{batch // readers} sequences of each {each} are not divisible by {microbatch}"
        yield Violation(f"{key}.microbatch_sequences", what, f"set it to a divisor of {batch // readers}")

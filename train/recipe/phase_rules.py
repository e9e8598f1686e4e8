"""The rules of a curriculum: shares, lengths and batches of its phases."""

import math
from collections.abc import Iterator, Mapping

from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.errors import UserError, Violation
from train.recipe.layout_rules import reader_in_words, readers_in_words
from train.recipe.phases import (
    SENTINELS,
    batch_sequences,
    domains_of,
    fills_in_middle,
    in_phase,
    microbatch_sequences,
    phase_tokens,
    phases_of,
)
from train.recipe.schema import Phase, Position, Recipe, TokenizerKind
from train.recipe.topology import Topology

BUILT_IN, UNUSED = ("<|endoftext|>", "<|pad|>"), "<|unused_"
"""Special tokens that every trained BPE has, and how the names of ids begin that have none."""


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


def check_fill_in_middle(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    """Yields every rule that fill-in-the-middle violates."""
    data, tokenizer = recipe.data, recipe.tokenizer
    sections = [("data.fill_in_middle", data.fill_in_middle, domains_of(recipe))]
    for index, phase in enumerate(data.phases):
        if phase.fill_in_middle is not None:
            names = tuple(sorted({*phase.weights, *phase.end_weights}))
            sections.append((f"data.phases[{index}].fill_in_middle", phase.fill_in_middle, names))
    for key, section, names in sections:
        for name in section.domain_shares:
            if name not in names:
                yield Violation(f"{key}.domain_shares.{name}", "is not a domain there", f"it has {names}")
    named, reserved = tokenizer.fill_in_middle_tokens, tokenizer.special_tokens
    if named and (len(named) != 3 or len(set(named)) != 3):
        what = f"has {len(set(named))} names"
        yield Violation(
            "tokenizer.fill_in_middle_tokens", what, "name those before prefix, suffix and middle"
        )
    if len({*BUILT_IN, *reserved}) != len(BUILT_IN) + len(reserved):
        what = f"repeats a name, or one of {', '.join(BUILT_IN)}"
        yield Violation("tokenizer.special_tokens", what, "name each once")
    if any(not name or name.startswith(UNUSED) for name in reserved):
        yield Violation("tokenizer.special_tokens", f"has an empty name, or one in {UNUSED}", "change it")
    if tokenizer.kind is TokenizerKind.bpe and fills_in_middle(recipe):
        sets = [tuple(named)] if named else SENTINELS
        if not any({*names} <= {*reserved} for names in sets):
            what = f"lacks {', '.join(sets[0])}, which fill-in-the-middle needs"
            yield Violation(
                "tokenizer.special_tokens", what, "add them, so that the BPE is trained with them"
            )


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
    length, layout = phase.sequence_tokens, in_phase(recipe, phase).parallelism
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

"""A recipe's phases with inherited values filled in, and their batch sizes and tokens."""

from dataclasses import replace

from train.recipe.schema import Phase, Recipe, Training

SENTINELS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
"""Names of the tokens before prefix, suffix and middle: of GPT-4 and Qwen, StarCoder, SantaCoder, DeepSeek
(the hole stands before the suffix, the end before the middle) and Code Llama."""


def phases_of(recipe: Recipe) -> list[Phase]:
    """Returns the recipe's phases with inherited values filled in; only batch sizes may still be null.

    ``data.domains`` is one phase.
    """
    data = recipe.data
    given = data.phases or [Phase(tokens=recipe.training.duration_tokens, weights=dict(data.domains))]
    sequence, theta, context = data.sequence_tokens, recipe.model.rope_theta, recipe.parallelism.context
    phases = []
    for phase in given:
        sequence, theta = phase.sequence_tokens or sequence, phase.rope_theta or theta
        own = phase.fill_in_middle or data.fill_in_middle
        filled = replace(phase, sequence_tokens=sequence, rope_theta=theta, fill_in_middle=own)
        phases.append(replace(filled, context=phase.context or context))
    return phases


def in_phase(recipe: Recipe, phase: Phase) -> Recipe:
    """Returns the recipe with the context parallelism of a phase of :func:`phases_of` as the run's.

    Every phase keeps its own.
    """
    assert phase.context is not None
    own = recipe.parallelism.context
    if phase.context == own:
        return recipe
    phases = [replace(each, context=each.context or own) for each in recipe.data.phases]
    layout = replace(recipe.parallelism, context=phase.context)
    return replace(recipe, parallelism=layout, data=replace(recipe.data, phases=phases))


def widest(recipe: Recipe) -> Recipe:
    """Returns the recipe in the phase in which the most ranks share each sequence."""
    return in_phase(recipe, max(phases_of(recipe), key=lambda phase: phase.context or 1))


def fill_in_middle_shares(phase: Phase) -> dict[str, float]:
    """Returns the share of rearranged documents by domain in a phase of :func:`phases_of`, if above 0."""
    section = phase.fill_in_middle
    assert section is not None
    names = sorted({*phase.weights, *phase.end_weights})
    shares = {name: section.domain_shares.get(name, section.share) for name in names}
    return {name: share for name, share in shares.items() if share > 0}


def fills_in_middle(recipe: Recipe) -> bool:
    """Returns whether a phase rearranges documents."""
    return any(fill_in_middle_shares(phase) for phase in phases_of(recipe))


def domains_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns every domain that a phase reads, in alphabetical order."""
    phases = phases_of(recipe)
    return tuple(sorted({name for phase in phases for name in (*phase.weights, *phase.end_weights)}))


def batch_sequences(recipe: Recipe, phase: Phase) -> int:
    """Returns the sequences per global batch in a phase of :func:`phases_of`, at least one."""
    assert phase.sequence_tokens is not None
    of_shards = recipe.training.global_batch_sequences * recipe.data.sequence_tokens
    return phase.global_batch_sequences or max(1, of_shards // phase.sequence_tokens)


def microbatch_sequences(recipe: Recipe, phase: Phase) -> int:
    """Returns the sequences per microbatch of a rank in a phase of :func:`phases_of`, at least one."""
    assert phase.sequence_tokens is not None
    of_shards = recipe.training.microbatch_sequences * recipe.data.sequence_tokens
    return phase.microbatch_sequences or max(1, of_shards // phase.sequence_tokens)


def training_in(recipe: Recipe, phase: Phase) -> Training:
    """Returns the recipe's training with the recomputation of a phase."""
    if phase.recompute is None:
        return recipe.training
    return replace(
        recipe.training,
        recompute=phase.recompute,
        recompute_layers=phase.recompute_layers,
        recompute_rest=phase.recompute_rest,
    )


def phase_tokens(phase: Phase) -> int:
    """Returns the tokens that a phase actually reads."""
    return min(phase.tokens, phase.stop_after_tokens or phase.tokens)

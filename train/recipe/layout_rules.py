"""The rules of a layout: what the number of ranks, the batch and the experts must be divisible by."""

from collections.abc import Iterator

from train.recipe import sizes
from train.recipe.errors import Violation
from train.recipe.phases import microbatch_sequences, phases_of
from train.recipe.schema import Compile, ExchangePrecision, Recipe
from train.recipe.topology import Topology


def check_layout(recipe: Recipe, topology: Topology) -> Iterator[Violation]:
    """Yields every rule that batch and layout violate, in order."""
    yield from _batch_and_degrees(recipe, topology.world_size)
    yield from _interleaved(recipe)
    yield from _exchanged(recipe)


def _batch_and_degrees(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    training, layout = recipe.training, recipe.parallelism
    global_batch, microbatch = training.global_batch_sequences, training.microbatch_sequences
    if global_batch % ranks:
        yield Violation(
            "training.global_batch_sequences",
            f"{global_batch} is not divisible by {ranks} ranks",
            f"use a multiple of {ranks}, or another number of ranks",
        )
    elif (global_batch // ranks) % microbatch:
        yield Violation(
            "training.microbatch_sequences",
            f"{global_batch // ranks} sequences of each rank are not divisible by {microbatch}",
            f"use a divisor of {global_batch // ranks}",
        )
    if ranks % (layout.replicate * layout.expert):
        yield Violation(
            "parallelism",
            f"{ranks} ranks are not divisible by replicate={layout.replicate} x expert={layout.expert}",
            f"choose degrees whose product divides {ranks}, or start more ranks (composer -n)",
        )
    if layout.gathered_layers > recipe.model.n_layers:
        yield Violation(
            "parallelism.gathered_layers",
            f"is {layout.gathered_layers}, but the model has {recipe.model.n_layers} layers",
            "give at most as many",
        )
    if layout.expert > 1:
        if recipe.model.moe is None:
            yield Violation("parallelism.expert", "is above 1, but the model is dense", "set it to 1")
        elif recipe.model.moe.experts % layout.expert:
            experts, expert_degree = recipe.model.moe.experts, layout.expert
            yield Violation(
                "parallelism.expert",
                f"{experts=} is not divisible by {expert_degree=}",
                f"use a divisor of {experts}",
            )
        else:
            yield from _uneven_experts(recipe, ranks)


def _interleaved(recipe: Recipe) -> Iterator[Violation]:
    if not recipe.parallelism.interleave:
        return
    if recipe.parallelism.expert == 1:
        yield Violation(
            "parallelism.interleave",
            "hides the exchange of tokens, but with parallelism.expert=1 there is none",
            "remove it, or spread the experts over ranks",
        )
    if recipe.training.compile is not Compile.off:
        yield Violation(
            "parallelism.interleave",
            f"is not built for compiled layers, but training.compile={recipe.training.compile.value}",
            "remove either",
        )
    if all(microbatch_sequences(recipe, phase) % 2 for phase in phases_of(recipe)):
        yield Violation(
            "parallelism.interleave",
            f"halves microbatches, but training.microbatch_sequences={recipe.training.microbatch_sequences}",
            "make it even, or remove parallelism.interleave",
        )


def _exchanged(recipe: Recipe) -> Iterator[Violation]:
    name, tile, d_model = "parallelism.exchange_precision", sizes.EXCHANGED_TILE, recipe.model.d_model
    if recipe.parallelism.exchange_precision is ExchangePrecision.same:
        return
    if recipe.parallelism.expert == 1:
        what = "is of the exchange of tokens, but with parallelism.expert=1 there is none"
        yield Violation(name, what, "remove it, or spread the experts over ranks")
    if d_model % tile:
        what = f"{d_model} is not divisible by {tile}, the numbers of a token that share a scale in fp8"
        yield Violation("model.d_model", what, f"make it a multiple of {tile}, or remove {name}")


def _uneven_experts(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    """Yields a violation for expert rows that do not shard evenly, as FSDP2 (torch 2.7) requires."""
    layout, moe = recipe.parallelism, recipe.model.moe
    assert moe is not None
    if ranks % (layout.replicate * layout.expert):
        return
    rows, over = moe.experts * sizes.expert_width(recipe.model), ranks // layout.replicate
    if rows % over:
        yield Violation(
            "parallelism.replicate",
            f"experts x their hidden size = {rows} rows do not shard evenly over {over} ranks",
            f"make {ranks} / replicate a divisor of {rows}",
        )

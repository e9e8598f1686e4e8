"""Stages of a pipeline in a plan: each is planned as a model of its own, on the ranks of one stage.

The stage's model has its layers; of what is outside them, the embedding or the output projection, which only
the last stage's loss multiplies with. What stages add to that is counted here: the microbatches in flight,
the idle time of the schedule, which is played through pass by pass, and what stages send.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from launch.plan.hardware import Gpu
from launch.plan.memory import Memory, memory, numerics_of
from launch.plan.traffic import ENDS, FP32, SENT, Collective, CollectiveKind
from train.recipe import sizes
from train.recipe.pipeline import ModelPart, finish, most_in_flight, passes
from train.recipe.schema import Recipe


class PlannedStage(NamedTuple):
    """A stage of a pipeline."""

    recipe: Recipe
    """Its layers as a whole model, without a pipeline."""
    parts: tuple[Recipe, ...]
    """The same, of each of its chunks."""
    in_flight: float
    """Microbatches whose activations it keeps at a time, a chunk by its share of the stage's layers."""
    has_loss: bool


def stages_of(recipe: Recipe, world_size: int) -> list[PlannedStage]:
    """Returns the stages of a recipe with a pipeline, in order."""
    layout = recipe.parallelism
    microbatches = sizes.microbatches_per_rank(recipe, world_size)
    found = []
    for number in range(layout.pipeline):
        parts = sizes.stage_parts(recipe.model, layout, number)
        most = most_in_flight(passes(layout.pipeline, layout.pipeline_chunks, microbatches, number))
        layers = [len(part.layers) for part in parts]
        kept = sum(count * layers[chunk] for chunk, count in most.items()) / sum(layers)
        each = tuple(_as_model(recipe, [part]) for part in parts)
        found.append(PlannedStage(_as_model(recipe, parts), each, kept, parts[-1].is_last))
    return found


def _as_model(recipe: Recipe, parts: Sequence[ModelPart]) -> Recipe:
    """The recipe of some parts of its model as a whole; of a mixture, with as many dense layers."""
    model, training = recipe.model, recipe.training
    layers = [layer for part in parts for layer in part.layers]
    is_last, is_outermost = parts[-1].is_last, parts[0].is_first or parts[-1].is_last
    mtp = model.mtp and is_last
    moe, dense = model.moe, sum(not sizes.has_experts(model, layer) for layer in layers)
    if moe is not None:
        has_none = dense == len(layers) and not (mtp and sizes.has_experts(model, model.n_layers))
        moe = None if has_none else replace(moe, dense_layers=dense, every_n_layers=1)
    first = training.recompute_layers
    return replace(
        recipe,
        model=replace(
            model,
            n_layers=len(layers),
            moe=moe,
            vocab_size=model.vocab_size if is_outermost else 1,
            mtp=mtp,
            # One of the two matrices; both, if the last stage reads the embedding for its prediction.
            tie_embeddings=model.tie_embeddings or not mtp,
        ),
        parallelism=replace(
            recipe.parallelism,
            pipeline=1,
            pipeline_layers=[],
            pipeline_chunks=1,
            gathered_layers=min(recipe.parallelism.gathered_layers, len(layers)),
        ),
        training=replace(
            training,
            recompute_layers=None if first is None else sum(layer < first for layer in layers),
            loss_chunk_tokens=training.loss_chunk_tokens if is_last else 1,
        ),
    )


def kind_of(stage: Recipe) -> tuple[object, ...]:
    """Returns what tells stages of a pipeline apart, as recipes of their own."""
    return stage.model, stage.training.recompute_layers


def memory_of(recipe: Recipe, world_size: int, imbalance: float = 1.0, rank: int | None = None) -> Memory:
    """Returns the memory of a rank; None: of the fullest, the first rank of some stage.

    Args:
        recipe: a valid recipe, with a pipeline or without.
        world_size: ranks.
        imbalance: rows of the rank's experts relative to the mean.
        rank: its number.
    """
    layout = recipe.parallelism
    if layout.pipeline == 1:
        return memory(recipe, world_size, imbalance, rank or 0)
    stages, of_stages = stages_of(recipe, world_size), world_size // layout.pipeline
    if rank is not None:
        _, number, place = sizes.place_of(layout, world_size, rank)
        stage = stages[number]
        return memory(stage.recipe, of_stages, imbalance, place, in_flight=stage.in_flight)
    # Of stages that are alike the first keeps the most.
    alike = {kind_of(stage.recipe): stage for stage in reversed(stages)}.values()
    each = (memory(stage.recipe, of_stages, imbalance, in_flight=stage.in_flight) for stage in alike)
    return max(each, key=lambda found: found.total)


def sends(recipe: Recipe, world_size: int) -> Collective:
    """Returns what a stage between others sends in a microbatch: activations and gradients of each chunk."""
    layout = recipe.parallelism
    stream = numerics_of(recipe, world_size).stream
    size = sizes.microbatch_tokens(recipe) * recipe.model.d_model * stream
    stride = sizes.stage_ranks(layout, world_size)
    calls = (2 * layout.pipeline_chunks, layout.pipeline_chunks)
    return Collective(SENT, CollectiveKind.send, size, 2, stride, *calls)


def of_shared_embedding(recipe: Recipe, world_size: int) -> list[Collective]:
    """Returns the sum of the gradients of an embedding that the first and the last stage have both."""
    model, layout = recipe.model, recipe.parallelism
    if not sizes.embeds_twice(model):
        return []
    ranks = sizes.stage_ranks(layout, world_size)
    size = -(-model.vocab_size // ranks) * model.d_model * FP32
    group = (2, (layout.pipeline - 1) * ranks)
    return [Collective(ENDS, CollectiveKind.all_reduce, size, *group, 1, is_once_a_step=True)]


def batch_seconds(
    recipe: Recipe, world_size: int, gpu: Gpu, of_parts: Sequence[tuple[float, float]], links_share: float
) -> float:
    """Returns the time from a batch's first pass to its last.

    Args:
        recipe: with a pipeline.
        world_size: ranks.
        gpu: whose links carry what stages send.
        of_parts: seconds of a forward and of a backward pass of each part, in the order of the layers.
        links_share: share of the links' full rate.
    """
    stages, chunks = recipe.parallelism.pipeline, recipe.parallelism.pipeline_chunks
    microbatches = sizes.microbatches_per_rank(recipe, world_size)
    forward, backward = zip(*of_parts, strict=True)
    hop = sends(recipe, world_size).seconds(gpu) / links_share

    def played(count: int) -> float:
        order = [passes(stages, chunks, count, stage) for stage in range(stages)]
        return finish(order, chunks, forward, backward, hop)

    # Once all stages are busy, every so many microbatches take as long as those before.
    few = 2 * stages
    if microbatches <= 2 * few:
        return played(microbatches)
    ends = played(2 * few)
    return ends + (ends - played(few)) / few * (microbatches - 2 * few)

"""Search over layouts, microbatch sizes and recomputation, and remedies for plans that do not fit."""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launch.plan.hardware import GIB, Gpu
from launch.plan.room import copies_bytes, has_room, host_bytes
from launch.plan.sharing import SHARING, Sharing, sharings
from launch.plan.stages import memory_of
from launch.plan.step import Plan, make_plan
from launch.plan.step_shapes import step_shapes
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.layout_rules import unstaged
from train.recipe.phases import batch_sequences, phases_of
from train.recipe.rules import validate
from train.recipe.schema import Compile, Recipe, Recompute
from train.recipe.topology import Topology

MOST_GPUS = 2**17
STAGES = (2, 4, 8, 16)
"""Stages of the pipelines that the search tries."""
MOST_OPEN = 0.1
"""Share of the fastest plan's step for which traffic is open: with more, stages are tried too."""


@dataclass(frozen=True)
class Choice:
    """The settings that the search varies."""

    replicate: int
    expert: int
    microbatch_sequences: int
    recompute: Recompute
    recompute_layers: int | None = None
    """The first so many layers recompute that, the others ``recompute_rest``; None: all."""
    recompute_rest: Recompute = Recompute.nothing
    context: int = 1
    offload: bool = False
    tensor: int = 1
    pipeline: int = 1
    exchange_node_ranks: int | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with these settings."""
        own = recipe.parallelism
        if own.pipeline != self.pipeline:
            own = replace(own, pipeline=self.pipeline, pipeline_layers=[], pipeline_chunks=1)
        layout = replace(
            own,
            replicate=self.replicate,
            expert=self.expert,
            context=self.context,
            tensor=self.tensor,
            exchange_node_ranks=self.exchange_node_ranks,
        )
        has_halves = self.expert > 1 and self.microbatch_sequences % 2 == 0
        return replace(
            recipe,
            parallelism=replace(layout, interleave=layout.interleave and has_halves),
            training=replace(
                recipe.training,
                microbatch_sequences=self.microbatch_sequences,
                recompute=self.recompute,
                recompute_layers=self.recompute_layers,
                recompute_rest=self.recompute_rest,
                offload=self.offload,
            ),
        )

    def overrides(self) -> str:
        """Returns the settings as command-line overrides."""
        layers = "null" if self.recompute_layers is None else str(self.recompute_layers)
        shared = f"parallelism.context={self.context} " if self.context > 1 else ""
        shared += f"parallelism.tensor={self.tensor} " if self.tensor > 1 else ""
        shared += f"parallelism.pipeline={self.pipeline} " if self.pipeline > 1 else ""
        if self.exchange_node_ranks is not None:
            shared += f"parallelism.exchange_node_ranks={self.exchange_node_ranks} "
        return (
            f"parallelism.replicate={self.replicate} parallelism.expert={self.expert} {shared}"
            f"training.microbatch_sequences={self.microbatch_sequences} "
            f"training.recompute={self.recompute.value} training.recompute_layers={layers} "
            f"training.recompute_rest={self.recompute_rest.value}{' training.offload=true' * self.offload}"
        )


def choice_of(recipe: Recipe) -> Choice:
    """Returns the recipe's own settings."""
    return Choice(
        recipe.parallelism.replicate,
        recipe.parallelism.expert,
        recipe.training.microbatch_sequences,
        recipe.training.recompute,
        recipe.training.recompute_layers,
        recipe.training.recompute_rest,
        recipe.parallelism.context,
        recipe.training.offload,
        recipe.parallelism.tensor,
        recipe.parallelism.pipeline,
        recipe.parallelism.exchange_node_ranks,
    )


def choices(recipe: Recipe, world_size: int) -> Iterator[Choice]:
    """Yields all settings that divide batch, ranks and experts evenly; layers recompute alike."""
    for shared in sharings(recipe, world_size):
        for layout in layouts(recipe, world_size, shared):
            for grade in grades_of(recipe):
                yield replace(layout, recompute=grade)
            if recipe.training.compile is Compile.off:
                yield replace(layout, recompute=Recompute.layer, offload=True)
    for stages in pipelines(recipe, world_size):
        for layout in layouts(recipe, world_size, Sharing(), stages):
            yield from (replace(layout, recompute=grade) for grade in grades_of(recipe))


def grades_of(recipe: Recipe) -> list[Recompute]:
    """The grades of recomputation, the least first; the compiler chooses what compiled layers keep."""
    if recipe.training.compile is not Compile.off:
        return [Recompute.nothing, Recompute.layer]
    # Halves that are interleaved have no part that is all after the attention.
    return [each for each in Recompute if each is not Recompute.ffn or not recipe.parallelism.interleave]


def layouts(recipe: Recipe, world_size: int, shared: Sharing, stages: int = 1) -> Iterator[Choice]:
    """Yields all layouts and microbatches that divide batch, ranks and experts; nothing is recomputed.

    Args:
        recipe: the recipe.
        world_size: ranks.
        shared: ranks that share each sequence.
        stages: of a pipeline; each has its turn with a microbatch at least.
    """
    per_reader = recipe.training.global_batch_sequences * shared.ranks * stages // world_size
    experts = recipe.model.moe.experts if recipe.model.moe else 1
    local = recipe.parallelism.exchange_node_ranks
    for expert in divisors(experts):
        if world_size // stages % expert:
            continue
        own = local if local is not None and _spans_nodes(expert, local) else None
        for copies in divisors(world_size // stages // expert):
            for microbatch in divisors(per_reader):
                if stages == 1 or per_reader // microbatch >= stages:
                    choice = Choice(copies, expert, microbatch, Recompute.nothing, exchange_node_ranks=own)
                    yield replace(choice, context=shared.context, tensor=shared.tensor, pipeline=stages)


def _spans_nodes(expert: int, local: int) -> bool:
    """Returns whether groups of ``expert`` ranks span several whole nodes of ``local``."""
    return expert > local and expert % local == 0


def _ways(layout: Choice, gpu: Gpu) -> list[Choice]:
    """A layout, and if its experts span nodes, the same with tokens sent straight and once per node."""
    if not _spans_nodes(layout.expert, gpu.gpus_per_node):
        return [layout]
    ways = {layout.exchange_node_ranks, None, gpu.gpus_per_node}
    return [replace(layout, exchange_node_ranks=local) for local in sorted(ways, key=lambda way: way or 0)]


def pipelines(recipe: Recipe, world_size: int) -> list[int]:
    """The numbers of stages of several GPUs that the search tries, of a recipe that stages are built for."""
    found = []
    for stages in STAGES:
        layout = replace(recipe.parallelism, pipeline=stages, context=1, tensor=1)
        if next(unstaged(replace(recipe, parallelism=layout)), None) is not None:
            break
        if world_size % stages == 0 and world_size > stages and recipe.model.n_layers >= stages:
            found.append(stages)
    return found


def recomputing(recipe: Recipe, layout: Choice, fits: Callable[[Choice], bool]) -> Iterator[Choice]:
    """Yields a layout with what its layers recompute so that it fits: nothing, or as little as must be.

    First the least grade that fits if all layers recompute it. Then, with each grade from there on in as few
    of the first layers as fit, the grade before it in the others. If none fits, inputs wait in host memory.
    """
    grades, layers = grades_of(recipe), sizes.layers(recipe.model)
    fitting = bisect.bisect_left(grades, True, key=lambda grade: fits(replace(layout, recompute=grade)))
    if fitting == len(grades):
        last = replace(layout, recompute=Recompute.layer, offload=True)
        if recipe.training.compile is Compile.off and layout.pipeline == 1 and fits(last):
            yield last
        return
    yield replace(layout, recompute=grades[fitting])
    if fitting == 0:
        return
    for grade in grades[fitting:]:
        mixed = replace(layout, recompute=grade, recompute_rest=grades[fitting - 1])
        few = bisect.bisect_left(
            range(1, layers), True, key=lambda count: fits(replace(mixed, recompute_layers=count))
        )
        if few < layers - 1:
            yield replace(mixed, recompute_layers=few + 1)


def search(
    recipe: Recipe, world_size: int, gpu: Gpu, *, imbalance: float = 1.0, dollars_per_gpu_hour: float = 0.0
) -> list[Plan]:
    """Returns all plans that fit, the fastest first.

    Ranks share sequences only if nothing fits otherwise, and then as few as will do. Stages of a pipeline are
    tried if nothing fits then, or if traffic is open for more than a tenth of the fastest plan's step.

    Raises:
        UserError: if no layout is possible, such as for a batch that cannot be split over the GPUs.
    """

    @functools.cache
    def planned(choice: Choice) -> Plan:
        changed = choice.applied(recipe)
        return make_plan(
            changed, world_size, gpu, imbalance=imbalance, dollars_per_gpu_hour=dollars_per_gpu_hour
        )

    def fits(choice: Choice) -> bool:
        return _has_room(choice.applied(recipe), world_size, gpu, imbalance)

    found: list[Plan] = []
    is_possible = False

    def add(layouts: Iterator[Choice]) -> None:
        nonlocal is_possible
        for layout in (way for each in layouts for way in _ways(each, gpu)):
            try:
                planned(layout)
            except UserError:
                continue
            is_possible = True
            found.extend(planned(choice) for choice in recomputing(recipe, layout, fits))

    for _, ways in itertools.groupby(sharings(recipe, world_size), key=lambda shared: shared.ranks):
        for shared in ways:
            add(layouts(recipe, world_size, shared))
        if found:
            break
    best = min(found, key=lambda plan: plan.days, default=None)
    if best is None or best.seconds.links > MOST_OPEN * best.step_seconds:
        for stages in pipelines(recipe, world_size):
            add(layouts(recipe, world_size, Sharing(), stages))
    if not is_possible:
        make_plan(recipe, world_size, gpu)  # raises the reason
    return sorted(found, key=lambda plan: plan.days)


def verdict(plan: Plan) -> tuple[str, bool]:
    """Returns a line on the memory of a plan, with a remedy if it does not fit, and whether it fits."""
    share = plan.fullest.memory.total / plan.gpu.memory_bytes
    line = f"plan: the peak of a step takes {share:.0%} of an {plan.gpu.name.upper()}'s memory"
    if in_host := plan.host_bytes + plan.copies_bytes:
        line += f", and {in_host / GIB:.1f} GiB of its host's"
    return (line, True) if plan.fits else (f"{line}; {(sufficient_changes(plan) or _others(plan))[0]}", False)


def remedies(plan: Plan) -> list[str]:
    """Remedies for a plan that does not fit: single changes that suffice, then the fastest layout of all."""
    return [*sufficient_changes(plan), *_others(plan)]


def sufficient_changes(plan: Plan) -> list[str]:
    """Returns the changes of one key that make a plan fit, one for each key."""
    recipe, own = plan.recipe, choice_of(plan.recipe)
    single_changes = []
    for choice in choices(recipe, plan.world_size):
        changed = [name for name in vars(own) if getattr(own, name) != getattr(choice, name)]
        if len(changed) == 1 and _fits(choice.applied(recipe), plan.world_size, plan):
            single_changes.append((changed[0], choice))
    lines = []
    for name, key in (
        ("recompute", "training.recompute"),
        ("microbatch_sequences", "training.microbatch_sequences"),
        ("replicate", "parallelism.replicate"),
        ("expert", "parallelism.expert"),
        ("context", "parallelism.context"),
        ("offload", "training.offload"),
        ("tensor", "parallelism.tensor"),
        ("pipeline", "parallelism.pipeline"),
    ):
        values = [getattr(choice, name) for changed, choice in single_changes if changed == name]
        if values:
            # The least recomputation, the fewest ranks that share sequences, and the largest of all else.
            best_value = values[0].value if name == "recompute" else max(values)
            best_value = min(values) if name in ("context", "tensor", "pipeline") else best_value
            lines.append(f"{key}={str(best_value).lower()} by itself makes it fit")
    return [*_of_fullest_phase(plan), *lines]


def _of_fullest_phase(plan: Plan) -> list[str]:
    """The fewest ranks that have to share sequences in the phase that needs the most memory, if it is one."""
    recipe, numbers = plan.recipe, plan.fullest.shape.phases
    if len(recipe.data.phases) < 2 or len(numbers) > 1:
        return []
    phases = list(recipe.data.phases)
    for ranks in SHARING[1:]:
        phases[numbers[0]] = replace(phases[numbers[0]], context=ranks)
        if _fits(replace(recipe, data=replace(recipe.data, phases=phases)), plan.world_size, plan):
            return [f"data.phases[{numbers[0]}].context={ranks} by itself makes it fit"]
    return []


def _others(plan: Plan) -> list[str]:
    """Returns the fastest layout that fits; if there is none, the number of GPUs that is needed."""
    best = search(plan.recipe, plan.world_size, plan.gpu, imbalance=plan.imbalance)
    if best:
        return [f"fastest that fits: {choice_of(best[0].recipe).overrides()}"]
    more = _gpus_needed(plan)
    if more:
        return [f"nothing fits {plan.world_size} GPUs: use {more}"]
    return ["nothing fits any number of GPUs: shorten data.sequence_tokens"]


def divisors(number: int) -> list[int]:
    """Returns all divisors in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _fits(recipe: Recipe, world_size: int, like: Plan) -> bool:
    try:
        validate(recipe, Topology(0, world_size, 0, 1), "")
    except UserError:
        return False
    return _has_room(recipe, world_size, like.gpu, like.imbalance)


def _has_room(recipe: Recipe, world_size: int, gpu: Gpu, imbalance: float) -> bool:
    """Returns :attr:`Plan.fits` of a valid recipe, without planning the time of a step."""
    copies = copies_bytes(recipe, world_size, gpu.gpus_per_node)
    return all(
        has_room(
            memory_of(each.recipe, world_size, imbalance), host_bytes(each.recipe, world_size) + copies, gpu
        )
        for each in step_shapes(recipe)
    )


def _gpus_needed(plan: Plan) -> int | None:
    """The fewest GPUs, by doubling, on which microbatches of one sequence fit with everything sharded."""
    world_size = plan.world_size * 2
    while world_size <= MOST_GPUS:
        recipe = _divisible(plan.recipe, world_size)
        experts = divisors(recipe.model.moe.experts) if recipe.model.moe else [1]
        most = Choice(
            1, 1, 1, Recompute.layer, context=max(each.context for each in sharings(recipe, world_size))
        )
        most = replace(most, offload=recipe.training.compile is Compile.off)
        each = (replace(most, expert=degree) for degree in experts)
        if any(_fits(choice.applied(recipe), world_size, plan) for choice in each):
            return world_size
        world_size *= 2
    return None


def _divisible(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with batches rounded up to a multiple of the GPUs and one sequence per microbatch."""

    def rounded(batch: int) -> int:
        return -(-batch // world_size) * world_size

    phases = [
        replace(
            phase,
            global_batch_sequences=rounded(batch_sequences(recipe, whole)),
            microbatch_sequences=1,
        )
        for phase, whole in zip(recipe.data.phases, phases_of(recipe), strict=False)
    ]
    training = recipe.training
    training = replace(training, global_batch_sequences=rounded(training.global_batch_sequences))
    return replace(recipe, training=training, data=replace(recipe.data, phases=phases))

"""The plan of a recipe on a number of GPUs: memory, traffic, time and cost."""

from collections import Counter
from dataclasses import dataclass, replace

from launch.plan.hardware import Gpu
from launch.plan.memory import Memory, numerics_of, states
from launch.plan.muon import EXCHANGE, orthogonalising
from launch.plan.nodes import nodes_per_token
from launch.plan.overlap import OPEN_IF_INTERLEAVED, Overlapped, overlap, traffic_of
from launch.plan.recomputation import layer_models, offloaded_layers, work_again
from launch.plan.room import copies_bytes, has_room, host_bytes
from launch.plan.stages import batch_seconds, kind_of, memory_of, of_shared_embedding, sends, stages_of
from launch.plan.step_shapes import StepShape, step_shapes
from launch.plan.step_time import (
    FITTED,
    Efficiency,
    Seconds,
    Split,
    Work,
    clipping_work,
    compute_seconds,
    head_work,
    joining_work,
    layer_work,
    link_seconds,
    update_work,
)
from launch.plan.traffic import Collective, collectives
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.rules import validate
from train.recipe.schema import ExpertPrecision, Recipe
from train.recipe.topology import Topology

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS


@dataclass(frozen=True)
class Part:
    """One part of a step on the timeline."""

    name: str
    seconds: Seconds
    repeats: int = 1
    hidden_seconds: float = 0.0
    """Traffic that runs under arithmetic; ``seconds.links`` is what does not."""


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a recipe. Per-step figures are those of one step shape."""

    recipe: Recipe
    shape: StepShape
    gpu: Gpu
    world_size: int
    imbalance: float
    dollars_per_gpu_hour: float
    memory: Memory
    collectives: list[Collective]
    """Those of a microbatch, and those of a step."""
    microbatches: int
    parts: list[Part]
    efficiency: Efficiency
    others: tuple["Plan", ...] = ()
    """Plans of the run's other step shapes, such as longer sequences in a later phase."""

    @property
    def step_shapes(self) -> tuple["Plan", ...]:
        """This plan and those of the other step shapes."""
        return (self, *self.others)

    @property
    def fullest(self) -> "Plan":
        """The plan of the step shape that needs the most memory."""
        return max(self.step_shapes, key=lambda plan: plan.memory.total)

    @property
    def fits(self) -> bool:
        """True if the peak of the whole run is within the GPU's memory, and what waits in its host's."""
        return has_room(self.fullest.memory, self.host_bytes + self.copies_bytes, self.gpu)

    @property
    def host_bytes(self) -> int:
        """Host memory of one GPU's process in which inputs of layers wait, at most."""
        return max(host_bytes(plan.shape.recipe, self.world_size) for plan in self.step_shapes)

    @property
    def copies_bytes(self) -> int:
        """Host memory for copies of one GPU's part of the state."""
        return copies_bytes(self.recipe, self.world_size, self.gpu.gpus_per_node)

    @property
    def seconds(self) -> Seconds:
        """Time of a step by kind of work."""
        total = Seconds()
        for part in self.parts:
            total += part.seconds.times(part.repeats)
        return total

    @property
    def step_seconds(self) -> float:
        """Predicted time of an optimizer step."""
        return self.seconds.total

    @property
    def hidden_seconds(self) -> float:
        """Traffic of a step that runs under arithmetic."""
        return sum(part.hidden_seconds * part.repeats for part in self.parts)

    @property
    def step_seconds_if_added(self) -> float:
        """Step time if arithmetic hid no more traffic than in published runs, whose kinds of time add up."""
        traffic = link_seconds(self.collectives, self.gpu, self.efficiency, self.microbatches)
        return self.step_seconds - self.seconds.links + traffic.links

    @property
    def utilisation_if_added(self) -> float:
        """:attr:`utilisation` with :attr:`step_seconds_if_added`."""
        return self.utilisation * self.step_seconds / self.step_seconds_if_added

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput per GPU."""
        return sizes.tokens_per_batch(self.shape.recipe) / self.step_seconds / self.world_size

    @property
    def utilisation(self) -> float:
        """Model FLOPs, including attention over all positions, as a share of the peak (PaLM, appendix B)."""
        token = sizes.flops_per_token_training(self.recipe.model, self.shape.recipe.data.sequence_tokens)
        return token.total * self.tokens_per_second_per_gpu / self.gpu.matrix_flops

    @property
    def utilisation_of_weights(self) -> float:
        """6 x active parameters x tokens only, as a share of the peak."""
        token = sizes.flops_per_token_training(self.recipe.model, self.shape.recipe.data.sequence_tokens)
        return token.weights * self.tokens_per_second_per_gpu / self.gpu.matrix_flops

    @property
    def days(self) -> float:
        """Duration of the whole run over all step shapes, without interruptions and evaluations."""
        return sum(plan.shape.batches * plan.step_seconds for plan in self.step_shapes) / DAY_SECONDS

    @property
    def flops(self) -> sizes.Flops:
        """FLOPs of the whole run, with attention at the sequence length of each step shape."""
        each = [plan.shape.flops for plan in self.step_shapes]
        return sizes.Flops(sum(flops.weights for flops in each), sum(flops.attention for flops in each))

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.days * DAY_SECONDS / HOUR_SECONDS * self.world_size

    @property
    def dollars(self) -> float:
        """Cost of the whole run."""
        return self.gpu_hours * self.dollars_per_gpu_hour


def make_plan(
    recipe: Recipe,
    world_size: int,
    gpu: Gpu,
    *,
    imbalance: float = 1.0,
    dollars_per_gpu_hour: float = 0.0,
    file: str = "",
    efficiency: Efficiency = FITTED,
) -> Plan:
    """Plans a recipe: every step shape, the one with the most tokens first.

    Args:
        recipe: the recipe.
        world_size: GPUs.
        gpu: type of the GPUs.
        imbalance: rows of the busiest expert rank relative to the mean, at least 1.
        dollars_per_gpu_hour: price of a GPU-hour.
        file: the recipe's file, for error messages.
        efficiency: shares of the GPU's peak rates.

    Raises:
        UserError: one line, if the recipe or the layout is impossible.
    """
    validate(recipe, Topology(0, world_size, 0, 1), file)
    experts = recipe.training.expert_precision.value
    if experts not in (ExpertPrecision.same.value, gpu.fp8_format):
        remedy = f"set it to {gpu.fp8_format}, or plan for other GPUs"
        raise UserError(f"is {experts}, not for {gpu.name}", key="training.expert_precision", remedy=remedy)
    if world_size == recipe.parallelism.pipeline > 1:
        what = "gives each stage one GPU, which is not planned"
        raise UserError(what, key="parallelism.pipeline", remedy="use more GPUs, or fewer stages", file=file)
    if imbalance < 1:
        raise UserError(f"is {imbalance}", key="--imbalance", remedy="give at least 1, the mean")

    def plan_of(shape: StepShape, others: tuple[Plan, ...] = ()) -> Plan:
        shaped = shape.recipe
        traffic, parts = _of_step(shaped, world_size, gpu, imbalance, efficiency)
        return Plan(
            recipe=recipe,
            shape=shape,
            gpu=gpu,
            world_size=world_size,
            imbalance=imbalance,
            dollars_per_gpu_hour=dollars_per_gpu_hour,
            memory=memory_of(shaped, world_size, imbalance),
            collectives=traffic,
            microbatches=sizes.microbatches_per_rank(shaped, world_size),
            parts=parts,
            efficiency=efficiency,
            others=others,
        )

    main, *others = step_shapes(recipe)
    return plan_of(main, tuple(plan_of(shape) for shape in others))


def _of_step(
    recipe: Recipe, world_size: int, gpu: Gpu, imbalance: float, efficiency: Efficiency
) -> tuple[list[Collective], list[Part]]:
    """Returns a step's traffic and parts; of a pipeline, those of its slowest stage, and its idle time."""
    known: dict[object, tuple[list[Collective], list[Part]]] = {}

    def planned(of: Recipe, ranks: int, has_loss: bool = True) -> tuple[list[Collective], list[Part]]:
        key = kind_of(of), has_loss  # most stages are alike
        if key not in known:
            traffic = _traffic(of, ranks)
            known[key] = traffic, _parts(of, ranks, gpu, traffic, imbalance, efficiency, has_loss=has_loss)
        return known[key]

    layout = recipe.parallelism
    if layout.pipeline == 1:
        return planned(recipe, world_size)
    stages, ranks = stages_of(recipe, world_size), world_size // layout.pipeline
    of_stages = [planned(stage.recipe, ranks, stage.has_loss) for stage in stages]
    of_parts = []
    for chunk in range(layout.pipeline_chunks):
        for stage in stages:
            has_loss = stage.has_loss and chunk == layout.pipeline_chunks - 1
            ahead, back, *_ = planned(stage.parts[chunk], ranks, has_loss)[1]
            of_parts.append((ahead.seconds.total, back.seconds.total))
    traffic, parts = max(of_stages, key=lambda each: each[1][0].seconds.total + each[1][1].seconds.total)
    busy = sum(part.seconds.total * part.repeats for part in parts[:2])
    ends = batch_seconds(recipe, world_size, gpu, of_parts, efficiency.collectives)
    ahead, back, *others = parts
    others = [max((each[1][n] for each in of_stages), key=lambda part: part.seconds.total) for n in (2, 3)]
    idle = Part("other stages", Seconds(idle=max(0.0, ends - busy)))
    of_both = of_shared_embedding(recipe, world_size)
    others[0] = replace(others[0], seconds=others[0].seconds + link_seconds(of_both, gpu, efficiency))
    return [*traffic, sends(recipe, world_size), *of_both], [ahead, back, idle, *others]


def _traffic(recipe: Recipe, world_size: int) -> list[Collective]:
    of_model = collectives(
        recipe.model,
        recipe.parallelism,
        world_size,
        tokens=sizes.microbatch_tokens(recipe),
        compute_bytes=numerics_of(recipe, world_size).compute,
        grades=sizes.recomputed(recipe.training, sizes.layers(recipe.model)),
    )
    return of_model + orthogonalising(recipe, world_size).collectives


def _parts(
    recipe: Recipe,
    world_size: int,
    gpu: Gpu,
    traffic: list[Collective],
    imbalance: float,
    efficiency: Efficiency,
    *,
    has_loss: bool,
) -> list[Part]:
    """Forward and backward passes of a microbatch, repeated, sums over ranks, and the optimizer step."""
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    microbatches = sizes.microbatches_per_rank(recipe, world_size)
    tokens = sizes.microbatch_tokens(recipe)
    split = Split(
        expert=layout.expert,
        imbalance=imbalance if layout.expert > 1 else 1.0,
        has_fp8_experts=training.expert_precision is not ExpertPrecision.same,
        context=layout.context,
        crossings=nodes_per_token(model.moe, layout),
    )
    halves = 2 if layout.interleave else 1  # each reads all weights
    length = recipe.data.sequence_tokens
    forward = Work()
    for alike in sizes.alike_layers(model):
        layer = layer_work(alike.model, tokens // halves, length, split)
        forward += layer.times(halves * len(alike.layers))
    forward += joining_work(model, tokens)
    head = head_work(model, tokens).times((1 + model.mtp) * has_loss)
    again = Work()
    grades = sizes.recomputed(training, sizes.layers(model))
    for (like, grade), layers in Counter(zip(layer_models(model), grades, strict=True)).items():
        again += work_again(like, tokens // halves, length, split, grade).times(halves * layers)
    # The loss computes its gradients in the forward pass, and attention its logits for QK-clip.
    first = forward + head + head.backward()
    if recipe.optimizer.qk_clip is not None:
        first += clipping_work(model, tokens, length)
    ahead = compute_seconds(first, gpu, efficiency)
    back = compute_seconds(forward.backward() + again, gpu, efficiency)
    copies = Seconds()
    if training.offload:  # as much each way, under the arithmetic of the layers
        stream = tokens * model.d_model * numerics_of(recipe, world_size).stream
        copies = Seconds(links=offloaded_layers(model, grades) * stream / gpu.host_bandwidth)
    open_exchange = OPEN_IF_INTERLEAVED if layout.interleave else 1.0
    most_alike = max(len(alike.layers) for alike in sizes.alike_layers(model))
    of_passes = [each for each in traffic if each.what != EXCHANGE]
    passes = _overlapped(of_passes, ahead, back, most_alike, gpu, efficiency, open_exchange)
    open_copies = [Seconds(links=max(0.0, copies.links - each.total)) for each in (ahead, back)] + [Seconds()]
    counts = (microbatches, microbatches, 1)
    return [
        *(
            Part(name, each.seconds + copied, count, each.hidden)
            for name, each, copied, count in zip(
                ("forward", "backward", "reduce"), passes, open_copies, counts, strict=True
            )
        ),
        _update(recipe, world_size, gpu, traffic, efficiency),
    ]


def _update(
    recipe: Recipe, world_size: int, gpu: Gpu, traffic: list[Collective], efficiency: Efficiency
) -> Part:
    """The optimizer step."""
    model, layout = recipe.model, recipe.parallelism
    elements = sum(sizes.rank_weights(model, layout, world_size, 0).values())
    moments = states(model, layout, world_size, 0, recipe.optimizer).optimizer / elements
    update = update_work(elements, moments, clips=recipe.training.clip_norm is not None)
    update += Work(matrix_flops=orthogonalising(recipe, world_size).flops)
    exchanged = link_seconds([each for each in traffic if each.what == EXCHANGE], gpu, efficiency)
    return Part("optimizer", compute_seconds(update, gpu, efficiency) + exchanged)


def _overlapped(
    traffic: list[Collective],
    ahead: Seconds,
    back: Seconds,
    layers: int,
    gpu: Gpu,
    efficiency: Efficiency,
    open_exchange: float,
) -> tuple[Overlapped, Overlapped, Overlapped]:
    """Returns a forward pass, a backward pass, and what sums over ranks add to the last backward pass."""
    of_microbatch = [collective for collective in traffic if not collective.is_once_a_step]
    of_step = [(collective, collective.calls) for collective in traffic if collective.is_once_a_step]
    there = [(collective, collective.ahead) for collective in of_microbatch]
    and_back = [(collective, collective.calls - collective.ahead) for collective in of_microbatch]
    forward, backward, last = (
        overlap(arithmetic, traffic_of(calls, layers, gpu, efficiency.collectives, open_exchange))
        for arithmetic, calls in ((ahead, there), (back, and_back), (back, and_back + of_step))
    )
    return forward, backward, last + backward.times(-1)

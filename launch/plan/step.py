"""The plan of a recipe on a number of GPUs: memory, traffic, time and money."""

from dataclasses import dataclass

from launch.plan.hardware import Gpu
from launch.plan.memory import Memory, memory, numerics_of
from launch.plan.step_shapes import StepShape, step_shapes
from launch.plan.step_time import (
    FITTED,
    Efficiency,
    Seconds,
    Split,
    compute_seconds,
    head_work,
    layer_work,
    link_seconds,
    update_work,
)
from launch.plan.traffic import Collective, CollectiveKind, collectives
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.rules import validate
from train.recipe.schema import OptimizerKind, Recipe
from train.recipe.topology import Topology

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS


@dataclass(frozen=True)
class Part:
    """A part of a step, as it appears on the timeline."""

    name: str
    seconds: Seconds
    repeats: int = 1


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost. The figures of a step are those of one form of its steps."""

    recipe: Recipe
    form: StepShape
    gpu: Gpu
    world_size: int
    imbalance: float
    dollars_per_gpu_hour: float
    memory: Memory
    collectives: list[Collective]
    """Of one microbatch."""
    microbatches: int
    parts: list[Part]
    efficiency: Efficiency
    others: tuple["Plan", ...] = ()
    """Of the run's other step shapes, such as longer sequences in a later phase."""

    @property
    def step_shapes(self) -> tuple["Plan", ...]:
        """This plan and those of the other step shapes."""
        return (self, *self.others)

    @property
    def fullest(self) -> "Plan":
        """The form that needs the most memory."""
        return max(self.step_shapes, key=lambda plan: plan.memory.total)

    @property
    def fits(self) -> bool:
        """Whether the worst moment of the whole run is within the GPU's memory."""
        return self.fullest.memory.total <= self.gpu.memory_bytes

    @property
    def seconds(self) -> Seconds:
        """Of a step, by what it goes to."""
        total = Seconds()
        for part in self.parts:
            total += part.seconds.times(part.repeats)
        return total

    @property
    def step_seconds(self) -> float:
        """Predicted time of an optimizer step."""
        return self.seconds.total

    def hidden_seconds(self, seconds: Seconds) -> float:
        """Traffic that hides behind arithmetic: at the links' full rate it takes longer than it is open."""
        return max(0.0, self.efficiency.links - 1) * seconds.links

    @property
    def step_seconds_if_hidden(self) -> float:
        """The same if traffic of weights and gradients hid behind arithmetic: a bound, no prediction."""
        exchange = [c for c in self.collectives if c.kind is CollectiveKind.all_to_all]
        hidden = [c for c in self.collectives if c.kind is not CollectiveKind.all_to_all]
        compute = self.step_seconds - self.seconds.links
        open_seconds, hidden_seconds = (
            self.microbatches * link_seconds(part, self.gpu, self.efficiency).links
            for part in (exchange, hidden)
        )
        return max(compute, hidden_seconds) + open_seconds

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of a GPU."""
        return sizes.tokens_per_batch(self.form.recipe) / self.step_seconds / self.world_size

    @property
    def utilisation(self) -> float:
        """Model FLOPs, attention over all positions included, as a share of the peak (PaLM, appendix B)."""
        token = sizes.flops_per_token_training(self.recipe.model, self.form.recipe.data.sequence_tokens)
        return token.total * self.tokens_per_second_per_gpu / self.gpu.matrix_flops

    @property
    def utilisation_of_weights(self) -> float:
        """6 x active parameters x tokens alone, as a share of the peak."""
        token = sizes.flops_per_token_training(self.recipe.model, self.form.recipe.data.sequence_tokens)
        return token.weights * self.tokens_per_second_per_gpu / self.gpu.matrix_flops

    @property
    def days(self) -> float:
        """Of the whole run, all step shapes, without interruptions and evaluations."""
        return sum(plan.form.batches * plan.step_seconds for plan in self.step_shapes) / DAY_SECONDS

    @property
    def flops(self) -> sizes.Flops:
        """Of the whole run, attention at each form's length."""
        each = [plan.form.flops for plan in self.step_shapes]
        return sizes.Flops(sum(flops.weights for flops in each), sum(flops.attention for flops in each))

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * DAY_SECONDS / HOUR_SECONDS * self.world_size

    @property
    def dollars(self) -> float:
        """Of the whole run."""
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
    """Plans a recipe: every form of its steps, the one with the most tokens first.

    Args:
        recipe: the recipe.
        world_size: GPUs.
        gpu: which.
        imbalance: rows of the busiest expert rank over the mean, at least 1.
        dollars_per_gpu_hour: price.
        file: the recipe's file, for errors.
        efficiency: shares of the GPU's rates.

    Raises:
        UserError: one line, if the recipe or the layout is impossible.
    """
    validate(recipe, Topology(0, world_size, 0, 1), file)
    if imbalance < 1:
        raise UserError(f"is {imbalance}", key="--imbalance", remedy="the busiest is at least the mean: 1")

    def plan_of(form: StepShape, others: tuple[Plan, ...] = ()) -> Plan:
        shaped = form.recipe
        traffic = _traffic(shaped, world_size)
        return Plan(
            recipe=recipe,
            form=form,
            gpu=gpu,
            world_size=world_size,
            imbalance=imbalance,
            dollars_per_gpu_hour=dollars_per_gpu_hour,
            memory=memory(shaped, world_size, imbalance),
            collectives=traffic,
            microbatches=sizes.microbatches_per_rank(shaped, world_size),
            parts=_parts(shaped, world_size, gpu, traffic, imbalance, efficiency),
            efficiency=efficiency,
            others=others,
        )

    main, *others = step_shapes(recipe)
    return plan_of(main, tuple(plan_of(form) for form in others))


def _traffic(recipe: Recipe, world_size: int) -> list[Collective]:
    return collectives(
        recipe.model,
        recipe.parallelism,
        world_size,
        tokens=recipe.training.microbatch_sequences * recipe.data.sequence_tokens,
        compute_bytes=numerics_of(recipe).compute,
        checkpointing=recipe.training.activation_checkpointing,
    )


def _parts(
    recipe: Recipe,
    world_size: int,
    gpu: Gpu,
    traffic: list[Collective],
    imbalance: float,
    efficiency: Efficiency,
) -> list[Part]:
    """Forward and backward passes of a microbatch, repeated, and the optimizer's step."""
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    microbatches = sizes.microbatches_per_rank(recipe, world_size)
    tokens = training.microbatch_sequences * recipe.data.sequence_tokens
    split = Split(expert=layout.expert, imbalance=imbalance if layout.expert > 1 else 1.0)
    forward = layer_work(model, tokens, recipe.data.sequence_tokens, split).times(model.n_layers)
    head = head_work(model, tokens)
    again = forward if training.activation_checkpointing else forward.times(0)
    # The loss makes its gradients in the forward pass.
    ahead = compute_seconds(forward + head + head.backward(), gpu, efficiency)
    back = compute_seconds(forward.backward() + again, gpu, efficiency)
    links = link_seconds(traffic, gpu, efficiency)
    share = _forward_share(traffic, gpu)
    held = sum(sizes.rank_weights(model, layout, world_size, 0).values())
    moments = 8 if recipe.optimizer.kind is OptimizerKind.adamw else 4
    update = update_work(held, moments, clips=training.clip_norm is not None)
    return [
        Part("forward", ahead + links.times(share), microbatches),
        Part("backward", back + links.times(1 - share), microbatches),
        Part("optimizer", compute_seconds(update, gpu, efficiency)),
    ]


def _forward_share(traffic: list[Collective], gpu: Gpu) -> float:
    """Share of the traffic's time in the forward pass: one gathering, and half of the exchanges."""
    total = ahead = 0.0
    for collective in traffic:
        seconds = collective.seconds(gpu)
        total += collective.calls * seconds
        if collective.kind is CollectiveKind.all_gather:
            layers = 1 if collective.calls == 1 else _layers_of(traffic, collective)
            ahead += layers * seconds
        elif collective.kind is CollectiveKind.all_to_all:
            ahead += collective.calls * seconds / 2
    return ahead / total if total else 0.0


def _layers_of(traffic: list[Collective], gathered: Collective) -> int:
    """Units of that kind: each has its gradients reduced once."""
    return next(
        c.calls for c in traffic if c.what == gathered.what and c.kind is CollectiveKind.reduce_scatter
    )

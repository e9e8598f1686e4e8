"""Cases of the parity gate: layouts, each with inputs that are known to expose bugs.

Shapes: B global batch in sequences, S sequence, D width, E experts, K experts per token, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.verify import loaded_input
from launch.verify.bounds import LEAST_EPS
from train.recipe.layout_rules import tensor_violations, unstaged
from train.recipe.schema import (
    Balance,
    BalanceScope,
    Compile,
    ExpertPrecision,
    LossMean,
    Model,
    Optimizer,
    OptimizerKind,
    Parallelism,
    Precision,
    Recipe,
    Recompute,
    ReducePrecision,
)
from train.recipe.tiny import tiny_recipe

STEPS = 3
SEQUENCES = 8
"""Global batch: two sequences for each of four ranks."""
MOST_CLIP_NORM = 0.1
"""Far below any first gradient's norm, so that every step is clipped."""

MOST_QK_CLIP = 0.001
"""Below the largest logits of any tiny model that was just drawn, so that heads are clipped."""


@dataclass(frozen=True)
class Layout:
    """A mesh (replicate, shard, expert), across which neighbouring ranks may share sequences, by their tokens
    (context) or by heads and hidden units (tensor); or one for each stage of a pipeline.
    """

    replicate: int
    shard: int
    expert: int
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Parts of each stage of the pipeline."""
    node: int | None = None
    """Ranks that stand for a node, to which tokens cross once; None: they go straight to their experts."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.replicate * self.pipeline * self.shard * self.expert

    def __str__(self) -> str:
        shared = f"c{self.context}" if self.context > 1 else ""
        shared += f"t{self.tensor}" if self.tensor > 1 else ""
        shared += f"p{self.pipeline}" if self.pipeline > 1 else ""
        shared += f"x{self.chunks}" if self.chunks > 1 else ""
        shared += f"n{self.node}" if self.node else ""
        return f"({self.replicate},{self.shard},{self.expert}){shared}"

    @property
    def readers(self) -> int:
        """Number of ranks, or of groups that share sequences, that each read their own."""
        return self.world_size // (self.sharing * self.pipeline)

    @property
    def sharing(self) -> int:
        """Number of ranks that share each sequence."""
        return self.context * self.tensor

    @property
    def readers_of_experts(self) -> int:
        """Number of readers whose tokens meet in an expert group: one, if its ranks share their sequences."""
        return max(1, self.expert // self.sharing)


@dataclass(frozen=True)
class GateInput:
    """One way of training the tiny recipe for a few steps."""

    name: str
    what: str
    """Description for the report."""
    is_accumulated: bool = False
    """True: one sequence per microbatch, or two where halves are interleaved; False: a rank's whole share at
    once."""
    recompute: tuple[Recompute, Recompute] = (Recompute.nothing, Recompute.nothing)
    """The first layer's grade of recomputation, and the others'."""
    other_optimizer: bool = False
    """Lion instead of AdamW, or the reverse."""
    idle: bool = False
    """Half of the experts (or as many as top-K allows) get no token, nor do ranks that hold only these.
    The last two sequences have no targets: with four ranks, the last rank has no loss at all."""
    crowded: bool = False
    """Top-1, and one expert takes every token."""
    against_whole: bool = False
    """The reference takes the global batch at once: nothing may depend on how a batch is split. The balance
    loss, which may, is over the global batch here. Only fp32, since rounding depends on it too."""
    loaded: bool = False
    """The loader reads the batches, in two phases that differ in all that a phase may change:
    :mod:`launch.verify.loaded_input`. Against the whole batch at once."""
    masked: bool = False
    """Only some tokens have a loss, runs of them as in chats, their number very different from sequence to
    sequence; the loss is the mean over them. The last two sequences have none."""
    compiled: bool = False
    """With torch.compile; the reference is not compiled. Minutes per layout: only for a recipe with
    `training.compile`, or by name. Only fp32: in bf16 a fused kernel rounds once where single passes round
    each time, which sends near-ties to other experts."""


INPUTS = (
    GateInput("plain", "documents of unequal lengths, one microbatch per rank"),
    GateInput("accumulated", "the same, one sequence per microbatch", is_accumulated=True),
    GateInput("split", "the same, against the whole batch at once", is_accumulated=True, against_whole=True),
    GateInput(
        "recomputed",
        "the same with recomputed layers and the other optimizer",
        is_accumulated=True,
        recompute=(Recompute.layer, Recompute.layer),
        other_optimizer=True,
    ),
    GateInput(
        "idle",
        "experts and ranks without a token, a rank without a target; recomputed ffn and gates",
        idle=True,
        recompute=(Recompute.ffn, Recompute.gates),
    ),
    GateInput(
        "crowded",
        "top-1, one expert takes every token; recomputed elementwise",
        is_accumulated=True,
        crowded=True,
        recompute=(Recompute.elementwise, Recompute.elementwise),
    ),
    GateInput(
        "loaded",
        "two phases, read by the loader; router noise and losses that weigh much; against whole batches",
        against_whole=True,
        loaded=True,
    ),
    GateInput(
        "masked",
        "the same as split, with a loss on responses only, divided by their tokens in the whole batch",
        is_accumulated=True,
        against_whole=True,
        masked=True,
    ),
    GateInput("compiled", "torch.compile, against none", is_accumulated=True, compiled=True),
)


@dataclass(frozen=True)
class Case:
    """A layout with an input."""

    layout: Layout
    input: GateInput
    recipe: Recipe
    """The tiny recipe with the layout and the input's changes."""
    rows: tuple[int, ...]
    """Order in which the reference reads the global batch's sequences."""
    reference_microbatch: int
    """Sequences per microbatch of the reference."""
    balance_microbatches: int
    """Number of consecutive reference microbatches over which one balance loss is computed."""
    precision: Precision
    """fp32 or bf16."""


def layouts(recipe: Recipe, worlds: tuple[int, ...] = (1, 2, 4)) -> list[Layout]:
    """Every mesh with these numbers of ranks that the recipe's experts allow."""
    experts = recipe.model.moe.experts if recipe.model.moe else 1
    found = []
    for world in worlds:
        for replicate in (1, 2):
            for expert in range(1, world + 1):
                if world % (replicate * expert) == 0 and experts % expert == 0:
                    found.append(Layout(replicate, world // (replicate * expert), expert))
    return found


CONTEXTS = (Layout(1, 2, 1, context=2), Layout(1, 1, 4, context=2), Layout(2, 1, 2, context=4))
"""Groups that are the world, that share experts with another, and that lie across replicas."""


def context_layouts(recipe: Recipe, worlds: tuple[int, ...] = (1, 2, 4)) -> list[Layout]:
    """Layouts whose ranks share sequences; of a model without so many experts, experts are not spread."""
    return [_with_experts_of(recipe, each) for each in CONTEXTS if each.world_size in worlds]


TENSORS = (Layout(1, 2, 1, tensor=2), Layout(1, 1, 4, tensor=2), Layout(2, 1, 2, tensor=2))
"""Groups that are the world, that share experts with another, and that are a replica each."""


def tensor_layouts(small: Recipe, worlds: tuple[int, ...] = (1, 2, 4)) -> list[Layout]:
    """Layouts whose ranks share dense weights, those that the tiny recipe allows."""
    plain = replace(small, training=replace(small.training, compile=Compile.off))
    found = []
    for each in (_with_experts_of(small, layout) for layout in TENSORS if layout.world_size in worlds):
        recipe = replace(plain, parallelism=_layout_of(small, each, Precision.fp32))
        if not list(tensor_violations(recipe, each.world_size)):
            found.append(each)
    return found


NODES = Layout(1, 1, 4, node=2)
"""An expert group of two nodes."""


def node_layouts(recipe: Recipe, worlds: tuple[int, ...], precision: Precision) -> list[Layout]:
    """The layout whose tokens cross once to each node, if the recipe has so many experts.

    Only in fp32: in bf16 a sum is rounded before it crosses, which no reference does.
    """
    has_experts = recipe.model.moe is not None and recipe.model.moe.experts % NODES.expert == 0
    is_tried = has_experts and precision is Precision.fp32 and NODES.world_size in worlds
    return [NODES] if is_tried else []


PIPELINES = (
    Layout(1, 1, 1, pipeline=2),
    Layout(1, 1, 2, pipeline=2),
    Layout(1, 2, 1, pipeline=2),
    Layout(2, 1, 1, pipeline=2),
    Layout(1, 1, 1, pipeline=4),
    Layout(1, 1, 1, pipeline=2, chunks=2),
    Layout(1, 1, 2, pipeline=2, tensor=2),
)
"""Stages by themselves, with shared experts, sharded and in replicas; stages between others; chunks; and
stages whose ranks share dense weights."""


def pipeline_layouts(small: Recipe, worlds: tuple[int, ...] = (1, 2, 4)) -> list[Layout]:
    """Layouts of several stages, if the tiny recipe allows any."""
    found = []
    for each in (_with_experts_of(small, layout) for layout in PIPELINES if layout.world_size in worlds):
        staged = _staged(small, each)
        split = replace(staged, parallelism=_layout_of(staged, each, Precision.fp32))
        if not [*unstaged(staged), *tensor_violations(split, each.world_size)]:
            found.append(each)
    return found


def _staged(small: Recipe, layout: Layout) -> Recipe:
    """The tiny recipe under a layout, with layers for all parts of its pipeline, and without what a pipeline
    refuses and the gate tries in other layouts.
    """
    if layout.pipeline == 1:
        return small
    least = layout.pipeline * layout.chunks
    parallelism = replace(
        small.parallelism,
        pipeline=layout.pipeline,
        pipeline_chunks=layout.chunks,
        pipeline_layers=[],
        gathered_layers=small.parallelism.gathered_layers if layout.chunks == 1 else 0,
        interleave=False,
    )
    return replace(
        small,
        model=replace(small.model, n_layers=max(small.model.n_layers, least)),
        parallelism=parallelism,
        training=replace(small.training, compile=Compile.off, offload=False),
        guard=replace(small.guard, recheck_interval_batches=None),
    )


def _with_experts_of(recipe: Recipe, layout: Layout) -> Layout:
    """A layout, whose experts are not spread if the model has not so many."""
    experts = recipe.model.moe.experts if recipe.model.moe else 1
    if experts % layout.expert == 0:
        return layout
    return replace(layout, shard=layout.shard * layout.expert, expert=1)


def cases(
    recipe: Recipe,
    worlds: tuple[int, ...] = (1, 2, 4),
    names: tuple[str, ...] = (),
    precision: Precision = Precision.fp32,
) -> Iterator[Case]:
    """Every input under every layout; cases that share a reference are adjacent.

    Args:
        recipe: the full recipe, from which the tiny recipe is made.
        worlds: numbers of ranks.
        names: inputs to run; all if empty.
        precision: fp32 or bf16.
    """
    small = tiny_recipe(recipe, steps=STEPS, global_batch_sequences=SEQUENCES)
    for each in INPUTS:
        if (names and each.name not in names) or (each.crowded and small.model.moe is None):
            continue
        is_asked_for = names or recipe.training.compile is not Compile.off
        if each.compiled and not is_asked_for:
            continue
        is_rounded = precision is Precision.bf16 or has_tiles(recipe)
        if (each.compiled or each.against_whole) and is_rounded:
            continue
        if precision is Precision.bf16:
            worlds = tuple(world for world in worlds if world > 1)
        tried = layouts(recipe, worlds)
        if not each.compiled:
            tried += context_layouts(recipe, worlds) + tensor_layouts(small, worlds)
            tried += pipeline_layouts(small, worlds) + node_layouts(small, worlds, precision)
        found = [make_case(small, layout, each, precision) for layout in tried]
        yield from sorted(found, key=reference_of)


def reference_of(case: Case) -> tuple[object, ...]:
    """The key of a case's reference: cases with equal keys share one."""
    return (
        case.precision.value,
        case.input.name,
        case.reference_microbatch,
        case.balance_microbatches,
        case.rows,
        case.layout.tensor if case.precision is Precision.bf16 else 1,
        case.recipe.model.n_layers,
    )


def find_case(recipe: Recipe, layout: Layout, name: str, precision: Precision = Precision.fp32) -> Case:
    """One case of a recipe, by the input's name."""
    small = tiny_recipe(recipe, steps=STEPS, global_batch_sequences=SEQUENCES)
    return make_case(small, layout, next(each for each in INPUTS if each.name == name), precision)


def make_case(small: Recipe, layout: Layout, each: GateInput, precision: Precision) -> Case:
    """Builds one case: its recipe and how the reference groups the same sequences."""
    small = _staged(small, layout)
    if each.loaded:
        small = loaded_input.with_phases(small)
    share = SEQUENCES // layout.readers
    layout_of_case = _layout_of(small, layout, precision)
    if each.compiled:
        layout_of_case = replace(layout_of_case, interleave=False)
    least = 2 if layout_of_case.interleave else 1
    # Of a pipeline, at least one for each stage.
    microbatch = min(least, share) if each.is_accumulated else max(1, share // layout.pipeline)
    model = _with_wide_balance(small)
    if each.crowded:
        assert model.moe is not None
        model = replace(model, moe=replace(model.moe, top_k=1))
    moe = model.moe
    if each.against_whole and moe is not None and moe.balance is not Balance.bias:
        depends_on_split = moe.balance_scope is not BalanceScope.sequence
        scope = BalanceScope.global_batch if depends_on_split else BalanceScope.sequence
        model = replace(model, moe=replace(moe, balance_scope=scope))
    recipe = replace(
        small,
        model=model,
        optimizer=_optimizer_of(small.optimizer, each, precision),
        parallelism=layout_of_case,
        training=replace(
            small.training,
            recompute=each.recompute[0],
            recompute_layers=1,
            recompute_rest=each.recompute[1],
            compile=_compiled(small) if each.compiled else Compile.off,
            clip_norm=min(small.training.clip_norm or MOST_CLIP_NORM, MOST_CLIP_NORM),
            loss_mean=LossMean.targets if each.masked else small.training.loss_mean,
        ),
    )
    if not each.loaded:
        recipe = with_microbatch(recipe, microbatch)
    if has_tiles(small):
        return _with_the_same_tiles(Case(layout, each, recipe, (), microbatch, 1, precision), share)
    rows, together = _grouping(recipe, layout, microbatch, share)
    if each.against_whole:
        rows, together = tuple(range(SEQUENCES)), max(loaded_input.BATCHES) if each.loaded else SEQUENCES
    if precision is Precision.bf16:
        # Gradients are rounded once per microbatch, or half of one: the reference must have as many.
        if layout_of_case.interleave and microbatch % 2 == 0:
            microbatch //= 2
        return Case(layout, each, recipe, rows, microbatch, together // microbatch, precision)
    return Case(layout, each, recipe, rows, together, 1, precision)


def _optimizer_of(optimizer: Optimizer, each: GateInput, precision: Precision) -> Optimizer:
    if each.other_optimizer and optimizer.kind is OptimizerKind.adamw:
        # Chen et al. 2023, section 5: Lion needs a learning rate three to ten times smaller.
        lower = optimizer.learning_rate / 10
        optimizer = replace(optimizer, kind=OptimizerKind.lion, learning_rate=lower)
    elif each.other_optimizer:
        optimizer = replace(optimizer, kind=OptimizerKind.adamw)
    if precision is Precision.fp32:
        optimizer = replace(optimizer, eps=max(optimizer.eps, LEAST_EPS))
    if optimizer.qk_clip is not None:
        optimizer = replace(optimizer, qk_clip=min(optimizer.qk_clip, MOST_QK_CLIP))
    return optimizer


def has_tiles(recipe: Recipe) -> bool:
    """Returns whether experts' tokens share scales, so that gradients depend on which come together."""
    return recipe.training.expert_precision is not ExpertPrecision.same


def _with_wide_balance(small: Recipe) -> Model:
    """The model, its balance loss over all tokens that are in a tile together, so that a reference can be."""
    moe, narrow = small.model.moe, (BalanceScope.microbatch, BalanceScope.rank)
    if moe is None or not has_tiles(small) or moe.balance is Balance.bias or moe.balance_scope not in narrow:
        return small.model
    return replace(small.model, moe=replace(moe, balance_scope=BalanceScope.expert_group))


def _with_the_same_tiles(case: Case, share: int) -> Case:
    """A case of experts in fp8, whose reference computes the microbatches of an expert group as one.

    So an expert's tokens are the same in either, in the same order, and with them the tiles that gradients of
    weights are summed over. In bf16 that holds where experts are not shared, since the reference rounds each
    rank's gradients.
    """
    layout, microbatch = case.layout, case.reference_microbatch
    halved = case.recipe.parallelism.interleave and microbatch % 2 == 0
    part = microbatch // 2 if halved else microbatch
    moe = case.recipe.model.moe
    is_grouped = moe is not None and moe.balance_scope is BalanceScope.expert_group
    together = microbatch * layout.readers_of_experts if is_grouped else SEQUENCES
    reference = part if case.precision is Precision.bf16 else part * layout.readers_of_experts
    return replace(
        case,
        rows=_by_expert_group(layout, part, share),
        reference_microbatch=reference,
        balance_microbatches=together // reference,
    )


def _by_expert_group(layout: Layout, microbatch: int, share: int) -> tuple[int, ...]:
    """The order of sequences in which microbatches that an expert group computes together are adjacent."""
    together = layout.readers_of_experts
    return tuple(
        reader * share + start + sequence
        for group in range(0, layout.readers, together)
        for start in range(0, share, microbatch)
        for reader in range(group, group + together)
        for sequence in range(microbatch)
    )


def _layout_of(small: Recipe, layout: Layout, precision: Precision) -> Parallelism:
    """The recipe's own settings under a layout; in fp32, which shows all but rounding, nothing is rounded."""
    own = replace(
        small.parallelism,
        replicate=layout.replicate,
        expert=layout.expert,
        context=layout.context,
        tensor=layout.tensor,
        exchange_node_ranks=layout.node,
    )
    own = replace(own, interleave=own.interleave and layout.expert > 1)
    return replace(own, reduce_precision=ReducePrecision.fp32) if precision is Precision.fp32 else own


def _compiled(recipe: Recipe) -> Compile:
    asked = recipe.training.compile
    return Compile.blocks if asked is Compile.off else asked


def with_microbatch(recipe: Recipe, sequences: int) -> Recipe:
    """The recipe with this microbatch in every phase."""
    phases = [replace(phase, microbatch_sequences=sequences) for phase in recipe.data.phases]
    training = replace(recipe.training, microbatch_sequences=sequences)
    return replace(recipe, training=training, data=replace(recipe.data, phases=phases))


def _grouping(recipe: Recipe, layout: Layout, microbatch: int, share: int) -> tuple[tuple[int, ...], int]:
    """An order of the sequences, and over how many consecutive ones a balance loss is computed.

    Only over the global batch, or over each sequence, is the balance loss the same for every layout. For a
    narrower scope, the reference groups the same sequences as the layout's ranks and microbatches do.
    """
    in_order = tuple(range(SEQUENCES))
    moe = recipe.model.moe
    scope = moe.balance_scope if moe is not None else BalanceScope.global_batch
    if scope in (BalanceScope.global_batch, BalanceScope.sequence):
        return in_order, SEQUENCES
    if scope is BalanceScope.microbatch:
        return in_order, microbatch
    if scope is BalanceScope.rank:
        return in_order, share
    return _by_expert_group(layout, microbatch, share), microbatch * layout.readers_of_experts

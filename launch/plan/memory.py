"""Memory of a GPU at the peak of a step, by purpose.

Weights, gradients and optimizer state are exact; activations and loss follow
:mod:`launch.plan.activations`; gathered weights and exchanged tokens follow what FSDP2 and MegaBlocks
allocate. tests/cuda_standin/test_memory.py compares the sum with what PyTorch's allocator hands out.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

from launch.plan.activations import (
    CPU_FP32,
    FP32,
    GPU_BF16,
    ONE_GPU_BF16,
    Microbatch,
    Numerics,
    layer_gradient_elements,
    loss_bytes,
    norm_bytes,
    weight_copies,
)
from launch.plan.hardware import GIB
from launch.plan.muon import orthogonalising
from launch.plan.nodes import nodes_of_group, nodes_per_token
from launch.plan.recomputation import (
    backward_passes,
    copies_at_loss,
    copies_kept,
    kept_bytes,
)
from launch.plan.traffic import reduced_bytes
from train.recipe import sizes
from train.recipe.matrices import is_orthogonalised
from train.recipe.schema import (
    Model,
    Moments,
    Optimizer,
    OptimizerKind,
    Parallelism,
    Precision,
    Recipe,
    Recompute,
    Reduction,
)

BF16 = 2
FRAGMENTATION_SHARE = 0.05
"""Assumed: share of all allocated memory, with expandable segments."""
RESERVED_BYTES = 2 * GIB
"""Assumed: the CUDA context, cuBLAS' workspace and NCCL's buffers, which torch's allocator does not see."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of its step."""

    weights: int
    gradients: int
    """Those that exist at that moment."""
    optimizer: int
    activations: int
    """Kept for the backward pass, recomputed, and needed in the backward pass."""
    loss: int
    """Logits of a chunk, and the gradients that the loss computes."""
    gathered: int
    """Weights that are gathered at the time, unsharded gradients, and the buffers to reduce them from; on one
    GPU autocast's copies of weights."""
    exchanged: int
    """Buffers of the all-to-all to experts on other ranks and back."""
    fragmentation: int
    reserved: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    @staticmethod
    def parts() -> list[str]:
        """Returns the names of the parts, in order."""
        return [part.name for part in fields(Memory)]


@dataclass(frozen=True)
class States:
    """Bytes of a rank's weights, optimizer state and gradients."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer


def states(model: Model, layout: Parallelism, world_size: int, rank: int, optimizer: Optimizer) -> States:
    """Bytes of one rank's fp32 shards and of its optimizer's state."""
    elements = sum(sizes.rank_weights(model, layout, world_size, rank).values())
    optimizer_bytes = _moment_bytes(model, layout, world_size, rank, optimizer.kind, optimizer.moments)
    if optimizer.average_decay is not None:
        optimizer_bytes += elements * FP32
    return States(elements * FP32, elements * FP32, optimizer_bytes)


@functools.lru_cache(maxsize=64)  # as the elements of a rank's weights, for the plan's search
def _moment_bytes(
    model: Model, layout: Parallelism, world_size: int, rank: int, kind: OptimizerKind, moments: Moments
) -> int:
    """Bytes that an optimizer keeps of a rank's weights, but for an average of them.

    Lion keeps one moment, and so does Muon of what it orthogonalises; AdamW, which updates Muon's rest,
    two moments and a counter.
    """
    held = sizes.rank_weights(model, layout, world_size, rank)
    moment = FP32 if moments is Moments.fp32 else BF16
    total = 0
    for weight in sizes.weights(model):
        elements = held[weight.name]
        keeps_one = kind is OptimizerKind.lion or (
            kind is OptimizerKind.muon and is_orthogonalised(weight.name, weight.shape)
        )
        total += elements * FP32 if keeps_one else 2 * elements * moment + FP32
    return total


def numerics_of(recipe: Recipe, world_size: int) -> Numerics:
    """Returns the numerics of a run on GPUs; one GPU shards nothing."""
    if recipe.training.precision is Precision.fp32:
        return CPU_FP32
    return GPU_BF16 if world_size > 1 else ONE_GPU_BF16


def memory(
    recipe: Recipe, world_size: int, imbalance: float = 1.0, rank: int = 0, in_flight: float = 1.0
) -> Memory:
    """Returns the memory of one rank, by default of rank 0, which has the largest shards.

    Args:
        recipe: a valid recipe.
        world_size: ranks.
        imbalance: rows of this rank's experts relative to the mean; matters only with expert parallelism.
        rank: index of the rank.
        in_flight: microbatches whose activations are kept at a time.
    """
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    batch = Microbatch(
        training.microbatch_sequences,
        recipe.data.sequence_tokens,
        masked=training.document_masking,
        imbalance=imbalance if layout.expert > 1 else 1.0,
        exchanged=layout.expert > 1,
        context=layout.context,
        tensor=layout.tensor,
        crossings=nodes_per_token(model.moe, layout),
        nodes=nodes_of_group(layout),
    )
    held = states(model, layout, world_size, rank, recipe.optimizer)
    kept_gradients = 0
    if sizes.microbatches_per_rank(recipe, world_size) > 1:
        kept_gradients = held.gradients
        if world_size > 1 and layout.reduce is Reduction.once_a_batch:
            kept_gradients = sum(gathered_bytes(model, layout, world_size, reduced_bytes(layout)).values())
    if world_size > 1:
        moments = _moments(recipe, world_size, batch, kept_gradients, in_flight - 1)
    else:
        moments = _moments_of_one(recipe, batch, kept_gradients)
    fullest = max(moments, key=sum)
    handed_out = held.weights + held.optimizer + sum(fullest)
    return Memory(
        weights=held.weights,
        gradients=fullest.gradients,
        optimizer=held.optimizer,
        activations=fullest.activations,
        loss=fullest.loss,
        gathered=fullest.gathered,
        exchanged=fullest.exchanged,
        fragmentation=round(handed_out * FRAGMENTATION_SHARE),
        reserved=RESERVED_BYTES,
    )


class Moment(NamedTuple):
    """Bytes at a candidate for the peak, by the parts of :class:`Memory`, but weights and optimizer state."""

    activations: int
    loss: int
    gathered: int
    exchanged: int
    gradients: int


def _moments(
    recipe: Recipe, world_size: int, batch: Microbatch, kept_gradients: int, others: float
) -> list[Moment]:
    """The candidates of a rank of several: in the loss, in the backward passes of the layers that may need
    the most, at the end of the backward pass, when the embeddings' gradients are reduced, and in the update.

    Gradients of earlier microbatches, ``kept_gradients``, exist all the time, those of the only one from the
    backward pass of their layer on, in which what the layers have kept becomes less. Of ``others``, so many
    microbatches in flight besides, all that layers keep is there too.
    """
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    numerics = numerics_of(recipe, world_size)
    grades = sizes.recomputed(training, sizes.layers(model))
    chunk = training.loss_chunk_tokens or sizes.LOSS_CHUNK_TOKENS["cuda"]
    kept = kept_bytes(model, batch, numerics, grades, offload=training.offload)
    of_others = round(others * kept)
    halves = 2 if layout.interleave else 1
    stream = batch.tokens * model.d_model * numerics.stream
    loss = loss_bytes(model, batch, numerics, chunk)
    whole = _Whole.of(model, layout, world_size, numerics.compute)
    stays = whole.layer * layout.gathered_layers
    above = max(0, stays - 2 * whole.layer)  # two are at hand in the backward pass anyway
    exchanged = 0
    if model.moe and layout.expert > 1:
        row = batch.tokens * model.d_model * numerics.compute
        # Of halves, one's and the other's on their way.
        exchanged = round(row * (model.moe.top_k * batch.imbalance + batch.crossings))
    all_gradients = max(kept_gradients, states(model, layout, world_size, 0, recipe.optimizer).gradients)
    gathered = whole.outside + 2 * whole.layer + whole.gradients
    waiting = stream if model.mtp else 0  # a gradient of the hidden states, then of the embeddings
    found = [
        Moment(
            of_others + kept + norm_bytes(model, batch, numerics),
            loss.total,
            whole.outside + stays,
            0,
            kept_gradients,
        ),
        Moment(stream, 0, whole.outside * (2 + FP32 // numerics.compute), 0, all_gradients),
        Moment(0, 0, orthogonalising(recipe, world_size).bytes, 0, all_gradients),
    ]
    own = whole.gradients
    for each in backward_passes(
        model,
        batch,
        numerics,
        grades,
        own_gradients=lambda _: own,
        halves=halves,
        offload=training.offload,
    ):
        layers_above = len(grades) - 1 - each.layer
        gradients = all_gradients * layers_above // max(1, len(grades) - 1)
        stay = gathered + (whole.reduced if layers_above else above)
        in_layer = of_others + each.kept + each.working + waiting
        found.append(Moment(in_layer, loss.weight_gradient, stay, exchanged, max(kept_gradients, gradients)))
    return found


def _moments_of_one(recipe: Recipe, batch: Microbatch, kept_gradients: int) -> list[Moment]:
    model, training = recipe.model, recipe.training
    chunk = training.loss_chunk_tokens or sizes.LOSS_CHUNK_TOKENS["cuda"]
    grades = sizes.recomputed(training, sizes.layers(model))
    update = Moment(0, 0, orthogonalising(recipe, 1).bytes, 0, sizes.total_parameters(model) * FP32)
    of_passes = moments_of_one(
        model, batch, numerics_of(recipe, 1), grades, chunk, kept_gradients, training.offload
    )
    return [*of_passes, update]


def moments_of_one(
    model: Model,
    batch: Microbatch,
    numerics: Numerics,
    grades: Sequence[Recompute],
    chunk_tokens: int,
    kept_gradients: int = 0,
    offload: bool = False,
) -> list[Moment]:
    """The candidates of one process with the whole model: its gradients are made in place, in fp32.

    Args:
        model: the decoder.
        batch: its microbatch.
        numerics: bytes per element.
        grades: what each layer recomputes.
        chunk_tokens: tokens whose logits are in memory at once.
        kept_gradients: bytes of gradients from earlier microbatches.
        offload: inputs of layers that are computed again wait in host memory.
    """
    loss = loss_bytes(model, batch, numerics, chunk_tokens)
    stream = batch.tokens * model.d_model * numerics.stream
    kept = kept_bytes(model, batch, numerics, grades, offload=offload) + norm_bytes(model, batch, numerics)
    found = [
        Moment(kept, loss.total, copies_at_loss(model, numerics, grades), 0, kept_gradients),
        Moment(stream, 0, 0, 0, sizes.total_parameters(model) * FP32),
    ]

    def own_gradients(like: Model) -> int:
        return layer_gradient_elements(like)[1] * FP32

    for each in backward_passes(model, batch, numerics, grades, own_gradients=own_gradients, offload=offload):
        # A checkpoint's input is what its first norm saves.
        shared = stream if grades[each.layer] is Recompute.layer else 0
        in_layer = each.kept + each.working - shared
        in_layer += stream if model.mtp else 0  # a gradient of the hidden states, then of the embeddings
        made_first = own_gradients(each.like)
        gradients = max(kept_gradients, _gradients_above(model, each.layer)) + made_first
        cast = copies_kept(model, numerics, grades[: each.layer]) + weight_copies(each.like, numerics).layer
        found.append(Moment(in_layer, loss.weight_gradient, cast, 0, gradients))
    return found


def _gradients_above(model: Model, layer: int) -> int:
    """Bytes of the gradients of the layers above one."""
    joining = sum(weight.elements for weight in sizes.joining_weights(model) if layer < model.n_layers)
    return FP32 * joining + FP32 * sum(
        sum(number > layer for number in alike.layers) * layer_gradient_elements(alike.model)[0]
        for alike in sizes.alike_layers(model)
    )


def gathered_bytes(model: Model, layout: Parallelism, world_size: int, compute_bytes: int) -> dict[str, int]:
    """Bytes of each FSDP2 unit's gathered weights, by the unit's module; shards are padded.

    Args:
        model: the decoder.
        layout: degrees of the mesh.
        world_size: ranks.
        compute_bytes: bytes per element of gathered weights.
    """
    found: dict[str, int] = {}
    for weight in sizes.weights(model):
        place = sizes.placement(weight, layout, world_size)
        if place.is_replicated:
            continue
        rows = place.rows_at_most(weight) * place.rows_over
        size = rows * place.row_elements(weight) * compute_bytes
        found[place.unit] = found.get(place.unit, 0) + size
    return found


@dataclass(frozen=True)
class _Whole:
    """Bytes of gathered weights."""

    outside: int
    """Embeddings, gathered from the first layer until the last gradient."""
    layer: int
    """One layer, the largest."""
    gradients: int
    """Gradients of the largest unit."""
    reduced: int
    """Buffers from which the units that come one after the other in the backward pass are reduced: of an MoE
    layer the experts, then the rest."""

    @classmethod
    @functools.lru_cache
    def of(cls, model: Model, layout: Parallelism, world_size: int, compute_bytes: int) -> "_Whole":
        """The bytes of a model under a layout."""
        outside, layers = 0, Counter[str]()
        units: list[tuple[int, bool, int]] = []
        for unit, size in gathered_bytes(model, layout, world_size, compute_bytes).items():
            if not unit:
                outside += size
            else:
                name = unit.removesuffix(".ffn.experts")
                layers[name] += size
                # In the order of the backward pass: the last layer first, and of each its experts.
                units.append((-list(layers).index(name), name == unit, size))
        in_turn = [size for *_, size in sorted(units)]
        at_once = sizes.REDUCTIONS_IN_FLIGHT
        in_flight = max(sum(in_turn[place : place + at_once]) for place in range(len(in_turn)))
        reduced = in_flight // compute_bytes * reduced_bytes(layout)
        return cls(outside, max(layers.values()), gradients=max(in_turn), reduced=reduced)

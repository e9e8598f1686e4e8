"""Memory of a GPU at the peak of a step, by purpose.

Weights, gradients and optimizer state are exact; activations and loss follow
:mod:`launch.plan.activations`; gathered weights and exchanged tokens follow what FSDP2 and MegaBlocks
allocate. None of it has been measured on a GPU yet.
"""

from dataclasses import asdict, dataclass, fields

from launch.plan.activations import (
    CPU_FP32,
    FP32,
    GPU_BF16,
    Microbatch,
    Numerics,
    backward_bytes,
    kept_bytes,
    layer_bytes,
    loss_bytes,
    norm_bytes,
)
from launch.plan.hardware import GIB, Gpu
from train.recipe import sizes
from train.recipe.schema import Model, OptimizerKind, Parallelism, Precision, Recipe

FRAGMENTATION_SHARE = 0.05
"""Assumed: share of all allocated memory, with expandable segments."""
RESERVED_BYTES = 2 * GIB
"""Assumed: the CUDA context, cuBLAS' workspace and NCCL's buffers, which torch's allocator does not see."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of its step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, recomputed, and needed in the backward pass."""
    loss: int
    """Logits of a chunk, and the gradients that the loss computes."""
    gathered: int
    """Weights that are gathered at the time, unsharded gradients, and the buffers to reduce them from."""
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


def states(model: Model, layout: Parallelism, world_size: int, rank: int, optimizer: OptimizerKind) -> States:
    """Bytes of one rank's fp32 shards: AdamW has two moments and a counter per tensor, Lion one moment."""
    held = sizes.rank_weights(model, layout, world_size, rank)
    elements = sum(held.values())
    moments = 2 * elements * FP32 + len(held) * FP32 if optimizer is OptimizerKind.adamw else elements * FP32
    return States(elements * FP32, elements * FP32, moments)


def numerics_of(recipe: Recipe) -> Numerics:
    """Returns the numerics of a run on GPUs."""
    return CPU_FP32 if recipe.training.precision is Precision.fp32 else GPU_BF16


def memory(recipe: Recipe, world_size: int, imbalance: float = 1.0, rank: int = 0) -> Memory:
    """Returns the memory of one rank, by default of rank 0, which has the largest shards.

    Args:
        recipe: a valid recipe.
        world_size: ranks.
        imbalance: rows of this rank's experts relative to the mean; matters only with expert parallelism.
        rank: index of the rank.
    """
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    batch = Microbatch(
        training.microbatch_sequences,
        recipe.data.sequence_tokens,
        masked=training.document_masking,
        imbalance=imbalance if layout.expert > 1 else 1.0,
    )
    held = states(model, layout, world_size, rank, recipe.optimizer.kind)
    moments = _moments(recipe, world_size, batch)
    activations, loss, gathered, exchanged = max(moments, key=sum)
    handed_out = sum((held.weights, held.gradients, held.optimizer, activations, loss, gathered, exchanged))
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations,
        loss=loss,
        gathered=gathered,
        exchanged=exchanged,
        fragmentation=round(handed_out * FRAGMENTATION_SHARE),
        reserved=RESERVED_BYTES,
    )


def _moments(recipe: Recipe, world_size: int, batch: Microbatch) -> list[tuple[int, int, int, int]]:
    """Activations, loss, gathered weights and exchanged tokens at three moments: in the loss, in the backward
    pass of the last layer, and at the end of the backward pass, when the embeddings' gradients are reduced.
    """
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    numerics = numerics_of(recipe)
    checkpointing = training.activation_checkpointing
    kept = kept_bytes(model, batch, numerics, checkpointing=checkpointing)
    loss = loss_bytes(model, batch, numerics, training.loss_chunk_tokens)
    whole = _Whole.of(model, layout, world_size, numerics.compute)
    again = layer_bytes(model, batch, numerics) if checkpointing else 0
    stream = batch.tokens * model.d_model * numerics.stream
    head_gradient = loss.weight_gradient * numerics.compute // FP32
    exchanged = 0
    if model.moe and layout.expert > 1:
        rows = batch.tokens * model.moe.top_k * model.d_model * numerics.compute
        exchanged = rows + round(rows * batch.imbalance)
    return [
        (kept + norm_bytes(model, batch, numerics), loss.total, whole.outside, 0),
        (
            kept + again + backward_bytes(model, batch, numerics),
            head_gradient,
            whole.outside + whole.in_backward,
            exchanged,
        ),
        (stream, 0, whole.outside * (2 + FP32 // numerics.compute), 0),
    ]


def gathered_bytes(model: Model, layout: Parallelism, world_size: int, compute_bytes: int) -> dict[str, int]:
    """Bytes of each FSDP2 unit's gathered weights, by the unit's module; shards are padded.

    Args:
        model: the decoder.
        layout: degrees of the mesh.
        world_size: ranks.
        compute_bytes: bytes per element of weights that are not kept in fp32.
    """
    found: dict[str, int] = {}
    for weight in sizes.weights(model):
        place = sizes.placement(weight, layout, world_size)
        rows = place.rows_at_most(weight) * place.rows_over
        size = rows * (weight.elements // weight.shape[0]) * (FP32 if place.stays_fp32 else compute_bytes)
        found[place.unit] = found.get(place.unit, 0) + size
    return found


@dataclass(frozen=True)
class _Whole:
    """Bytes of gathered weights."""

    outside: int
    """Embeddings, gathered from the first layer until the last gradient."""
    in_backward: int
    """A layer, the prefetched next one (the receive buffer and its unpacked copy), the layer's gradients, and
    the fp32 copy that is reduced."""

    @classmethod
    def of(cls, model: Model, layout: Parallelism, world_size: int, compute_bytes: int) -> "_Whole":
        outside, layer, largest = 0, 0, 0
        for unit, size in gathered_bytes(model, layout, world_size, compute_bytes).items():
            if ".blocks." not in unit:
                outside += size
            elif ".blocks.0" in unit:
                layer, largest = layer + size, max(largest, size)
        reduced = largest // compute_bytes * (compute_bytes + FP32)
        return cls(outside=outside, in_backward=2 * layer + largest + reduced)


def fits(memory_of_rank: Memory, gpu: Gpu) -> bool:
    """Returns True if a rank's peak is within its GPU's memory."""
    return memory_of_rank.total <= gpu.memory_bytes

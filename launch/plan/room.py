"""Host memory that a run takes, and whether it has room in its GPUs and hosts."""

from launch.plan.hardware import Gpu
from launch.plan.memory import Memory, numerics_of, states
from launch.plan.recomputation import offloaded_layers
from train.recipe import sizes
from train.recipe.schema import Recipe


def host_bytes(recipe: Recipe, world_size: int) -> int:
    """Pinned host memory of one GPU's process in which inputs of layers wait (`training.offload`).

    A buffer for each but the last layer's input, which stays; torch hands out pinned memory in powers of two.
    """
    training, layout = recipe.training, recipe.parallelism
    if not training.offload:
        return 0
    tokens = training.microbatch_sequences * recipe.data.sequence_tokens // (layout.context * layout.tensor)
    stream = tokens * recipe.model.d_model * numerics_of(recipe, world_size).stream
    inputs = offloaded_layers(recipe.model, sizes.recomputed(training, sizes.layers(recipe.model)))
    return max(0, inputs - 1) << (stream - 1).bit_length()


def copies_bytes(recipe: Recipe, world_size: int, gpus_per_node: int) -> int:
    """Host memory for one GPU's part of the state in copies (`checkpoint.memory_interval_batches`).

    One copy in the process, from which two generations are written to its host, and to another if there is
    one.
    """
    if recipe.checkpoint.memory_interval_batches is None:
        return 0
    held = states(recipe.model, recipe.parallelism, world_size, 0, recipe.optimizer)
    hosts = 2 if world_size > gpus_per_node else 1
    return (1 + 2 * hosts) * (held.weights + held.optimizer)


def has_room(memory_of_rank: Memory, waiting_bytes: int, gpu: Gpu) -> bool:
    """Returns True if a rank's peak is within its GPU's memory, and what waits in its host's."""
    return memory_of_rank.total <= gpu.memory_bytes and waiting_bytes <= gpu.host_room

"""GPUs and the links between them, as their data sheets say."""

from dataclasses import dataclass

from launch.plan.rows import read_rows
from train.recipe.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of several, each with a network card of its own. Rates are per GPU, one way."""

    name: str
    memory_bytes: int
    """What torch reports as the device's total memory, less than the name says."""
    matrix_flops: float
    """bf16 matrix products per second without sparsity, in FLOP."""
    memory_bandwidth: float
    """Bytes per second from and to its own memory."""
    nvlink_bandwidth: float
    """Bytes per second to the other GPUs of the node."""
    network_bandwidth: float
    """Bytes per second to other nodes (InfiniBand)."""
    gpus_per_node: int = 8
    nvlink_hop_seconds: float = 1e-6
    """From one GPU to its neighbour: picked, of the order of NCCL's own tuning tables."""
    network_hop_seconds: float = 4e-6
    """From one node to the next: picked likewise."""


GPUS = {
    row["name"]: Gpu(
        row["name"],
        int(float(row["memory_gib"]) * GIB),
        float(row["matrix_flops"]),
        float(row["memory_bandwidth"]),
        float(row["nvlink_bandwidth"]),
        float(row["network_bandwidth"]),
    )
    for row in read_rows("gpus.csv")
}
"""Efficiencies were fitted on H100s only: for the others they are carried over, not checked."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: if it is not known.
    """
    if name not in GPUS:
        raise UserError(f"{name!r} is not known", key="--gpu", remedy=f"one of {', '.join(GPUS)}")
    return GPUS[name]

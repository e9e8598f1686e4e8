"""GPUs and the links between them, from their data sheets."""

from dataclasses import dataclass
from pathlib import Path

from launch.plan.rows import read_rows
from train.recipe.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of several, each with its own network card. Rates are per GPU and direction."""

    name: str
    memory_bytes: int
    """Total memory that torch reports, which is less than the name says."""
    matrix_flops: float
    """FLOP/s of dense bf16 matrix products, without sparsity."""
    fp8_flops: float
    """The same in fp8; 0: it has none."""
    fp8_format: str
    """The `training.expert_precision` that torch has products for on it; same: none in fp8."""
    memory_bandwidth: float
    """Bytes per second to and from its own memory."""
    nvlink_bandwidth: float
    """Bytes per second to the other GPUs of the node."""
    network_bandwidth: float
    """Bytes per second to other nodes (InfiniBand)."""
    host_bandwidth: float
    """Bytes per second to the host's memory (PCIe)."""
    host_memory_bytes: int
    """The node's memory, divided by its GPUs."""
    gpus_per_node: int = 8
    nvlink_hop_seconds: float = 1e-6
    """Latency from one GPU to its neighbour: assumed, of the order of NCCL's own tuning tables."""
    network_hop_seconds: float = 4e-6
    """Latency from one node to the next: assumed likewise."""

    @property
    def host_room(self) -> float:
        """Host memory that a GPU's process may pin: half of its share, and the rest for loaders and files."""
        return self.host_memory_bytes / 2


GPUS = {
    row["name"]: Gpu(
        row["name"],
        int(float(row["memory_gib"]) * GIB),
        float(row["matrix_flops"]),
        float(row["fp8_flops"]),
        row["fp8_format"],
        float(row["memory_bandwidth"]),
        float(row["nvlink_bandwidth"]),
        float(row["network_bandwidth"]),
        float(row["host_bandwidth"]),
        int(float(row["host_memory_gib"]) * GIB),
    )
    for row in read_rows(Path(__file__).with_name("gpus.csv"))
}
"""GPUs by name. Efficiencies were fitted on H100s only; for the others they are carried over, unchecked."""


def gpu_named(name: str) -> Gpu:
    """Returns the GPU of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in GPUS:
        raise UserError(f"{name!r} is not known", key="--gpu", remedy=f"one of {', '.join(GPUS)}")
    return GPUS[name]

"""GPUs and the links between them, as their data sheets say."""

from dataclasses import dataclass

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
    # NVIDIA H100 SXM5 data sheet; 400 Gbit/s InfiniBand per GPU (DGX H100).
    "h100": Gpu("h100", int(79.1 * GIB), 989.5e12, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 SXM data sheet: an H100 with more and faster memory.
    "h200": Gpu("h200", int(139.8 * GIB), 989.5e12, 4.8e12, 450e9, 50e9),
    # NVIDIA A100 80GB SXM data sheet; 200 Gbit/s InfiniBand per GPU (DGX A100).
    "a100": Gpu("a100", int(79.1 * GIB), 312e12, 2.039e12, 300e9, 25e9),
    # NVIDIA HGX B200 data sheet; 400 Gbit/s InfiniBand per GPU.
    "b200": Gpu("b200", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, 50e9),
}
"""Efficiencies were fitted on H100s alone: for the others they are carried over, not checked."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: if it is not known.
    """
    if name not in GPUS:
        raise UserError(f"{name!r} is not known", key="--gpu", remedy=f"one of {', '.join(GPUS)}")
    return GPUS[name]

"""The device at hand: measured peak of matrix products, bf16 in hardware, one line of description."""

import functools
import os
import platform
import time
from pathlib import Path

import torch

from train.recipe.topology import usable_cores

MEASURE_SECONDS = 1.0
CPU_SIZE = 1024
GPU_SIZE = 8192


@functools.cache
def measured_peak_flops(device_type: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the yardstick of utilisation; measured once per process.

    Products of two square matrices run for a second, and the fastest counts. It is a peak: on two shared
    cores the median of a second moved by a factor of 6 with the neighbours (bf16, 270 to 1,600 GFLOP/s),
    the fastest by 1.1. Sizes are large enough that a device reaches its pace (1024 on a CPU, 8192 on a
    GPU; the GPU's not yet run on one).

    Args:
        device_type: `cpu` or `cuda`.
        dtype: precision of the products.

    Returns:
        FLOP/s of one device; a multiply-add counts as two.
    """
    size = GPU_SIZE if device_type == "cuda" else CPU_SIZE
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator).to(device_type, dtype)
    right = torch.randn(size, size, generator=generator).to(device_type, dtype)
    out = torch.empty_like(left)
    for _ in range(2):
        _timed_product(left, right, out)
    end = time.perf_counter() + MEASURE_SECONDS
    seconds = [_timed_product(left, right, out)]
    while time.perf_counter() < end:
        seconds.append(_timed_product(left, right, out))
    return 2 * size**3 / min(seconds)


def supports_bf16(device_type: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; where it emulates, fp32 is faster."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & cpu_flags())


def cpu_flags() -> frozenset[str]:
    """Instruction sets that Linux reports; none where there is no /proc."""
    for key in ("flags", "Features"):
        found = _cpuinfo(key)
        if found:
            return frozenset(found.split())
    return frozenset()


def describe_hardware(device_type: str, devices: int = 1) -> str:
    """One line about the machine, such as `2 cores of Intel Xeon, 8 GiB`."""
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{devices} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB each"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    ranks = f", {devices} processes" if devices > 1 else ""
    return f"{usable_cores()} cores of {name}, {memory:.0f} GiB{ranks}"


def _timed_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cpuinfo(key: str) -> str:
    """The first processor's value of a key of /proc/cpuinfo, or an empty string."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""

"""This machine's device: measured peak FLOP/s, bf16 support in hardware, one line of description."""

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
    """Measures FLOP/s of a large matrix product, once per process; utilisation is relative to it.

    Multiplies two square matrices for a second and takes the fastest product, since this is a peak: on two
    shared cores the median of a second varied by a factor of 6 with other load (bf16, 270 to 1,600 GFLOP/s),
    the fastest by 1.1. The sizes are large enough to reach full speed (1024 on a CPU, 8192 on a GPU; the
    GPU's not yet run on one).

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


def add_in_fixed_order() -> None:
    """Makes a GPU's kernels add in a fixed order, for `training.deterministic`; holds for the process.

    Flash attention's backward pass, scatters and index sums then take forms without atomic additions; cuDNN's
    attention, which makes no promise, is left out. An operation without such a form warns, once, by its name.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Meant to find reads of memory that nobody wrote; here it would only fill every new buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined, unused-ignore]
    torch.backends.cuda.enable_cudnn_sdp(False)


def supports_bf16(device_type: str) -> bool:
    """Returns whether the device multiplies bf16 matrices in hardware; if it emulates, fp32 is faster."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & cpu_flags())


def cpu_flags() -> frozenset[str]:
    """Instruction sets that Linux reports; empty without /proc."""
    for key in ("flags", "Features"):
        found = _cpuinfo(key)
        if found:
            return frozenset(found.split())
    return frozenset()


def describe_hardware(device_type: str, devices: int = 1) -> str:
    """Describes the machine in one line, such as `2 cores of Intel Xeon, 8 GiB`."""
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{devices} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB each"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ranks = f", {devices} processes" if devices > 1 else ""
    return f"{usable_cores()} cores of {cpu_name()}, {memory:.0f} GiB{ranks}"


def cpu_name() -> str:
    """Returns the processor's name, or its architecture where Linux does not report one."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


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

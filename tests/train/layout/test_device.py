import time
from pathlib import Path

import pytest
import torch

from train.layout.device import cpu_flags, describe_hardware, measured_peak_flops, supports_bf16


def test_peak_is_quick_cached_and_above_any_product() -> None:
    begun = time.perf_counter()
    peak = measured_peak_flops("cpu", torch.float32)
    assert time.perf_counter() - begun < 10  # One second on an idle machine; machines are shared.
    begun = time.perf_counter()
    assert measured_peak_flops("cpu", torch.float32) == peak
    assert time.perf_counter() - begun < 0.01
    left = torch.randn(256, 256)
    begun = time.perf_counter()
    torch.mm(left, left)
    assert 2 * 256**3 / (time.perf_counter() - begun) < 3 * peak
    assert peak > 1e8


def test_bf16_as_the_processor_says() -> None:
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert supports_bf16("cpu") == any(
        flag in told.split() for flag in ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
    )
    assert cpu_flags() <= set(told.split())


def test_hardware_is_one_line() -> None:
    line = describe_hardware("cpu", devices=2)
    assert "cores of" in line
    assert line.endswith("GiB, 2 processes")
    assert "\n" not in line


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux")
def test_memory_is_the_machines() -> None:
    kibibytes = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0])
    assert f", {kibibytes / 2**20:.0f} GiB" in describe_hardware("cpu")
